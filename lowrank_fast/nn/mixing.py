"""The bank mixed once per batch: `up = sum_e w_e B_e`, `w = mean softmax(t R^T)`, forward and backward.

    p = softmax(t R^T) [T, E]     w = mean of p over the kept tokens     up = sum_e w_e B_e [d_out, k]
    dw_e = <d_up, B_e>     dp = dw / kept     dlogits = p (dp - <p, dp>)
    dB_e = w_e d_up        dR = dlogits^T t     dt = dlogits R

The bank is read as a matrix [E, d_out k] in the order in which it lies in memory, so nothing is permuted or copied,
and the E gradients are written once, as an outer product, in that order. csrc/cpu/mixing_impl.h holds the node once
more, for plain calls.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import differentiable_once
from .inplace import without_autocast


def _rank_major(B: Tensor) -> bool:
    """Whether `B [E, d_out, r]` lies in memory as `[E, r, d_out]`, as PEFT's Lily stores it."""
    return B.mT.is_contiguous()


def _flat(B: Tensor, major: bool) -> Tensor:
    """`[.., d_out, r] -> [.., d_out r]` in the order of memory; a view where `B` is dense."""
    return (B.mT if major else B).flatten(-2)


def _unflat(flat: Tensor, like: Tensor, major: bool) -> Tensor:
    """`[.., d_out r] -> [.., d_out, r]`, the inverse of `_flat` for a bank `like`."""
    d_out, r = like.shape[-2:]
    return flat.unflatten(-1, (r, d_out)).mT if major else flat.unflatten(-1, (d_out, r))


class _MixedBank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, R: Tensor, B: Tensor, mask: Tensor | None) -> Tensor:
        rows = t.reshape(-1, t.shape[-1])
        p = torch.softmax(rows @ R.mT, -1)
        if mask is None:
            kept = torch.tensor(float(max(rows.shape[0], 1)), dtype=t.dtype, device=t.device)
            w = p.sum(0) / kept
        else:
            mask = mask.reshape(-1).to(t.dtype)
            kept = mask.sum().clamp(min=1.0)
            w = (mask @ p) / kept
        major, ctx.shape = _rank_major(B), t.shape
        ctx.save_for_backward(rows, R, B, mask, p, w, kept)
        return _unflat(w @ _flat(B, major).to(t.dtype), B, major)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, d_up: Tensor) -> tuple[Tensor | None, ...]:
        need_t, need_R, need_B, _ = ctx.needs_input_grad
        rows, R, B, mask, p, w, kept = ctx.saved_tensors
        major = _rank_major(B)
        d = _flat(d_up, major)
        dt = dR = dB = None
        if need_B:
            dB = _unflat(torch.outer(w, d).to(B.dtype), B, major)
        if need_t or need_R:
            with without_autocast(d.device.type):
                dp = (_flat(B, major).to(d.dtype) @ d) / kept  # [E], the same for every kept token
                dlogits = p * (dp - (p @ dp)[:, None])
                if mask is not None:
                    dlogits *= mask[:, None]
                dt = (dlogits @ R).view(ctx.shape) if need_t else None
                dR = (dlogits.mT @ rows) if need_R else None
        return dt, dR, dB, None


def mixed_bank(t: Tensor, R: Tensor, B: Tensor, mask: Tensor | None = None) -> Tensor:
    """`up [d_out, r]` in the dtype of `t [.., r]` (float32 or float64), from a router `R [E, r]` of that dtype.

    `B [E, d_out, r]`: the bank, any dtype; dense in either order of its last two dimensions, else it is copied.
    `mask` (bool, one per token): False for tokens that the mean leaves out.
    """
    up: Tensor | None = None if backends.eager is None else backends.eager.mixed_bank(t, R, B, mask)
    if up is None:
        with without_autocast(t.device.type):
            up = _MixedBank.apply(t, R, B, mask)
    return up
