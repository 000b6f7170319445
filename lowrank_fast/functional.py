"""The public functions, differentiable on every backend.

    residual_add        out = y + s * (dropout(x) A^T) B^T                       LoR2C, LoRA
    shrink, expand_add  the two halves, for updates that start and end at different layers
    routed_projection   out = y + s * sum_e w_e (dropout(x) A^T) B_e^T           Lily, EffiLoRA, HydraLoRA

Shapes: `x [.., d_in]`, `y [.., d_out]` with equal leading dimensions (tokens), `A [r, d_in]`, `B [d_out, r]` or a bank
`[E, d_out, r]`. Activations are float32, bfloat16, float16 or float64; parameters have their dtype or float32, and
gradients come back in the parameter's dtype. Sums are accumulated in float32. NaN and inf in the input come out as NaN
and inf: nothing is checked or clamped.

Backward keeps `x` (only if `A` or a router on `x` needs a gradient), `t = x A^T [.., r]` and the routing probabilities
`[.., E]`. Gradients that are not needed are not computed and come back as None. The gradient of `y` is the incoming
gradient itself, not a copy. Double backward and forward-mode differentiation raise. Under autocast, `y` keeps its dtype
and `x` is cast to it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks
from .autograd import differentiable_once, recorded

__all__ = ["dropout_seed", "expand_add", "residual_add", "routed_projection", "shrink"]


def dropout_seed(device: torch.device) -> Tensor:
    """A fresh Philox key and stream, int64 `[2]`, from the default generator of `device`: `torch.manual_seed` holds."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def like_stream(x: Tensor, y: Tensor) -> Tensor:
    """The autocast rule: the stream `y` decides the dtype."""
    if x.dtype is not y.dtype and x.is_floating_point() and torch.is_autocast_enabled(y.device.type):
        return x.to(y.dtype)
    return x


def _written(tensor: Tensor) -> Tensor:
    """Counts a write outside autograd, so that a backward that saved the old values raises instead of using the new."""
    if not torch.compiler.is_compiling() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)
    return tensor


# ------------------------------------------------------------------------------------------------ residual add


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        seed: Tensor | None,
        settings: tuple[float, float, str, bool],
    ) -> Tensor:
        scale, dropout_p, backend, inplace = settings
        ops = backends.namespace(backend)
        need_A, need_B = ctx.needs_input_grad[2:4]
        if inplace:
            t = ops.residual_add_(y, x, A, B, scale, dropout_p, seed, need_B)
            ctx.mark_dirty(y)
            out = y
        else:
            out, t = ops.residual_add(y, x, A, B, scale, dropout_p, seed, need_B)
        ctx.save_for_backward(x if need_A else None, t if need_B else None, A, B, seed)
        ctx.settings = settings
        return out

    @staticmethod
    @differentiable_once(hands_on=True)
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        need_y, need_x, need_A, need_B = ctx.needs_input_grad[:4]
        dx = dA = dB = None
        if need_x or need_A or need_B:
            x, t, A, B, seed = ctx.saved_tensors
            scale, dropout_p, backend, _ = ctx.settings
            ops = backends.namespace(backend)
            dx, dA, dB = ops.residual_add_backward(
                g, x, t if need_B else B, A, B, scale, dropout_p, seed, need_x, need_A, need_B
            )
        return (
            g if need_y else None,
            dx if need_x else None,
            dA if need_A else None,
            dB if need_B else None,
            None,
            None,
        )


