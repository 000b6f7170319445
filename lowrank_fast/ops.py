"""The ops `torch.ops.lowrank_fast.*`: schemas and fake (meta) implementations, declared once for every backend.

Native code only registers kernels for these schemas (`csrc/cpu`, `csrc/cuda`); `fallback.py` is registered for every
device beneath them, so each op exists without a compiler. The ops are not differentiable and check only what memory
safety needs: `functional.py` checks arguments and wraps them in autograd Functions.

Leading dimensions of activations are tokens and may be any number of them. Conventions that all ops share:

* `t`, `p`, `w`, `u` come in the accumulate dtype: float32 (float64 for float64).
* `seed`: int64 `[2]` on the device of `x` (Philox key and stream), or None for no dropout.
* a result that was not asked for (`need_* = False`, `save_t = False`) is an empty tensor `[0]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import fallback
from .reference import accumulate_dtype, norm

NAMESPACE = "lowrank_fast"

_DROPOUT = "float dropout_p, Tensor? seed"
_ROUTED = (
    "Tensor x, Tensor A, Tensor B, Tensor? R, Tensor? weights, Tensor? token_mask, float scale, "
    f"str routing, str router_input, {_DROPOUT}"
)

SCHEMAS = {
    "residual_add": (
        f"(Tensor y, Tensor x, Tensor A, Tensor B, float scale, {_DROPOUT}, bool save_t) -> (Tensor, Tensor)"
    ),
    "residual_add_": f"(Tensor(a!) y, Tensor x, Tensor A, Tensor B, float scale, {_DROPOUT}, bool save_t) -> Tensor",
    "residual_add_out": (
        f"(Tensor y, Tensor x, Tensor A, Tensor B, float scale, {_DROPOUT}, bool save_t, *, Tensor(a!) out) -> Tensor"
    ),
    "residual_add_backward": (
        f"(Tensor g, Tensor? x, Tensor t, Tensor A, Tensor B, float scale, {_DROPOUT}, "
        "bool need_dx, bool need_dA, bool need_dB) -> (Tensor, Tensor, Tensor)"
    ),
    "residual_add_backward_out": (
        f"(Tensor g, Tensor x, Tensor t, Tensor A, Tensor B, float scale, {_DROPOUT}, "
        "*, Tensor(a!) dx, Tensor(b!) dA, Tensor(c!) dB) -> ()"
    ),
    "residual_add_norm": (
        "(Tensor y, Tensor x, Tensor A, Tensor B, float scale, Tensor weight, Tensor? bias, float eps, bool layer) "
        "-> (Tensor, Tensor)"
    ),
    "shrink": f"(Tensor x, Tensor A, {_DROPOUT}) -> Tensor",
    "shrink_backward": (
        f"(Tensor dt, Tensor? x, Tensor A, {_DROPOUT}, ScalarType dx_dtype, bool need_dx, bool need_dA) "
        "-> (Tensor, Tensor)"
    ),
    "expand_add": "(Tensor y, Tensor t, Tensor B, float scale) -> Tensor",
    "expand_add_": "(Tensor(a!) y, Tensor t, Tensor B, float scale) -> ()",
    "expand_add_backward": (
        "(Tensor g, Tensor t, Tensor B, float scale, bool need_dt, bool need_dB) -> (Tensor, Tensor)"
    ),
    "routed_projection": f"(Tensor y, {_ROUTED}) -> (Tensor, Tensor, Tensor, Tensor)",
    "routed_projection_": f"(Tensor(a!) y, {_ROUTED}) -> (Tensor, Tensor, Tensor)",
    "routed_projection_backward": (
        "(Tensor g, Tensor? x, Tensor t, Tensor p, Tensor w, Tensor A, Tensor B, Tensor? R, Tensor? token_mask, "
        f"Tensor? active, float scale, str routing, str router_input, {_DROPOUT}, bool[5] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
}


# ------------------------------------------------------------------------------------------------ fakes


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _hidden(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width), dtype=accumulate_dtype(x.dtype))


def _like(y: Tensor) -> Tensor:
    return torch.empty_like(y, memory_format=torch.contiguous_format)


def _grad_like(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter)


def _residual_add(y, x, A, B, scale, dropout_p, seed, save_t):  # type: ignore[no-untyped-def]
    return _like(y), _residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t)


def _residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, *, out=None):  # type: ignore[no-untyped-def]
    torch._check(A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1], lambda: "A [r, d_in], B [d_out, r]")
    return _hidden(x, A.shape[0]) if save_t else x.new_empty(0, dtype=accumulate_dtype(x.dtype))


def _residual_add_backward(g, x, t, A, B, scale, dropout_p, seed, need_dx, need_dA, need_dB):  # type: ignore[no-untyped-def]
    return (
        g.new_empty((*g.shape[:-1], A.shape[1])) if need_dx else _empty(g),
        _grad_like(A) if need_dA else _empty(A),
        _grad_like(B) if need_dB else _empty(B),
    )


def _gradients_fit(x: Tensor, A: Tensor, B: Tensor, dx: Tensor, dA: Tensor, dB: Tensor) -> None:
    for name, buffer, like in (("dx", dx, x), ("dA", dA, A), ("dB", dB, B)):
        if buffer.shape != like.shape or buffer.dtype is not like.dtype or buffer.device != like.device:
            raise RuntimeError(
                f"lowrank_fast: {name} must be {list(like.shape)} {like.dtype} on {like.device}; "
                f"got {list(buffer.shape)} {buffer.dtype} on {buffer.device}"
            )


def _residual_add_backward_out(g, x, t, A, B, scale, dropout_p, seed, *, dx, dA, dB) -> None:  # type: ignore[no-untyped-def]
    torch._check(A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1], lambda: "A [r, d_in], B [d_out, r]")
    _gradients_fit(x, A, B, dx, dA, dB)


def _residual_add_norm(y, x, A, B, scale, weight, bias, eps, layer):  # type: ignore[no-untyped-def]
    torch._check(A.dim() == 2 and B.dim() == 2 and A.shape[0] == B.shape[1], lambda: "A [r, d_in], B [d_out, r]")
    _gains_fit(y, weight, bias)
    return _like(y), _like(y)


def _gains_fit(y: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        if value.shape != y.shape[-1:] or value.dtype not in (y.dtype, torch.float32) or value.device != y.device:
            raise RuntimeError(
                f"lowrank_fast: {name} must be [{y.shape[-1]}] {y.dtype} or float32 on {y.device}; "
                f"got {list(value.shape)} {value.dtype} on {value.device}"
            )


def _shrink(x, A, dropout_p, seed):  # type: ignore[no-untyped-def]
    torch._check(A.dim() == 2 and A.shape[1] == x.shape[-1], lambda: "A [r, d_in] like x [.., d_in]")
    return _hidden(x, A.shape[0])


def _shrink_backward(dt, x, A, dropout_p, seed, dx_dtype, need_dx, need_dA):  # type: ignore[no-untyped-def]
    dx = dt.new_empty((*dt.shape[:-1], A.shape[1]) if need_dx else (0,), dtype=dx_dtype)
    return dx, _grad_like(A) if need_dA else _empty(A)


def _expand_add(y, t, B, scale):  # type: ignore[no-untyped-def]
    torch._check(B.dim() == 2 and B.shape[1] == t.shape[-1], lambda: "B [d_out, r] like t [.., r]")
    return _like(y)


def _expand_add_(y, t, B, scale) -> None:  # type: ignore[no-untyped-def]
    _expand_add(y, t, B, scale)


def _expand_add_backward(g, t, B, scale, need_dt, need_dB):  # type: ignore[no-untyped-def]
    acc = accumulate_dtype(g.dtype)
    dt = g.new_empty((*g.shape[:-1], B.shape[1]) if need_dt else (0,), dtype=acc)
    return dt, _grad_like(B) if need_dB else _empty(B)


def _routed_projection(y, x, A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed):  # type: ignore[no-untyped-def]
    return _like(y), *_routed_projection_(
        y, x, A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed
    )


def _routed_projection_(y, x, A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed):  # type: ignore[no-untyped-def]
    torch._check(A.dim() == 2 and B.dim() == 3 and A.shape[0] == B.shape[2], lambda: "A [r, d_in], B [E, d_out, r]")
    experts = B.shape[0]
    t = _hidden(x, A.shape[0])
    p = _empty(t) if routing == "static" else _hidden(x, experts)
    if routing == "token":
        return t, p, _empty(t)
    return t, p, t.new_empty((x.shape[0], experts) if routing == "sample" else (experts,))


def _routed_projection_backward(  # type: ignore[no-untyped-def]
    g, x, t, p, w, A, B, R, token_mask, active, scale, routing, router_input, dropout_p, seed, needs
):
    need_dx, need_dA, need_dB, need_dR, need_dweights = needs
    return (
        g.new_empty((*g.shape[:-1], A.shape[1])) if need_dx else _empty(g),
        _grad_like(A) if need_dA else _empty(A),
        _grad_like(B) if need_dB else _empty(B),
        _grad_like(R) if need_dR else _empty(A),
        w.new_empty(B.shape[0]) if need_dweights else _empty(w),
    )


FAKES: dict[str, Callable[..., object]] = {name: globals()[f"_{name}"] for name in SCHEMAS if name != "residual_add_"}
FAKES["residual_add_"] = _residual_add_out


# ------------------------------------------------------------------------------------------------ registration


def _backward_into(*args: Any, dx: Tensor, dA: Tensor, dB: Tensor) -> None:
    """`residual_add_backward_out` for backends that have no kernel of their own for it."""
    _, x, _, A, B, *_ = args
    _gradients_fit(x, A, B, dx, dA, dB)
    gradients = torch.ops.lowrank_fast.residual_add_backward.default(*args, True, True, True)
    for out, gradient in zip((dx, dA, dB), gradients, strict=True):
        out.copy_(gradient)


def _add_then_norm(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, weight: Tensor, bias: Tensor | None, eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`residual_add_norm` for backends that have no kernel of their own for it."""
    out = torch.ops.lowrank_fast.residual_add.default(y, x, A, B, scale, 0.0, None, False)[0]
    _gains_fit(y, weight, bias)
    return out, norm(out, weight, bias, eps, layer)


