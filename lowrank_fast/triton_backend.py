"""The backend `triton`: every op of `ops.py` as a handful of launches of the kernels in `triton_kernels/`.

Runs CUDA, ROCm and XPU tensors, and CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`, before the first
import). Launches are planned from shapes alone (no device query, no host synchronisation, nothing cached by
pointer), so CUDA graphs can capture them. What each op launches:

| op | launches |
|---|---|
| residual add, T <= 128 or T > 2048 | 1 (F2, F1) |
| residual add, middle T | 2: split-K shrink, expand (F3) |
| routed projection, T <= 128 | 1 |
| routed projection | 2: shrink with router, expand with the bank mixed per program (F4, F5) |
| backward | 3: up (or a row kernel), down, reduce; 1 when `x` alone needs a gradient |

Ranks above 128 come in pieces, each with launches of its own.

Signatures are those of `ops.SCHEMAS`; a result that was not asked for is an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .reference import norm
from .triton_loader import kernels, plan, plan_backward, unavailable_reason

__all__ = ["kernels", "plan", "plan_backward", "unavailable_reason"]  # beside the ops themselves


# ------------------------------------------------------------------------------------------------ shared pieces


def _wide() -> ModuleType:
    from . import triton_wide  # it builds on the functions below

    return triton_wide


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or like.dtype)


def _hidden(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width), dtype=torch.float32)


# ------------------------------------------------------------------------------------------------ residual add, forward


def residual_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> tuple[Tensor, Tensor]:
    """`out = y + scale * dropout(x) A^T B^T`, and `t` for backward."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, out=out)


def residual_add_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> Tensor:
    """`residual_add` over `y`."""
    return residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, out=y)


def residual_add_out(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool,
    *, out: Tensor,
) -> Tensor:  # fmt: skip
    """`residual_add` into `out`, which may be `y` itself."""
    t = _hidden(x, A.shape[0]) if save_t else _empty(x, torch.float32)
    with Target(out) as target:
        _residual_add(plan().as_rows(y), plan().as_rows(x), A, B, target, t if save_t else None, scale, dropout_p, seed)
    return t


