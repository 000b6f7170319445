"""The residual add and the normalisation after it, `out = y + s (x A^T) B^T` and `norm(out)`, in one pass.

A layer that ends in a residual stream is followed by a norm that reads the stream again: 5 passes over `[T, d_out]`,
in one launch 4. The fused kernel is Triton's; everywhere else, and under `torch.compile` (which fuses the norm
itself), it is `residual_add` followed by PyTorch's norm.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import backends, checks, triton_backend
from .functional import _like_stream, residual_add

OP = "residual_add_norm"
KINDS = ("rms", "layer")


def norm_of(out: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    """`RMSNorm(out)` or `LayerNorm(out)` over the last dimension, by PyTorch; the reference of the fused kernel."""
    weight = weight.to(out.dtype)
    if kind == "rms":
        return F.rms_norm(out, weight.shape, weight, eps)
    return F.layer_norm(out, weight.shape, weight, None if bias is None else bias.to(out.dtype), eps)


def _fused(y: Tensor, rank: int) -> bool:
    """Whether the call that `residual_add` would make of `y` has Triton's kernel for both."""
    if torch.compiler.is_compiling() or y.numel() == 0:
        return False
    chosen = backends.select(y)
    on_gpu = y.device.type in ("cuda", "xpu") and triton_backend.unavailable_reason() is None
    wanted = chosen == "triton" or (chosen == "dispatch" and on_gpu)
    return wanted and rank <= triton_backend.plan().table.WIDEST


class _ResidualAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, A: Tensor, B: Tensor, weight: Tensor, bias: Tensor | None,
        settings: tuple[float, float, str],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        scale, eps, kind = settings
        out, normed = triton_backend.residual_add_norm(y, x, A, B, scale, weight, bias, eps, kind == "layer")
        need_A, need_B = ctx.needs_input_grad[2:4]
        ctx.save_for_backward(x if need_A or need_B else None, A, B, weight, bias, out)
        ctx.settings = settings
        return out, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_out: Tensor, g_normed: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, weight, bias, out = ctx.saved_tensors
        scale, eps, kind = ctx.settings
        need_y, need_x, need_A, need_B, need_weight, need_bias = ctx.needs_input_grad[:6]
        with torch.enable_grad():
            leaves = [
                None if value is None else value.detach().requires_grad_(need)
                for value, need in ((out, True), (weight, need_weight), (bias, need_bias))
            ]
            again = norm_of(leaves[0], leaves[1], leaves[2], eps, kind)  # type: ignore[arg-type]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = iter(torch.autograd.grad(again, wanted, g_normed))
        g = g_out + next(found)
        dweight, dbias = (next(found) if need else None for need in (need_weight, need_bias))
        dx = dA = dB = None
        if need_x or need_A or need_B:
            t = triton_backend.shrink(x, A, 0.0, None) if need_B else g.new_empty(0, dtype=torch.float32)
            results = triton_backend.residual_add_backward(
                g, x if need_A else None, t, A, B, scale, 0.0, None, need_x, need_A, need_B
            )
            dx, dA, dB = (
                value if need else None for value, need in zip(results, (need_x, need_A, need_B), strict=True)
            )
        return g if need_y else None, dx, dA, dB, dweight, dbias, None


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
    x = _like_stream(x, y)
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
    if _fused(y, A.shape[0]):
        return _ResidualAddNorm.apply(y, x, A, B, weight, bias, (float(scale), float(eps), kind))
    out = residual_add(y, x, A, B, scale)
    return out, norm_of(out, weight, bias, eps, kind)