COMPOSED: dict[str, Callable[..., object]] = {
    "residual_add_backward_out": _backward_into,
    "residual_add_norm": _add_then_norm,
}

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _library.impl(_name, COMPOSED.get(_name) or getattr(fallback, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name], lib=_library)


def implement(dispatch_key: str, backend: Any) -> None:
    """Register the functions of `backend`, named like the ops, for the devices of `dispatch_key` ("CUDA", "XPU")."""
    for name in SCHEMAS:
        if name not in COMPOSED or hasattr(backend, name):
            _library.impl(name, getattr(backend, name), dispatch_key)


class Dispatched:
    """The ops through PyTorch's dispatcher, which picks the kernel by device."""

    residual_add = torch.ops.lowrank_fast.residual_add.default
    residual_add_ = torch.ops.lowrank_fast.residual_add_.default
    residual_add_out = torch.ops.lowrank_fast.residual_add_out.default
    residual_add_backward = torch.ops.lowrank_fast.residual_add_backward.default
    residual_add_backward_out = torch.ops.lowrank_fast.residual_add_backward_out.default
    residual_add_norm = torch.ops.lowrank_fast.residual_add_norm.default
    shrink = torch.ops.lowrank_fast.shrink.default
    shrink_backward = torch.ops.lowrank_fast.shrink_backward.default
    expand_add = torch.ops.lowrank_fast.expand_add.default
    expand_add_ = torch.ops.lowrank_fast.expand_add_.default
    expand_add_backward = torch.ops.lowrank_fast.expand_add_backward.default
    routed_projection = torch.ops.lowrank_fast.routed_projection.default
    routed_projection_ = torch.ops.lowrank_fast.routed_projection_.default
    routed_projection_backward = torch.ops.lowrank_fast.routed_projection_backward.default


def needs_list(*needs: bool) -> Sequence[bool]:
    """The `needs` of `routed_projection_backward`: dx, dA, dB, dR, dweights."""
    return list(needs)