class Target:
    """`[.., d]` as a `[T, d]` that can be written; copied back at the end where strides forbid a view."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        flat = out.reshape(-1, out.shape[-1])
        self.direct = flat.data_ptr() == out.data_ptr() and (flat.stride(1) == 1 or flat.shape[1] == 1)
        self.rows = flat if self.direct else torch.empty(flat.shape, dtype=out.dtype, device=out.device)

    def __enter__(self) -> Tensor:
        return self.rows

    def __exit__(self, *error: object) -> None:
        if not self.direct:
            self.out.copy_(self.rows.view(self.out.shape))


def _residual_add(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    out: Tensor,
    t: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
) -> None:
    T, rank = x.shape[0], A.shape[0]
    if T == 0 or out.shape[1] == 0:
        return
    if rank > plan().table.WIDEST:
        for part in plan().chunks(rank):
            hidden = x.new_empty((T, part.stop - part.start), dtype=torch.float32)
            _residual_add(y, x, A[part], B[:, part], out, hidden, scale, p, seed)
            if t is not None:
                t.view(T, rank)[:, part] = hidden
            y = out
        return
    drop, threshold, keep_scale = plan().dropout(p, seed)
    seed = seed if drop else None
    if T <= plan().table.SMALL or T > plan().table.MIDDLE:
        plan().fused(
            "residual_add", x, A, y, B, out, t, keep_scale, scale, seed, threshold, "input" if drop else "none"
        )
        return
    arch = plan().place("residual_add", x)
    parts = plan().segment(x.shape[1], plan().pick("shrink", arch, x, plan().padded(rank), T))[1]
    hidden = x.new_empty((parts, T, rank), dtype=torch.float32)
    plan().shrink("residual_add", x, A, hidden, keep_scale, seed, threshold, parts=parts)
    scale_t = keep_scale if parts > 1 else 1.0
    plan().expand("residual_add", y, hidden, B, out, scale, parts=parts, scale_t=scale_t, t_out=t)


def residual_add_norm(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    layer: bool,
) -> tuple[Tensor, Tensor]:
    """`out = y + scale * x A^T B^T` and its norm: RMSNorm, or LayerNorm with `layer`, in one launch; for ranks above
    128 PyTorch's norm comes after the launches of `residual_add`.

    `weight [d_out]`, `bias [d_out]` or None, `eps` as in `torch.nn.LayerNorm`.
    """
    op = "residual_add_norm"
    launch, arch = kernels("launch"), plan().place(op, x, A, y, B, weight, bias)
    rank, T, N = A.shape[0], x.numel() // max(x.shape[-1], 1), y.shape[-1]
    if rank > plan().table.WIDEST:
        out = residual_add(y, x, A, B, scale, 0.0, None, False)[0]
        return out, norm(out, weight, bias, eps, layer)
    if weight.shape != (N,) or (bias is not None and bias.shape != (N,)):
        raise ValueError(f"{op}: weight and bias must be [d_out={N}]; got {list(weight.shape)}")
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    normed = torch.empty_like(out)
    rows, stream = plan().as_rows(x), plan().as_rows(y)
    # Few rows for each program: it comes back to its rows of `out`, and finds them in L2.
    tile = plan().pick("residual_add", arch, x, plan().padded(rank), min(T, plan().table.MIDDLE))
    launch.run(
        launch.Launch(
            "residual_add_norm_kernel",
            kernels("norm").residual_add_norm_kernel,
            (plan().cdiv(T, tile.rows), 1, 1),
            (
                rows, A, stream, B, weight.contiguous(), None if bias is None else bias.contiguous(), out, normed,
                T, rows.shape[1], N, rows.stride(0), stream.stride(0), plan().segment(rows.shape[1], tile)[0],
                float(scale), float(eps),
            ),
            dict(
                SA_R=A.stride(0), SA_D=A.stride(1), SB_N=B.stride(0), SB_R=B.stride(1), RANK=rank,
                RP=plan().padded(rank), LAYER=layer,
                HAS_BIAS=bias is not None, BM=tile.rows, BK=tile.inner, BN=tile.cols, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip
    return out, normed


# ------------------------------------------------------------------------------------------------ the two halves


def shrink(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`t = dropout(x) A^T [.., r]` in float32."""
    t = _hidden(x, A.shape[0])
    drop, threshold, keep_scale = plan().dropout(dropout_p, seed)
    if x.numel() // max(x.shape[-1], 1):
        for part in plan().chunks(A.shape[0]):
            width = part.stop - part.start
            hidden = t if width == A.shape[0] else _hidden(x, width)
            plan().shrink("shrink", plan().as_rows(x), A[part], hidden, keep_scale, seed if drop else None, threshold)
            if hidden is not t:
                t[..., part] = hidden
    return t


def expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float) -> Tensor:
    """`y + scale * t B^T`."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    _expand_add(y, t, B, scale, out)
    return out


def expand_add_(y: Tensor, t: Tensor, B: Tensor, scale: float) -> None:
    """`expand_add` over `y`."""
    _expand_add(y, t, B, scale, y)


def _expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float, out: Tensor) -> None:
    with Target(out) as target:
        source = plan().as_rows(y)
        for part in plan().chunks(B.shape[1]) if target.numel() else []:
            plan().expand("expand_add", source, plan().as_rows(t)[:, part].contiguous(), B[:, part], target, scale)
            source = target


def shrink_backward(
    dt: Tensor, x: Tensor | None, A: Tensor, dropout_p: float, seed: Tensor | None, dx_dtype: torch.dtype,
    need_dx: bool, need_dA: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dx = dropout(dt A)` and `dA = dt^T dropout(x)`."""
    if A.shape[0] > plan().table.WIDEST:
        pieces = [
            shrink_backward(dt[..., part].contiguous(), x, A[part], dropout_p, seed, dx_dtype, need_dx, need_dA)
            for part in plan().chunks(A.shape[0])
        ]
        return _joined(pieces, (None, 0))
    state = plan_backward().Backward("shrink_backward", dt, x, A, None, dropout_p, seed, dx_dtype)
    state.u, state.parts = plan().as_rows(dt).contiguous(), 1
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    state.down(dx, need_dA)
    state.reduce(dA=dA if need_dA else None)
    return dx, dA


