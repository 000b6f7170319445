"""The residual add and the normalisation after it, `out = y + s (x A^T) B^T` and `norm(out)`, in one pass.

A layer that ends in a residual stream is followed by a norm that reads the stream again: 5 passes over `[T, d_out]`,
in one launch 4. The fused kernel is Triton's; on other backends the op is `residual_add` followed by PyTorch's norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .autograd import differentiable_once, recorded
from .functional import like_stream
from .reference import accumulate_dtype

OP = "residual_add_norm"
KINDS = ("rms", "layer")


def norm_backward(
    g: Tensor, out: Tensor, weight: Tensor, eps: float, layer: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the norm `n = v / sqrt(mean v^2 + eps) * weight + bias` by `out`, `weight` and `bias`, all in the
    accumulate dtype; `v` is `out`, less its mean with `layer`."""
    acc = accumulate_dtype(out.dtype)
    value, g = out.to(acc), g.to(acc)
    if layer:
        value = value - value.mean(-1, keepdim=True)
    inverse = torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    unit = value * inverse
    scaled = g * weight.to(acc)
    dvalue = scaled - unit * (scaled * unit).mean(-1, keepdim=True)
    if layer:
        dvalue = dvalue - scaled.mean(-1, keepdim=True)
    width = out.shape[-1]
    return dvalue * inverse, (g * unit).reshape(-1, width).sum(0), g.reshape(-1, width).sum(0)


class _ResidualAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None,
        settings: tuple[float, float, bool, str],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scale, eps, layer, backend = settings
        out, normed = backends.namespace(backend).residual_add_norm(y, x, A, B, scale, weight, bias, eps, layer)
        need_A, need_B = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(x if need_A or need_B else None, A, B, weight, bias, out)
        ctx.settings = settings
        return out, normed

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, g_out: Tensor, g_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight, bias, out = ctx.saved_tensors
        scale, eps, layer, backend = ctx.settings
        need_y, need_x, need_A, need_B, need_weight, need_bias = ctx.needs_input_grad[:6]
        dout, dweight, dbias = norm_backward(g_normed, out, weight, eps, layer)
        g = (g_out + dout).to(out.dtype)
        dx = dA = dB = None
        if need_x or need_A or need_B:
            ops = backends.namespace(backend)
            t = ops.shrink(x, A, 0.0, None) if need_B else B
            dx, dA, dB = ops.residual_add_backward(
                g, x if need_A else None, t, A, B, scale, 0.0, None, need_x, need_A, need_B
            )
        return (
            g if need_y else None,
            dx if need_x else None,
            dA if need_A else None,
            dB if need_B else None,
            dweight.to(weight.dtype) if need_weight else None,
            dbias.to(bias.dtype) if need_bias else None,
            None,
        )


def residual_add_norm(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    *,
    eps: float = 1e-6,
    kind: str = "rms",
) -> tuple[Tensor, Tensor]:
    """`out = y + scale * (x A^T) B^T` and `norm(out)`: the stream, and what the next block reads of it.

    Args:
        y: stream `[.., d_out]`. x: `[.., d_in]`. A: `[r, d_in]`. B: `[d_out, r]`. scale: as in `residual_add`.
        weight: gain of the norm `[d_out]`. bias: `[d_out]`, with `kind="layer"` only.
        eps: added to the mean of squares (or the variance) before its root.
        kind: "rms" (RMSNorm, arXiv 1910.07467) or "layer" (LayerNorm, arXiv 1607.06450).

    Returns: `out` and `norm(out)`, both `[.., d_out]` in the dtype of `y`; both are differentiable.
    Raises: ValueError (shapes, devices, kind), TypeError (dtypes), RuntimeError (double backward), before any memory
        is touched.
    """
    checks.tensors(OP, y=y, x=x, A=A, B=B, weight=weight)
    x = like_stream(x, y)
    checks.update(OP, y, x, A, B)
    checks.scale_and_dropout(OP, scale, 0.0)
    if kind not in KINDS:
        raise ValueError(f"{OP}: kind must be one of {', '.join(map(repr, KINDS))}; got {kind!r}")
    if kind == "rms" and bias is not None:
        raise ValueError(f"{OP}: bias must be None with kind='rms'; got a tensor")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        checks.parameter(OP, name, value, y)
        if value.shape != y.shape[-1:]:
            raise ValueError(f"{OP}: {name} must be [d_out={y.shape[-1]}]; got {list(value.shape)}")
    backend, layer = backends.select(y), kind == "layer"
    tensors = [tensor for tensor in (y, x, A, B, weight, bias) if tensor is not None]
    if recorded(*tensors):
        return _ResidualAddNorm.apply(y, x, A, B, weight, bias, (float(scale), float(eps), layer, backend))
    return backends.namespace(backend).residual_add_norm(y, x, A, B, scale, weight, bias, eps, layer)
