"""A frozen linear layer and its low-rank update as one step of autograd, forward and backward.

    y = x W^T + b + s h U^T            h [T, k] hidden, U [d_out, k]; W and b frozen
    dx = g W + u A                     u = s g U, and what a router adds

Taken apart, autograd keeps a `dx` for W and another for A, writes both and adds them: three passes over [T, d_in] per
layer, two more for each further layer that reads the same x. Here one buffer collects them all. The shrink hands on an
alias of x, and every frozen layer that reads x takes the alias of the one before:

    forward                                  backward, from the last line up
    t, x1   = shrink(x, A)                   dx += u A        in place, A the rows of all layers
    y_q, x2 = frozen_linear(x1, W_q, ..)     dx += g_q W_q    GEMMs that add to their output: no pass of their own
    y_k, x3 = frozen_linear(x2, W_k, ..)     dx += g_k W_k
    y_v, _  = frozen_linear(x3, W_v, ..)     dx  = g_v W_v

The aliases are never handed out, so nobody else holds the buffers that are written in place. `y` is a fresh tensor
of this step's own, so the update goes into it in place whatever produced `x`.

csrc/cpu/frozen_impl.h holds both nodes again, for plain calls: after a GEMM the caches are cold, and Python is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

from .. import backends, checks
from ..autograd import differentiable_once
from ..functional import dropout_seed, shrink
from .inplace import dtype_for, without_autocast

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def frozen_linear_of(base: nn.Module, x: Tensor) -> nn.Linear | None:
    """`base` if `frozen_linear` computes what calling it on `x` would; None if it must be called.

    That is an nn.Linear (no subclass) with plain frozen tensors in the dtype of `x`, without hooks, while autograd
    records and neither autocast nor torch.compile is at work.
    """
    if type(base) is not nn.Linear or "forward" in base.__dict__ or not torch.is_grad_enabled():
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or type(weight) is not nn.Parameter or weight.dtype is not x.dtype:
        return None
    if bias is not None and (bias.requires_grad or type(bias) is not nn.Parameter):
        return None
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return None
    if any(getattr(base, hooks) for hooks in _HOOKS) or _module._has_any_global_hook():
        return None
    return base


def _stacked(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


class _Tap(torch.autograd.Function):
    """The blocks are stacked in forward and again in backward, so that no copy of them is kept in between."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dropout_p: float, seed: Tensor | None, backend: str, *blocks: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, seed, *blocks)
        ctx.settings = (dropout_p, x.dtype, backend)
        ctx.set_materialize_grads(False)
        return backends.namespace(backend).shrink(x, _stacked(blocks), dropout_p, seed), x

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dt: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, needs = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        d_blocks: list[Tensor | None] = [None] * len(needs)
        if dt is not None:
            x, seed, *blocks = ctx.saved_tensors
            dropout_p, dtype, backend = ctx.settings
            ops, A = backends.namespace(backend), _stacked(blocks)
            apart = need_x and (dx is None or dropout_p > 0.0)  # dropout masks dx: no plain product
            if apart or any(needs):
                own, dA = ops.shrink_backward(dt, x, A, dropout_p, seed, dtype, apart, any(needs))
            if any(needs):
                parts = dA.split([block.shape[0] for block in blocks])
                d_blocks = [part if need else None for part, need in zip(parts, needs, strict=True)]
            if apart:
                dx = own if dx is None else dx.add_(own)
            elif need_x:
                ops.expand_add_(dx, dt, A.mT, 1.0)
        return dx if need_x else None, None, None, None, *d_blocks


class Hidden:
    """What layers on one input get from its shrink.

    Attributes:
        parts: `dropout(x) A_i^T  [.., r_i]` for each row block, float32 (float64 for float64).
        reader: holds the alias of `x` that the next frozen layer reads; shared by all layers on that input.
    """

    __slots__ = ("parts", "reader")

    def __init__(self, parts: list[Tensor], reader: list[Tensor]) -> None:
        self.parts, self.reader = parts, reader


def shrink_rows(x: Tensor, blocks: Sequence[Tensor], dropout_p: float = 0.0) -> Hidden:
    """`dropout(x) A_i^T` for row blocks `A_i [r_i, d_in]` of one dtype, in one pass over `x [.., d_in]`."""
    matched = [dtype_for(block, x) for block in blocks]
    in_cpp = None if backends.eager is None or dropout_p > 0.0 else backends.eager.shrink_rows(x, *matched)
    if in_cpp is not None:
        t, alias = in_cpp
    elif torch.is_grad_enabled():
        checks.single("shrink", "x", x)
        for block in matched:
            checks.down("shrink", block, x)
        seed = dropout_seed(x.device) if dropout_p > 0.0 else None
        t, alias = _Tap.apply(x, dropout_p, seed, backends.select(x), *matched)
    else:
        t, alias = shrink(x, _stacked(matched), dropout_p=dropout_p, training=dropout_p > 0.0), x
    parts = [t] if len(matched) == 1 else list(t.split([block.shape[0] for block in matched], -1))
    return Hidden(parts, [alias if x.requires_grad else x])


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        hidden: Tensor,
        up: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        y = nn.functional.linear(x, weight, bias)
        backends.namespace(backend).expand_add_(y, hidden, up, scale)
        ctx.save_for_backward(hidden if ctx.needs_input_grad[2] else None, up, weight)
        ctx.settings = (scale, backend)
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_hidden, need_up = ctx.needs_input_grad[:3]
        d_hidden = d_up = None
        if g is not None:
            hidden, up, weight = ctx.saved_tensors
            scale, backend = ctx.settings
            if need_hidden or need_up:
                d_hidden, d_up = backends.namespace(backend).expand_add_backward(
                    g, hidden if need_up else up, up, scale, need_hidden, need_up
                )
            if need_x:
                rows = g.reshape(-1, g.shape[-1])
                with without_autocast(g.device.type):
                    if dx is None:
                        dx = torch.mm(rows, weight).view(*g.shape[:-1], weight.shape[1])
                    else:
                        dx.view(-1, weight.shape[1]).addmm_(rows, weight)
        return (
            dx if need_x else None,
            d_hidden if need_hidden else None,
            d_up if need_up else None,
            *(None,) * 4,
        )


def frozen_linear(base: nn.Linear, source: Hidden, hidden: Tensor, up: Tensor, scale: float) -> Tensor:
    """`base(x) + s * hidden up^T  [.., d_out]`, for the x that `source` came from.

    Args:
        base: what `frozen_linear_of` accepted for that x.
        hidden: `[.., k]` in the dtype of `source.parts`. up: `[d_out, k]`, any strides.
    """
    x = source.reader[0]
    arguments = (x, hidden, dtype_for(up, x), base.weight, base.bias, float(scale))
    in_cpp = None if backends.eager is None else backends.eager.frozen_linear(*arguments)
    y, alias = in_cpp or _FrozenLinear.apply(*arguments, backends.select(x))
    if x.requires_grad:
        source.reader[0] = alias
    return y
