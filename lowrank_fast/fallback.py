"""The ops of `ops.py` in plain PyTorch: what runs where no kernel does (float64, no compiler, other devices).

Forwards come from `reference.py`; backwards are the closed forms of design section 4. Signatures are those of the op
schemas. A result that was not asked for is an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import reference as ref
from .reference import accumulate_dtype, bank_as_matrix

P = ParamSpec("P")
Result = TypeVar("Result")


def _kernel(function: Callable[P, Result]) -> Callable[P, Result]:
    """An op body: autocast, which would round its matrix products to 16 bits, ends at its door."""

    @functools.wraps(function)
    def body(*args: P.args, **kwargs: P.kwargs) -> Result:
        first = args[0]
        assert isinstance(first, Tensor)
        if not torch.is_autocast_enabled(first.device.type):
            return function(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return function(*args, **kwargs)

    return body


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)


def _rows(x: Tensor, acc: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(acc)


def _long_product(rows: Tensor, factor: Tensor) -> Tensor:
    """`rows [.., n, d] @ factor [.., d, r]` for few columns and many terms, the factor laid out along `d`.

    BLAS adds the terms of a factor laid out along `r` one after the other when there are few rows: three to five times
    the error of the lanes in which it adds the terms of this one.
    """
    return rows @ factor.mT.clone(memory_format=torch.contiguous_format).mT


# ------------------------------------------------------------------------------------------------ residual add


@_kernel
def residual_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> tuple[Tensor, Tensor]:
    t = shrink(x, A, dropout_p, seed)
    return ref.expand_add(y, t, B, scale), t if save_t else _empty(t)


@_kernel
def residual_add_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> Tensor:
    return residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, out=y)


@_kernel
def residual_add_out(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    save_t: bool,
    *,
    out: Tensor,
) -> Tensor:
    result, t = residual_add(y, x, A, B, scale, dropout_p, seed, save_t)
    out.copy_(result)
    return t


@_kernel
def residual_add_backward(
    g: Tensor,
    x: Tensor | None,
    t: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dt, dB = expand_add_backward(g, t, B, scale, need_dx or need_dA, need_dB)
    if not (need_dx or need_dA):
        return _empty(g), _empty(A), dB
    dx, dA = shrink_backward(dt, x, A, dropout_p, seed, g.dtype, need_dx, need_dA)
    return dx, dA, dB


@_kernel
def residual_add_norm(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, weight: Tensor, bias: Tensor | None, eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = residual_add(y, x, A, B, scale, 0.0, None, False)[0]
    return out, ref.norm(out, weight, bias, eps, layer)


# ------------------------------------------------------------------------------------------------ the two halves


@_kernel
def shrink(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    mask = None
    if dropout_p > 0.0 and seed is not None:
        mask = ref.dropout_mask(seed, x.numel() // x.shape[-1], x.shape[-1], dropout_p)
    return ref.shrink(x, A, mask, dropout_p)


@_kernel
def shrink_backward(
    dt: Tensor,
    x: Tensor | None,
    A: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dx_dtype: torch.dtype,
    need_dx: bool,
    need_dA: bool,
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(dt.dtype)
    u = _rows(dt, acc)  # [T, r]
    mask = None
    if dropout_p > 0.0 and seed is not None:
        mask = ref.dropout_mask(seed, u.shape[0], A.shape[1], dropout_p)
    dx, dA = _empty(u).to(dx_dtype), _empty(A)
    if need_dx:
        dx = ref.dropped(u @ A.to(acc), mask, dropout_p).to(dx_dtype).view(*dt.shape[:-1], A.shape[1])
    if need_dA:
        assert x is not None
        dA = (u.mT @ ref.dropped(_rows(x, acc), mask, dropout_p)).to(A.dtype)
    return dx, dA


@_kernel
def expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float) -> Tensor:
    return ref.expand_add(y, t, B, scale)


@_kernel
def expand_add_(y: Tensor, t: Tensor, B: Tensor, scale: float) -> None:
    y.copy_(ref.expand_add(y, t, B, scale))


@_kernel
def expand_add_backward(
    g: Tensor, t: Tensor, B: Tensor, scale: float, need_dt: bool, need_dB: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(g.dtype)
    rows = _rows(g, acc)
    dt, dB = _empty(rows), _empty(B)
    if need_dt:
        dt = (scale * _long_product(rows, B.to(acc))).view(*g.shape[:-1], B.shape[1])
    if need_dB:
        dB = (scale * (rows.mT @ _rows(t, acc))).to(B.dtype)
    return dt, dB


# ------------------------------------------------------------------------------------------------ routed projection


@_kernel
def routed_projection(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None,
    weights: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    routing: str,
    router_input: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t = shrink(x, A, dropout_p, seed)
    if routing == "static":
        assert weights is not None
        p, w = _empty(t), weights.to(t.dtype, copy=True)
    else:
        assert R is not None
        p, w = ref.routing_weights(x, t, A, R, routing, router_input, token_mask)
    out = ref.expand_add_routed(y, t, B, w, scale, routing)
    return out, t, p, _empty(t) if routing == "token" else w


@_kernel
def routed_projection_(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None,
    weights: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    routing: str,
    router_input: str,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, t, p, w = routed_projection(y, x, A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
    y.copy_(out)
    return t, p, w


@_kernel
def routed_projection_backward(
    g: Tensor,
    x: Tensor | None,
    t: Tensor,
    p: Tensor,
    w: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None,
    token_mask: Tensor | None,
    active: Tensor | None,
    scale: float,
    routing: str,
    router_input: str,
    dropout_p: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_dx, need_dA, need_dB, need_dR, need_dweights = needs
    acc = accumulate_dtype(g.dtype)
    experts, _, rank = B.shape
    bank = B.to(acc)
    samples = g.shape[0] if routing == "sample" else 1
    rows = ref.by_sample(g, routing).to(acc)  # [S, N, d_out]
    t_rows = ref.by_sample(t, routing).to(acc)  # [S, N, r]
    dlogits: Tensor | None

    if routing == "token":
        w_rows = ref.by_sample(p, routing).to(acc)
        z = (w_rows[..., :, None] * t_rows[..., None, :]).flatten(-2)  # [1, T, E r]
        dz = (scale * _long_product(rows, bank_as_matrix(bank))).unflatten(-1, (experts, rank))  # [1, T, E, r]
        dB = (scale * (rows.mT @ z))[0].view(-1, experts, rank).transpose(0, 1) if need_dB else None
        # <g, t B_e^T> and not <dz_e, t>: sum() adds in pairs, where the product that makes dz adds d_out terms in a row
        dw = scale * torch.stack([(rows * (t_rows @ B_e.mT)).sum(-1) for B_e in bank], -1)  # [1, T, E]
        dlogits = w_rows * (dw - (w_rows * dw).sum(-1, keepdim=True))  # [1, T, E]
        dt = (w_rows[..., None] * dz).sum(-2)
    else:
        w_rows = w.to(acc).view(samples, experts)
        G = scale * (rows.mT @ t_rows)  # [S, d_out, r]: shared by all experts
        dB = torch.einsum("se,sor->eor", w_rows, G) if need_dB else None
        # <G, B_e> in two steps: as one dot product of d_out r terms it loses a digit for banks of some layouts
        dw = torch.einsum("sor,eor->seo", G, bank).sum(-1)
        dt = scale * _long_product(rows, torch.einsum("se,eor->sor", w_rows, bank))
        dlogits = None if routing == "static" else mean_softmax_backward(ref.by_sample(p, routing), dw, token_mask)

    dx, dA, dR = _empty(g), _empty(A), _empty(A)
    if dlogits is not None and R is not None:
        router = R.to(acc)
        if router_input == "t":
            dR = dlogits.flatten(0, 1).mT @ t_rows.flatten(0, 1)
            dt = dt + dlogits @ router
        elif need_dR:
            assert x is not None
            dR = dlogits.flatten(0, 1).mT @ _rows(x, acc)
    if need_dx or need_dA:
        dt = dt.view(*g.shape[:-1], rank)
        dx, dA = shrink_backward(dt, x, A, dropout_p, seed, acc, need_dx, need_dA)
        if need_dx and dlogits is not None and R is not None and router_input == "x":
            dx = dx + (dlogits @ R.to(acc)).view(dx.shape)
    if dB is not None and active is not None:
        dB = dB * active[:, None, None]
    return (
        dx.to(g.dtype),
        dA,
        _empty(B) if dB is None else dB.to(B.dtype),
        dR.to(R.dtype) if need_dR and R is not None else _empty(A),
        dw[0].clone() if need_dweights else _empty(w),
    )


def mean_softmax_backward(rows: Tensor, dw: Tensor, token_mask: Tensor | None) -> Tensor:
    """`p (dp - <p, dp>)  [S, N, E]` from `p` as `rows`, where the kept tokens share `dp = dw / tokens kept`."""
    if token_mask is None:
        dp = (dw / max(rows.shape[1], 1))[:, None, :].expand_as(rows)
    else:
        keep = token_mask.reshape(rows.shape[:2]).to(rows.dtype)
        dp = dw[:, None, :] * (keep / keep.sum(1, keepdim=True).clamp(min=1.0))[..., None]
    return rows * (dp - (rows * dp).sum(-1, keepdim=True))