def residual_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    inplace: bool = False,
    out: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`y + scale * (dropout(x) A^T) B^T`, reading `x` and `y` once and writing the result once.

    Args:
        y: stream `[.., d_out]`.
        x: input of the update `[.., d_in]`; leading dimensions, dtype and device of `y`.
        A: down projection `[r, d_in]`, r >= 1. B: up projection `[d_out, r]`, any strides.
        scale: factor of the update.
        inplace: overwrite and return `y`. Legal where autograd allows it: not on a leaf that requires grad, not on
            one of several views, not where `y` overlaps `x`, `A` or `B`.
        out: a buffer like `y` for the result, for calls that autograd does not record.
        dropout_p: probability of zeroing an element of `x` (the rest is scaled by `1 / (1 - p)`), if `training`. The
            mask is regenerated in backward from a counter-based generator, never stored.

    Returns: `[.., d_out]` in the dtype of `y`.
    Raises: ValueError (shapes, devices), TypeError (dtypes), RuntimeError (memory or autograd forbids it; a backend
        that is not available), all before any memory is touched.

    Source: arXiv 2503.00572 (LoR2C), equation of the residual branch.
    """
    if not torch.compiler.is_compiling() and backends.eager is not None and not dropout_p:
        result: Tensor | None = backends.eager.residual_add(y, x, A, B, scale, inplace, out)  # the same, without Python
        if result is not None:
            return result
    checks.tensors("residual_add", y=y, x=x, A=A, B=B)
    x = like_stream(x, y)
    checks.update("residual_add", y, x, A, B)
    if dropout_p or type(scale) is not float:
        checks.scale_and_dropout("residual_add", scale, dropout_p)
    backend = backends.select(y)
    recording = recorded(y, x, A, B)
    if inplace:
        if out is not None:
            raise ValueError("residual_add: out must be None with inplace=True")
        checks.inplace("residual_add", y, (("x", x), ("A", A), ("B", B)), recording)
    elif out is not None:
        checks.out_buffer("residual_add", out, y, (("x", x), ("A", A), ("B", B)), recording)
    p, seed = (float(dropout_p), dropout_seed(x.device)) if training and dropout_p > 0.0 else (0.0, None)
    if recording:
        return _ResidualAdd.apply(y, x, A, B, seed, (float(scale), p, backend, inplace))
    ops = backends.namespace(backend)
    if inplace:
        ops.residual_add_(y, x, A, B, scale, p, seed, False)
        return _written(y)
    if out is not None:
        ops.residual_add_out(y, x, A, B, scale, p, seed, False, out=out)
        return _written(out)
    return ops.residual_add(y, x, A, B, scale, p, seed, False)[0]


# ------------------------------------------------------------------------------------------------ the two halves


class _Shrink(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None, backend: str) -> Tensor:
        need_A = ctx.needs_input_grad[1]
        ctx.save_for_backward(x if need_A else None, A, seed)
        ctx.settings = (dropout_p, x.dtype, backend)
        return backends.namespace(backend).shrink(x, A, dropout_p, seed)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_A = ctx.needs_input_grad[:2]
        x, A, seed = ctx.saved_tensors
        dropout_p, dtype, backend = ctx.settings
        ops = backends.namespace(backend)
        dx, dA = ops.shrink_backward(dt, x, A, dropout_p, seed, dtype, need_x, need_A)
        return dx if need_x else None, dA if need_A else None, None, None, None


def shrink(x: Tensor, A: Tensor, *, dropout_p: float = 0.0, training: bool = False) -> Tensor:
    """`t = dropout(x) A^T`: `x [.., d_in]`, `A [r, d_in]` -> `t [.., r]`, in float32 (float64 for float64).

    `t` keeps what the accumulators hold, so that `expand_add(y, shrink(x, A), B)` equals `residual_add(y, x, A, B)`.
    Raises as `residual_add` does.
    """
    checks.tensors("shrink", x=x, A=A)
    checks.single("shrink", "x", x)
    checks.down("shrink", A, x)
    if dropout_p:
        checks.scale_and_dropout("shrink", 1.0, dropout_p)
    backend = backends.select(x)
    p, seed = (float(dropout_p), dropout_seed(x.device)) if training and dropout_p > 0.0 else (0.0, None)
    if recorded(x, A):
        return _Shrink.apply(x, A, p, seed, backend)
    return backends.namespace(backend).shrink(x, A, p, seed)


class _ExpandAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor, B: Tensor, scale: float, inplace: bool, backend: str) -> Tensor:
        ops = backends.namespace(backend)
        ctx.save_for_backward(t if ctx.needs_input_grad[2] else None, B)
        ctx.settings = (scale, t.dtype, backend)
        if not inplace:
            return ops.expand_add(y, t, B, scale)
        ops.expand_add_(y, t, B, scale)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @differentiable_once(hands_on=True)
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        need_y, need_t, need_B = ctx.needs_input_grad[:3]
        dt = dB = None
        if need_t or need_B:
            t, B = ctx.saved_tensors
            scale, dtype, backend = ctx.settings
            ops = backends.namespace(backend)
            dt, dB = ops.expand_add_backward(g, t if need_B else B, B, scale, need_t, need_B)
            dt = dt.to(dtype) if need_t else None
        return g if need_y else None, dt, dB if need_B else None, None, None, None


def expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float = 1.0, *, inplace: bool = False) -> Tensor:
    """`y + scale * t B^T`: `y [.., d_out]`, `t [.., r]` (float32 or the dtype of `y`), `B [d_out, r]` -> like `y`.

    `inplace` and what raises: as in `residual_add`.
    """
    checks.tensors("expand_add", y=y, t=t, B=B)
    checks.single("expand_add", "y", y)
    checks.hidden("expand_add", t, y)
    checks.up("expand_add", B, y, t.shape[-1], "t")
    if type(scale) is not float:
        checks.scale_and_dropout("expand_add", scale, 0.0)
    backend = backends.select(y)
    recording = recorded(y, t, B)
    if inplace:
        checks.inplace("expand_add", y, (("t", t), ("B", B)), recording)
    if recording:
        return _ExpandAdd.apply(y, t, B, float(scale), inplace, backend)
    ops = backends.namespace(backend)
    if inplace:
        ops.expand_add_(y, t, B, scale)
        return _written(y)
    return ops.expand_add(y, t, B, scale)


# ------------------------------------------------------------------------------------------------ routed projection


class _RoutedProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        R: Tensor | None,
        weights: Tensor | None,
        token_mask: Tensor | None,
        active: Tensor | None,
        scale: float,
        routing: str,
        router_input: str,
        inplace: bool,
        train_bank: bool,
        dropout_p: float,
        seed: Tensor | None,
        backend: str,
    ) -> Tensor:
        ops = backends.namespace(backend)
        arguments = (x, A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
        if inplace:
            t, p, w = ops.routed_projection_(y, *arguments)
            ctx.mark_dirty(y)
            out = y
        else:
            out, t, p, w = ops.routed_projection(y, *arguments)
        need_A, need_R = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        keep_x = need_A or (need_R and router_input == "x")
        ctx.save_for_backward(x if keep_x else None, t, p, w, A, B, R, token_mask, active, seed)
        ctx.settings = (scale, routing, router_input, train_bank, dropout_p, backend)
        ctx.weights_dtype = None if weights is None else weights.dtype
        return out

    @staticmethod
    @differentiable_once(hands_on=True)
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        need_y, need_x, need_A, need_B, need_R, need_weights = ctx.needs_input_grad[:6]
        scale, routing, router_input, train_bank, dropout_p, backend = ctx.settings
        need_B = need_B and train_bank
        dx = dA = dB = dR = dweights = None
        if need_x or need_A or need_B or need_R or need_weights:
            x, t, p, w, A, B, R, token_mask, active, seed = ctx.saved_tensors
            ops = backends.namespace(backend)
            settings = (scale, routing, router_input, dropout_p, seed)
            needs = [need_x, need_A, need_B, need_R, need_weights]
            dx, dA, dB, dR, dweights = ops.routed_projection_backward(
                g, x, t, p, w, A, B, R, token_mask, active, *settings, needs
            )
        return (
            g if need_y else None,
            dx if need_x else None,
            dA if need_A else None,
            dB if need_B else None,
            dR if need_R else None,
            dweights.to(ctx.weights_dtype) if dweights is not None and need_weights else None,
            *(None,) * 10,
        )


def routed_projection(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None = None,
    scale: float = 1.0,
    *,
    routing: str = "batch",
    router_input: str = "t",
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    active: Tensor | bool | None = None,
    inplace: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`y + scale * sum_e w_e (dropout(x) A^T) B_e^T`, mixing the experts before the one pass over `y`.

    Args:
        y, x, A, scale, inplace, dropout_p, training: as in `residual_add`.
        B: bank of up projections `[E, d_out, r]`, any strides (a transposed view is not copied).
        R: router, `[E, r]` with `router_input="t"` or `[E, d_in]` with `"x"` (which sees `x` without dropout).
            Probabilities are `softmax(t R^T)` or `softmax(x R^T)`, in float32.
        routing: "batch": weights are the mean of the probabilities over all tokens (Lily as published: the output of a
            token depends on its batch); "sample": the mean over each index of the first dimension (x needs >= 3
            dimensions); "token": each token its own (causal, independent of the batch); "static": `weights [E]`.
        token_mask: bool `[..]`, False for tokens left out of the means (padding); without effect for "token", "static".
        active: the masked gradient: bool `[E]`, or one bool for all. An inactive expert takes part in the forward, its
            `B_e` gets a zero gradient (`active=False`: `B` gets None) and costs no gradient work.

    Returns: `[.., d_out]` in the dtype of `y`. Raises as `residual_add` does.

    Sources: Lily arXiv 2407.09946, EffiLoRA arXiv 2512.00878, HydraLoRA arXiv 2404.19245.
    """
    checks.tensors("routed_projection", y=y, x=x, A=A, B=B)
    x = like_stream(x, y)
    checks.activations("routed_projection", y, x)
    checks.down("routed_projection", A, x)
    checks.bank("routed_projection", B, y, A.shape[0])
    checks.router("routed_projection", x, A.shape[0], B.shape[0], R, weights, token_mask, active, routing, router_input)
    checks.scale_and_dropout("routed_projection", scale, dropout_p)
    backend = backends.select(y)
    tensors = [tensor for tensor in (y, x, A, B, R, weights) if tensor is not None]
    recording = recorded(*tensors)
    if inplace:
        names = (("x", x), ("A", A), ("B", B)) + ((("R", R),) if R is not None else ())
        checks.inplace("routed_projection", y, names, recording)
    p, seed = (float(dropout_p), dropout_seed(x.device)) if training and dropout_p > 0.0 else (0.0, None)
    if recording:
        mask = active if isinstance(active, Tensor) else None
        train_bank = active is not False
        return _RoutedProjection.apply(
            y, x, A, B, R, weights, token_mask, mask, float(scale), routing, router_input, inplace, train_bank, p, seed,
            backend,
        )  # fmt: skip
    ops = backends.namespace(backend)
    arguments = (x, A, B, R, weights, token_mask, scale, routing, router_input, p, seed)
    if inplace:
        ops.routed_projection_(y, *arguments)
        return _written(y)
    return ops.routed_projection(y, *arguments)[0]
