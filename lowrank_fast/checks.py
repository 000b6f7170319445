"""Argument checks of the public functions: each error names the argument, what it was and what it must be.

The happy path is a handful of comparisons (a microsecond or two per call); the sentence is written only on failure.
Errors are `ValueError` (shapes, values), `TypeError` (dtypes) and `RuntimeError` (what autograd or memory forbids).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .reference import ROUTER_INPUTS, ROUTINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DTYPE_NAMES = "float32, bfloat16, float16 or float64"


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def tensors(op: str, **arguments: Tensor) -> None:
    """That these are tensors, which everything below takes for granted."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor; got {type(value).__name__}")


def update(op: str, y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> None:
    """Everything about `y [.., d_out]`, `x [.., d_in]`, `A [r, d_in]`, `B [d_out, r]`."""
    y_shape, x_shape, A_shape, B_shape = y.shape, x.shape, A.shape, B.shape
    dtype, device, dims = y.dtype, y.device, len(y_shape)
    # the usual case in one expression: it runs on every call, and a call can be shorter than the separate checks
    if (
        dims > 1
        and dtype in DTYPES
        and x.dtype is dtype
        and A.dtype is dtype
        and B.dtype is dtype
        and len(x_shape) == dims
        and x_shape[0] == y_shape[0]
        and (dims == 2 or x_shape[:-1] == y_shape[:-1])
        and len(A_shape) == 2
        and A_shape[1] == x_shape[-1] > 0
        and B_shape == (y_shape[-1], A_shape[0])
        and A_shape[0] > 0
        and y_shape[-1] > 0
        and x.device == device
        and A.device == device
        and B.device == device
    ):
        return
    activations(op, y, x)
    down(op, A, x)
    up(op, B, y, A_shape[0])


def activations(op: str, y: Tensor, x: Tensor) -> None:
    """`x [.., d_in]` and `y [.., d_out]`: same leading dimensions, dtype and device."""
    for name, tensor in (("y", y), ("x", x)):
        single(op, name, tensor)
    if y.dtype is not x.dtype:
        raise TypeError(f"{op}: x must have the dtype of y, {y.dtype}; got {x.dtype}")
    if y.device != x.device:
        raise ValueError(f"{op}: x must be on the device of y, {y.device}; got {x.device}")
    if y.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"{op}: x [.., d_in] must have the leading dimensions of y {_shape(y)}; got {_shape(x)}")