def expand_add_backward(
    g: Tensor, t: Tensor, B: Tensor, scale: float, need_dt: bool, need_dB: bool
) -> tuple[Tensor, Tensor]:
    """`dt = scale * g B` in float32 and `dB = scale * g^T t`."""
    if B.shape[1] > plan().table.WIDEST:
        pieces = [
            expand_add_backward(g, t[..., part].contiguous(), B[:, part], scale, need_dt, need_dB)
            for part in plan().chunks(B.shape[1])
        ]
        return _joined(pieces, (-1, 1))
    dt = _hidden(g, B.shape[1]) if need_dt else _empty(g, torch.float32)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    rows = plan().as_rows(g)
    if need_dt and rows.shape[0]:
        plan().shrink("expand_add_backward", rows, B.mT, dt, scale, None, 0)
    if need_dB:
        state = plan_backward().Backward("expand_add_backward", g, None, None, B, 0.0, None, g.dtype)
        state.t, state.scale = plan().as_rows(t).contiguous(), scale
        state.up(emit_u=False, need_dB=True)
        state.reduce(dB=dB)
    return dt, dB


def _joined(pieces: Sequence[tuple[Tensor, ...]], dims: tuple[int | None, ...]) -> Any:
    """Results of chunks of the rank as one: added where the dimension is None, else concatenated along it."""
    results = []
    for values, dim in zip(zip(*pieces, strict=True), dims, strict=True):
        if values[0].numel() == 0:
            results.append(values[0])
        else:
            results.append(torch.cat(values, dim) if dim is not None else functools.reduce(torch.add, values))
    return tuple(results)


# ------------------------------------------------------------------------------------------------ backward


