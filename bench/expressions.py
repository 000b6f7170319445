"""The baselines as plain PyTorch expressions, every one the same formula as our ops.

    residual add    out = y + s (x A^T) B^T
    batch routing   out = y + s (x A^T) mix,   mix = sum_e w_e B_e^T,   w = mean over tokens of softmax(t R^T)
    token routing   out = y + s sum_e w_e (x A^T) B_e^T,   w = softmax(x R^T) per token

`x [T, d_in]`, `y [T, d_out]`, `A [r, d_in]`, `B [d_out, r]`. Lily's bank is stored as PEFT stores it, `[E r, d_out]`.
The functions named `*_out` write into `out`, those named `*_inplace` into `y`; `t` and `u` are scratch `[T, r]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------------ residual add


def residual_naive(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """What people write."""
    return y + s * ((x @ A.T) @ B.T)


def residual_naive_out(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, out: Tensor) -> Tensor:
    return torch.add(y, s * ((x @ A.T) @ B.T), out=out)


def residual_naive_inplace(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return y.add_(s * ((x @ A.T) @ B.T))


def residual_addmm(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """Two GEMMs; the scale and the add ride in the second one's epilogue."""
    return torch.addmm(y, x @ A.T, B.T, alpha=s)


def residual_addmm_out(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, out: Tensor, t: Tensor) -> Tensor:
    return torch.addmm(y, torch.mm(x, A.T, out=t), B.T, alpha=s, out=out)


def residual_addmm_inplace(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, t: Tensor) -> Tensor:
    return y.addmm_(torch.mm(x, A.T, out=t), B.T, alpha=s)


def residual_mm_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The scale on `t`, a GEMM without an addend, an in-place add: `addmm(out=)` copies `y` first, this does not."""
    return ((x @ A.T).mul_(s) @ B.T).add_(y)


def residual_mm_add_out(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, out: Tensor, t: Tensor) -> Tensor:
    return torch.mm(torch.mm(x, A.T, out=t).mul_(s), B.T, out=out).add_(y)


Gradients = tuple[Tensor, Tensor, Tensor]


def residual_backward_mm(
    g: Tensor, x: Tensor, ts: Tensor, A: Tensor, Bs: Tensor, into: Gradients, u: Tensor
) -> Gradients:
    """`dx [T, d_in], dA [r, d_in], dB [d_out, r]` by four GEMMs; `ts = s t` and `Bs = s B` are made before."""
    dx, dA, dB = into
    torch.mm(g, Bs, out=u)
    torch.mm(u, A, out=dx)
    torch.mm(u.T, x, out=dA)
    torch.mm(g.T, ts, out=dB)
    return into


def residual_backward_mm_transposed(
    g: Tensor, x: Tensor, ts: Tensor, A: Tensor, Bs: Tensor, into: Gradients, u: Tensor, dBt: Tensor
) -> Gradients:
    """The same with `dB` computed as its transpose `[r, d_out]`, faster in the BLAS for large `T`, then copied."""
    dx, dA, dB = into
    torch.mm(g, Bs, out=u)
    torch.mm(u, A, out=dx)
    torch.mm(u.T, x, out=dA)
    dB.copy_(torch.mm(ts.T, g, out=dBt).T)
    return into


# ------------------------------------------------------------------------------------------------ batch routing (Lily)


def batch_naive(y: Tensor, x: Tensor, A: Tensor, R: Tensor, bank: Tensor, s: float) -> Tensor:
    """Mixed with a weighted sum over a broadcast bank, then the residual add."""
    t = x @ A.T
    w = torch.softmax(t @ R.T, -1).mean(0)
    mix = (w[:, None, None] * bank.view(R.shape[0], A.shape[0], -1)).sum(0)
    return y + s * (t @ mix)


def batch_peft(y: Tensor, x: Tensor, A: Tensor, R: Tensor, bank: Tensor, s: float) -> Tensor:
    """The expression of PEFT's `peft.tuners.lily` layer, term by term, with `y` as the base layer's result."""
    experts = R.shape[0]
    B = bank.reshape(experts, -1, bank.shape[1])
    hidden = torch.nn.functional.linear(x, A)
    probability = torch.softmax(torch.nn.functional.linear(hidden, R), dim=-1)
    weights = probability.reshape(-1, experts).mean(dim=0)
    combined = torch.einsum("e,eio->io", weights, B)
    return y + (torch.matmul(hidden, combined) * s).to(y.dtype)


def _batch_mix(t: Tensor, R: Tensor, bank: Tensor) -> Tensor:
    experts, rank = R.shape
    w = torch.softmax(t @ R.T, -1).mean(0)
    return (w @ bank.view(experts, -1)).view(rank, -1)


def batch_addmm(y: Tensor, x: Tensor, A: Tensor, R: Tensor, bank: Tensor, s: float) -> Tensor:
    """Lily's best hand-written form: the mix as one matrix-vector product, the update in the epilogue of one GEMM."""
    t = x @ A.T
    return torch.addmm(y, t, _batch_mix(t, R, bank), alpha=s)