def single(op: str, name: str, tensor: Tensor) -> None:
    """One activation tensor: a floating dtype and at least one dimension."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{op}: {name} must be {_DTYPE_NAMES}; got {tensor.dtype}")
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        got = _shape(tensor) if tensor.dim() else "a 0-dimensional tensor"
        raise ValueError(f"{op}: {name} must be [.., d >= 1]; got {got}")


def parameter(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """An adapter parameter: the dtype of the activations or float32, on their device."""
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on the device of the activations, {like.device}; got {tensor.device}")
    if tensor.dtype is not like.dtype and not (tensor.dtype is torch.float32 and like.dtype is not torch.float64):
        raise TypeError(
            f"{op}: {name} must have the dtype of the activations, {like.dtype}, or float32; got {tensor.dtype}"
        )


def down(op: str, A: Tensor, x: Tensor) -> None:
    """`A [r, d_in]`, `r >= 1`."""
    if A.dtype is not x.dtype or A.device != x.device:
        parameter(op, "A", A, x)
    shape = A.shape
    if len(shape) != 2 or shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: A must be [r, d_in={x.shape[-1]}] like x [.., {x.shape[-1]}]; got {_shape(A)}")
    if shape[0] == 0:
        raise ValueError(f"{op}: A must have rank r >= 1; got {_shape(A)}")


def up(op: str, B: Tensor, y: Tensor, rank: int, rank_of: str = "A") -> None:
    """`B [d_out, r]`."""
    if B.dtype is not y.dtype or B.device != y.device:
        parameter(op, "B", B, y)
    shape = B.shape
    if len(shape) != 2 or shape[0] != y.shape[-1] or shape[1] != rank:
        raise ValueError(f"{op}: B must be [d_out={y.shape[-1]}, r={rank}] like y and {rank_of}; got {_shape(B)}")


def hidden(op: str, t: Tensor, y: Tensor) -> None:
    """`t [.., r]` beside `y [.., d_out]`: what `shrink` returns, or the dtype of `y`."""
    if t.dtype is not y.dtype or t.device != y.device:
        parameter(op, "t", t, y)
    if t.shape[:-1] != y.shape[:-1] or t.dim() == 0 or t.shape[-1] == 0:
        raise ValueError(f"{op}: t must be [.., r >= 1] with the leading dimensions of y {_shape(y)}; got {_shape(t)}")


def bank(op: str, B: Tensor, y: Tensor, rank: int) -> None:
    """`B [E, d_out, r]`, `E >= 1`."""
    parameter(op, "B", B, y)
    shape = B.shape
    if len(shape) != 3 or shape[1] != y.shape[-1] or shape[2] != rank or shape[0] == 0:
        raise ValueError(
            f"{op}: B must be a bank [E >= 1, d_out={y.shape[-1]}, r={rank}] like y and A; got {_shape(B)}"
        )


def router(
    op: str,
    x: Tensor,
    rank: int,
    experts: int,
    R: Tensor | None,
    weights: Tensor | None,
    token_mask: Tensor | None,
    active: Tensor | bool | None,
    routing: str,
    router_input: str,
) -> None:
    """The arguments that say how experts are mixed, against the bank's `experts`."""
    if routing not in ROUTINGS:
        raise ValueError(f"{op}: routing must be one of {', '.join(map(repr, ROUTINGS))}; got {routing!r}")
    if router_input not in ROUTER_INPUTS:
        raise ValueError(f"{op}: router_input must be 't' or 'x'; got {router_input!r}")
    if routing == "sample" and x.dim() < 3:
        raise ValueError(f"{op}: routing='sample' needs x [S, .., d_in] with at least 3 dimensions; got {_shape(x)}")
    if routing == "static":
        if R is not None:
            raise ValueError(f"{op}: R must be None with routing='static', which takes weights; got {_shape(R)}")
        if weights is None or weights.shape != (experts,) or not weights.is_floating_point():
            got = None if weights is None else f"{_shape(weights)} {weights.dtype}"
            raise ValueError(f"{op}: weights must be a floating tensor [E={experts}] with routing='static'; got {got}")
        if weights.device != x.device:
            raise ValueError(f"{op}: weights must be on the device of x, {x.device}; got {weights.device}")
    else:
        if weights is not None:
            raise ValueError(f"{op}: weights must be None unless routing='static'; got {_shape(weights)}")
        width = rank if router_input == "t" else x.shape[-1]
        if R is None:
            raise ValueError(f"{op}: R must be [E={experts}, {width}] with routing={routing!r}; got None")
        parameter(op, "R", R, x)
        if R.shape != (experts, width):
            raise ValueError(
                f"{op}: R must be [E={experts}, {width}] like the bank B and router_input={router_input!r}; "
                f"got {_shape(R)}"
            )
    if token_mask is not None:
        _mask(op, "token_mask", token_mask, x.shape[:-1], x)
    if isinstance(active, Tensor):
        _mask(op, "active", active, (experts,), x)
    elif active is not None and not isinstance(active, bool):
        raise TypeError(
            f"{op}: active must be a bool, a bool tensor [E={experts}] or None; got {type(active).__name__}"
        )