def residual_add_backward(
    g: Tensor, x: Tensor | None, t: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_dA: bool, need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`u = scale * g B`, `dx = u A`, `dA = u^T x`, `dB = scale * g^T t`."""
    if A.shape[0] > plan().table.WIDEST:
        pieces = [
            residual_add_backward(
                g, x, t[..., part].contiguous(), A[part], B[:, part], scale, dropout_p, seed, need_dx, need_dA, need_dB
            )
            for part in plan().chunks(A.shape[0])
        ]  # fmt: skip
        return _joined(pieces, (None, 0, 1))
    state = plan_backward().Backward("residual_add_backward", g, x, A, B, dropout_p, seed, g.dtype)
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    if state.T == 0:
        return dx, dA.zero_(), dB.zero_()
    state.t, state.scale = plan().as_rows(t).contiguous() if need_dB else None, scale
    if need_dx and not (need_dA or need_dB):
        rows = dx.view(-1, dx.shape[-1])
        drop = "output" if state.seed is not None else "none"
        plan().fused(
            state.op, state.g, B.mT, None, A.mT, rows, None, scale, state.keep_scale, state.seed, state.threshold, drop
        )
        return dx, dA, dB
    need_u = need_dx or need_dA
    state.up(emit_u=need_u, need_dB=need_dB)
    if need_u:
        state.down(dx, need_dA)
    state.reduce(dA=dA if need_dA else None, dB=dB if need_dB else None)
    return dx, dA, dB


# ------------------------------------------------------------------------------------------------ routed projection


def routed_projection(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None, token_mask: Tensor | None,
    scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`out = y + scale * sum_e w_e t B_e^T`, with `t`, `p` and `w` for backward."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    arguments = (A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
    return out, *_routed_projection(y, x, out, *arguments)


def routed_projection_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None, token_mask: Tensor | None,
    scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`routed_projection` over `y`."""
    arguments = (A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
    return _routed_projection(y, x, y, *arguments)


def _routed_projection(
    y: Tensor, x: Tensor, out: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None,
    token_mask: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "routed_projection"
    if A.shape[0] > plan().table.WIDEST:
        arguments = (A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
        return _wide().routed_projection(y, x, out, *arguments)
    experts = B.shape[0]
    static, token = routing == "static", routing == "token"
    groups = x.shape[0] if routing == "sample" else 1
    t = _hidden(x, A.shape[0])
    p = _empty(t) if static else _hidden(x, experts)
    w = t.new_empty(0 if token else (groups, experts) if routing == "sample" else (experts,))
    rows, hidden = plan().as_rows(x), t.view(-1, A.shape[0])
    given = weights.contiguous() if static and weights is not None else None
    if rows.shape[0] == 0:
        return t, p, w.zero_() if given is None else w.copy_(given)
    drop, threshold, keep_scale = plan().dropout(dropout_p, seed)
    seed = seed if drop else None
    means = not (static or token)
    mask = token_mask.reshape(-1).contiguous().view(torch.uint8) if means and token_mask is not None else None
    probabilities, router = (None, "none") if static else (p, router_input)
    with Target(out) as target:
        source = plan().as_rows(y)
        if target.numel() and plan().fits_small(rows, A, B):
            plan().routed_small(
                op, source, rows, A, B, R, given, mask, target, hidden, probabilities, None if token else w, scale,
                keep_scale, seed, threshold, router=router, groups=groups,
            )  # fmt: skip
            return t, p, w
        sums, counts, blocks = plan().shrink(
            op, rows, A, hidden, keep_scale, seed, threshold, R=R, router=router, p=probabilities, groups=groups,
            means=means, token_mask=mask,
        )  # fmt: skip
        if token:
            plan().expand(op, source, hidden, B, target, scale, mix="token", p=p)
        elif static:
            plan().expand(op, source, hidden, B, target, scale, mix="weights", w=given, w_out=w)
        else:
            plan().expand(
                op, source, hidden, B, target, scale, mix="sums", sums=sums, counts=counts, blocks=blocks,
                groups=groups, w_out=w,
            )  # fmt: skip
    return t, p, w


def routed_projection_backward(
    g: Tensor, x: Tensor | None, t: Tensor, p: Tensor, w: Tensor, A: Tensor, B: Tensor, R: Tensor | None,
    token_mask: Tensor | None, active: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx, dA, dB, dR, dweights` by design section 4: one shared `G` for mixed banks, rank `E r` for token routing."""
    need_dx, need_dA, need_dB, need_dR, need_dweights = needs
    if A.shape[0] > plan().table.WIDEST and g.numel():
        state_arguments = (t, p, w, A, B, R, token_mask, active, scale, routing, router_input, dropout_p, seed, needs)
        return _wide().routed_projection_backward(g, x, *state_arguments)
    state = plan_backward().Backward("routed_projection_backward", g, x, A, B, dropout_p, seed, g.dtype)
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    dR = torch.empty_like(R) if need_dR and R is not None else _empty(A)
    dweights = w.new_empty(state.experts) if need_dweights else _empty(w)
    if state.T == 0:
        return dx, dA.zero_(), dB.zero_(), dR.zero_(), dweights.zero_()
    token = routing == "token"
    state.t, state.scale, state.w = t.view(-1, A.shape[0]), scale, w
    state.groups = g.shape[0] if routing == "sample" else 1
    state.mix = "token" if token else "weights"
    state.active = None if active is None or not need_dB else active.contiguous().view(torch.uint8)
    need_u = need_dx or need_dA
    learned = routing != "static" and (need_dR or need_dx or (router_input == "t" and need_dA))
    if routing != "static":
        state.p = p.view(-1, state.experts)
    if learned:
        state.routed, state.router, state.R = "token" if token else "mean", router_input, R
        if token_mask is not None and not token:
            keep = token_mask.reshape(state.groups, -1)
            state.token_mask, state.counts = keep.contiguous().view(torch.uint8), keep.sum(1, dtype=torch.float32)
    need_u |= token and need_dR  # the row programs that write it have the gradient of the probabilities
    if need_u or need_dB or need_dweights or learned:
        state.up(emit_u=need_u, need_dB=need_dB, need_dw=not token and (need_dweights or learned))
    state.down(dx, need_dA, need_dR=need_dR)
    state.reduce(
        dA=dA if need_dA else None, dB=dB if need_dB else None, dR=dR if need_dR else None,
        dweights=dweights if need_dweights else None,
    )  # fmt: skip
    return dx, dA, dB, dR, dweights
