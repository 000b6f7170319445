"""The operations written as the papers' code writes them, with nothing shared with `lowrank_fast.reference`.

`residual_add` and `routed_projection` are the same-dtype PyTorch expressions of the accuracy rule: parameters are cast
to the dtype of the activations and every step rounds to it, as eager code does. In float64 they are a second truth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor


def with_dropout(x: Tensor, keep: Tensor | None, p: float) -> Tensor:
    return x if keep is None else x * keep / (1.0 - p)


def residual_add(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, keep: Tensor | None, p: float) -> Tensor:
    t = nnf.linear(with_dropout(x, keep, p), A.to(x.dtype))
    return y + scale * nnf.linear(t, B.to(x.dtype))


def router_probabilities(x: Tensor, t: Tensor, R: Tensor, router_input: str) -> Tensor:
    return nnf.softmax(nnf.linear(t if router_input == "t" else x, R.to(x.dtype)), dim=-1)


def _mean(p: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over the kept tokens of one sample: `p [.., E]` -> `[E]`."""
    kept = p.reshape(-1, p.shape[-1]) if token_mask is None else p[token_mask]
    return kept.mean(0) if kept.shape[0] else kept.sum(0)


def hydra_loop(y: Tensor, t: Tensor, B: Tensor, w: Tensor, scale: float) -> Tensor:
    """HydraLoRA's loop: one full-width product per expert, each scaled by its column of `w [.., E]`."""
    for e in range(B.shape[0]):
        y = y + scale * (w[..., e : e + 1] * nnf.linear(t, B[e]))
    return y


def lily_mix(y: Tensor, t: Tensor, B: Tensor, w: Tensor, scale: float) -> Tensor:
    """Lily's combination of the experts by one weight each, `w [E]`."""
    combined = torch.einsum("e,eor->or", w, B)
    return y + scale * nnf.linear(t, combined)


def routed_projection(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None,
    weights: Tensor | None,
    scale: float,
    routing: str,
    router_input: str,
    token_mask: Tensor | None,
    keep: Tensor | None,
    dropout_p: float,
) -> Tensor:
    t = nnf.linear(with_dropout(x, keep, dropout_p), A.to(x.dtype))
    bank = B.to(x.dtype)
    if routing == "static":
        assert weights is not None
        return lily_mix(y, t, bank, weights.to(x.dtype), scale)
    assert R is not None
    p = router_probabilities(x, t, R, router_input)
    if routing == "token":
        return hydra_loop(y, t, bank, p, scale)
    if routing == "batch":
        return lily_mix(y, t, bank, _mean(p, token_mask), scale)
    masks = [None] * y.shape[0] if token_mask is None else token_mask
    samples = [lily_mix(y[s], t[s], bank, _mean(p[s], masks[s]), scale) for s in range(y.shape[0])]
    return torch.stack(samples) if samples else y + 0.0 * (t.sum() + bank.sum() + p.sum())