def _mask(op: str, name: str, mask: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if mask.dtype is not torch.bool:
        raise TypeError(f"{op}: {name} must be bool; got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"{op}: {name} must be {list(shape)}; got {_shape(mask)}")
    if mask.device != x.device:
        raise ValueError(f"{op}: {name} must be on the device of x, {x.device}; got {mask.device}")


def scale_and_dropout(op: str, scale: float, dropout_p: float) -> None:
    """`scale` a finite or infinite Python number, `0 <= dropout_p < 1`."""
    if not isinstance(scale, (float, int)):
        raise TypeError(f"{op}: scale must be a float; got {type(scale).__name__}")
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError(f"{op}: scale must fit a float; got an integer of {scale.bit_length()} bits")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p must be in [0, 1); got {dropout_p}")


# ------------------------------------------------------------------------------------------------ memory and autograd


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and one-past-last byte that the tensor's elements can touch; none for a tensor without memory (meta, fake,
    or of a torch.func transform)."""
    try:
        start = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    except RuntimeError:
        start = 0
    if start == 0:
        return 0, 0
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (reach + 1) * tensor.element_size()


def _sharing(tensor: Tensor, others: tuple[tuple[str, Tensor], ...]) -> str | None:
    """The first of `others` whose byte range meets that of `tensor`; interleaved views count as meeting."""
    start, stop = _span(tensor)
    for name, other in others:
        first, last = _span(other)
        if start < last and first < stop:
            return name
    return None


def _writable(op: str, name: str, tensor: Tensor) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{op}: {name} was made under torch.inference_mode() and cannot be written outside it; clone it"
        )
    if tensor.is_neg():
        raise RuntimeError(f"{op}: {name} is a view with the negative bit set and cannot be written; resolve_neg() it")
    if tensor.is_contiguous():
        return
    if tensor.numel() and any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
        raise RuntimeError(f"{op}: {name} is expanded (several elements share memory) and cannot be written; clone it")


def inplace(op: str, y: Tensor, others: tuple[tuple[str, Tensor], ...], recording: bool) -> None:
    """Whether `y` may be overwritten: autograd's rules, and no input that shares its memory."""
    if torch.compiler.is_compiling():
        return
    if recording:
        _recordable(op, y, others)
    _writable(op, "y", y)
    shared = _sharing(y, others)
    if shared:
        raise RuntimeError(f"{op}: inplace=True needs y and {shared} in separate memory, but they overlap")


def _recordable(op: str, y: Tensor, others: tuple[tuple[str, Tensor], ...]) -> None:
    """What autograd would refuse only after `y` was overwritten."""
    for name, tensor in (("y", y), *others):
        if tensor.is_inference():
            raise RuntimeError(
                f"{op}: inplace=True needs ordinary tensors while autograd records, but {name} was made under "
                "torch.inference_mode(); clone it, or use torch.no_grad()"
            )
    if not torch.is_grad_enabled():
        return
    base = y._base if y._is_view() else y
    assert base is not None
    if base.is_leaf and base.requires_grad:
        what = "a leaf y" if base is y else "a y that is a view of a leaf"
        raise RuntimeError(f"{op}: inplace=True on {what} that requires grad; use inplace=False or torch.no_grad()")
    if y._is_view() and torch._C._autograd._get_creation_meta(y) != torch._C._autograd.CreationMeta.DEFAULT:
        raise RuntimeError(
            f"{op}: inplace=True on a y that is one of several views returned by one function (chunk, split, unbind) "
            "or made under no_grad, which autograd forbids; use inplace=False"
        )


def out_buffer(op: str, out: Tensor, y: Tensor, others: tuple[tuple[str, Tensor], ...], recording: bool) -> None:
    """Whether `out` may take the result: shape, dtype and device of `y`, no autograd, no overlap but `y` itself."""
    tensors(op, out=out)
    if recording or (out.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError(f"{op}: out= is for calls that autograd does not record; use torch.no_grad() or drop out=")
    if out.shape != y.shape or out.dtype is not y.dtype or out.device != y.device:
        raise ValueError(
            f"{op}: out must be {_shape(y)} {y.dtype} on {y.device} like y; "
            f"got {_shape(out)} {out.dtype} on {out.device}"
        )
    if torch.compiler.is_compiling():
        return
    _writable(op, "out", out)
    shared = _sharing(out, others)
    if shared:
        raise RuntimeError(f"{op}: out and {shared} must not overlap")
    if _sharing(out, (("y", y),)) and not (out.data_ptr() == y.data_ptr() and out.stride() == y.stride()):
        raise RuntimeError(f"{op}: out must be y itself or not overlap it")