def batch_addmm_inplace(y: Tensor, x: Tensor, A: Tensor, R: Tensor, bank: Tensor, s: float, t: Tensor) -> Tensor:
    torch.mm(x, A.T, out=t)
    return y.addmm_(t, _batch_mix(t, R, bank), alpha=s)


def batch_naive_inplace(y: Tensor, x: Tensor, A: Tensor, R: Tensor, bank: Tensor, s: float) -> Tensor:
    t = x @ A.T
    w = torch.softmax(t @ R.T, -1).mean(0)
    return y.add_(s * (t @ (w[:, None, None] * bank.view(R.shape[0], A.shape[0], -1)).sum(0)))


# ------------------------------------------------------------------------------------------------ token routing


def token_naive(y: Tensor, x: Tensor, A: Tensor, R: Tensor, *rest: Tensor | float) -> Tensor:
    """A loop over the experts with `t` hoisted out of it; `rest` is `B_0 .. B_{E-1}, s`."""
    *experts, s = rest
    t = x @ A.T
    w = torch.softmax((x @ R.T).float(), -1).to(x.dtype)
    delta = w[:, 0, None] * (t @ experts[0].T)  # type: ignore[union-attr]
    for e, B in enumerate(experts[1:], 1):
        delta = delta + w[:, e, None] * (t @ B.T)  # type: ignore[union-attr]
    return y + s * delta


def token_hydra(y: Tensor, x: Tensor, A: Tensor, R: Tensor, *rest: Tensor | float) -> Tensor:
    """HydraLoRA's published loop: `A` is applied once per expert and the result is re-added once per expert."""
    *experts, s = rest
    w = torch.softmax((x @ R.T).float(), -1).to(x.dtype)
    for e, B in enumerate(experts):
        y = y + w[:, e, None] * ((x @ A.T) @ B.T) * s  # type: ignore[union-attr]
    return y


def _token_z(x: Tensor, AR: Tensor, bank: Tensor) -> Tensor:
    rank = bank.shape[1]
    tr = x @ AR.T
    t, logits = tr[:, :rank], tr[:, rank:]
    w = torch.softmax(logits.float(), -1).to(x.dtype)
    return (w[:, :, None] * t[:, None, :]).flatten(1)  # [T, E r]


def token_concat(y: Tensor, x: Tensor, AR: Tensor, bank: Tensor, s: float) -> Tensor:
    """One rank-`E r` update: `AR [r + E, d_in]` is `A` with the router below it, `bank [E, r, d_out]`."""
    return torch.addmm(y, _token_z(x, AR, bank), bank.flatten(0, 1), alpha=s)


def token_concat_inplace(y: Tensor, x: Tensor, AR: Tensor, bank: Tensor, s: float) -> Tensor:
    return y.addmm_(_token_z(x, AR, bank), bank.flatten(0, 1), alpha=s)


def token_naive_inplace(y: Tensor, x: Tensor, A: Tensor, R: Tensor, *rest: Tensor | float) -> Tensor:
    *experts, s = rest
    t = x @ A.T
    w = torch.softmax((x @ R.T).float(), -1).to(x.dtype)
    for e, B in enumerate(experts):
        y.add_((s * w[:, e, None]) * (t @ B.T))  # type: ignore[union-attr]
    return y
