"""The three operations in plain PyTorch: the oracle for every kernel, and the fallback where there is none.

    residual add        out = y + s * (x A^T) B^T
    routed projection   out = y + s * sum_e w_e (x A^T) B_e^T

Shapes: `x [.., d_in]`, `y [.., d_out]`, `A [r, d_in]`, `B [d_out, r]` (routed: a bank `B [E, d_out, r]`),
`t = x A^T [.., r]`, router `R [E, r]` on `t` or `[E, d_in]` on `x`, weights `w`. The leading dimensions are tokens.

Every forward function is differentiable by autograd and works in any floating dtype; float64 on the CPU is the truth
that kernels are tested against. 16-bit tensors are multiplied in float32, and `t` stays in float32: what the kernels'
accumulators hold. The `*_backward` functions are the closed forms of design section 4, with the signatures of the ops
in `ops.py`; autograd of the forwards checks them in the tests. A gradient that is not asked for comes back empty.

Sources: LoR2C arXiv 2503.00572 (residual add), Lily arXiv 2407.09946 (batch routing, router on `t`),
HydraLoRA arXiv 2404.19245 and EffiLoRA arXiv 2512.00878 (token routing, router on `x`).
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUTINGS = ("batch", "sample", "token", "static")
ROUTER_INPUTS = ("t", "x")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype products are summed in: float32 for 16-bit tensors, else the dtype itself."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


# ------------------------------------------------------------------------------------------------ dropout

_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 32 x 32 bit product, in int64 arithmetic that never overflows."""
    low_part = (b & 0xFFFF) * a
    high_part = (b >> 16) * a + (low_part >> 16)
    return (high_part >> 16) & _U32, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC'11): four 32-bit words per counter, as int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mul_hi_lo(_PHILOX_MULTIPLIERS[0], c0)
        high1, low1 = _mul_hi_lo(_PHILOX_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _U32, (k1 + _PHILOX_WEYL[1]) & _U32
    return c0, c1, c2, c3


def dropout_threshold(p: float) -> int:
    """An element is dropped when its 32-bit random word is below this number."""
    return min(int(p * 2.0**32), _U32)


def dropout_mask(seed: Tensor, tokens: int, d: int, p: float) -> Tensor:
    """The keep mask `[tokens, d]` (bool) that every backend regenerates from `seed` (int64 `[2]`: key, stream).

    Column `64 q + 16 w + l` of row `i` takes word `w` of the Philox counter `(16 q + l, i mod 2^32, i >> 32, stream)`:
    sixteen neighbouring columns come from sixteen neighbouring counters, so that a vector register holds them in order.
    """
    blocks = (d + 63) // 64
    device = seed.device
    row = torch.arange(tokens, device=device, dtype=torch.int64)[:, None]
    column = torch.arange(16 * blocks, device=device, dtype=torch.int64)[None, :]
    counter = (column.expand(tokens, -1), (row & _U32).expand(-1, 16 * blocks), (row >> 32).expand(-1, 16 * blocks))
    words = philox((*counter, seed[1] & _U32), (seed[0] & _U32, (seed[0] >> 32) & _U32))
    random = torch.stack(words, -1).view(tokens, blocks, 16, 4).transpose(2, 3).reshape(tokens, 64 * blocks)
    return random[:, :d] >= dropout_threshold(p)


def dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """`x * mask / (1 - p)`: inverted dropout with an explicit keep mask; `x` itself without one."""
    return x if mask is None else x * mask.view(x.shape).to(x.dtype) * (1.0 / (1.0 - p))


def _mask_for(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor | None:
    if dropout_p == 0.0 or seed is None:
        return None
    d = x.shape[-1]
    return dropout_mask(seed, x.numel() // d, d, dropout_p).view(x.shape)


# ------------------------------------------------------------------------------------------------ residual add


def shrink(x: Tensor, A: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """`t = dropout(x) A^T  [.., r]`, in the accumulate dtype of `x`."""
    acc = accumulate_dtype(x.dtype)
    return dropped(x.to(acc), mask, dropout_p) @ A.to(acc).transpose(-1, -2)


def expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`out = y + scale * t B^T  [.., d_out]`, in the dtype of `y`."""
    acc = accumulate_dtype(y.dtype)
    return (y.to(acc) + scale * (t.to(acc) @ B.to(acc).transpose(-1, -2))).to(y.dtype)


def residual_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float = 1.0, mask: Tensor | None = None, dropout_p: float = 0.0
) -> Tensor:
    """`out = y + scale * (dropout(x) A^T) B^T  [.., d_out]`, in the dtype of `y`."""
    return expand_add(y, shrink(x, A, mask, dropout_p), B, scale)


def norm(out: Tensor, weight: Tensor, bias: Tensor | None, eps: float, layer: bool) -> Tensor:
    """RMSNorm (arXiv 1910.07467), or with `layer` LayerNorm (arXiv 1607.06450), over the last dimension of `out`."""
    weight = weight.to(out.dtype)
    if not layer:
        return torch.nn.functional.rms_norm(out, weight.shape, weight, eps)
    return torch.nn.functional.layer_norm(out, weight.shape, weight, None if bias is None else bias.to(out.dtype), eps)


# ------------------------------------------------------------------------------------------------ routing


def router_logits(x: Tensor, t: Tensor, A: Tensor, R: Tensor, router_input: str) -> Tensor:
    """`t R^T` or `x R^T  [.., E]`, in the accumulate dtype. A router on `x` sees it without dropout."""
    source = t if router_input == "t" else x
    acc = accumulate_dtype(x.dtype)
    return source.to(acc) @ R.to(acc).transpose(-1, -2)


def by_sample(x: Tensor, routing: str) -> Tensor:
    """`x [.., d]` as `[S, tokens, d]`: the first dimension is the sample for "sample", all is one sample otherwise."""
    samples = x.shape[0] if routing == "sample" else 1
    rows = x.numel() // x.shape[-1]
    return x.reshape(samples, rows // max(samples, 1), x.shape[-1])


def mean_over_tokens(p: Tensor, routing: str, token_mask: Tensor | None) -> Tensor:
    """Mean of the probabilities `p [.., E]` over the tokens `token_mask` keeps: `[E]` (batch) or `[S, E]` (sample).

    A sample (or a batch) whose every token is masked gets weights of zero.
    """
    rows = by_sample(p, routing)
    if token_mask is None:
        mean = rows.sum(1) / max(rows.shape[1], 1)
    else:
        keep = token_mask.reshape(rows.shape[:2]).to(p.dtype)
        mean = (rows * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp(min=1.0)
    return mean[0] if routing == "batch" else mean


def routing_weights(
    x: Tensor, t: Tensor, A: Tensor, R: Tensor, routing: str, router_input: str, token_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Probabilities `p = softmax(logits) [.., E]` and mixing weights: `[E]`, `[S, E]` or, per token, `p` itself."""
    p = torch.softmax(router_logits(x, t, A, R, router_input), -1)
    return p, p if routing == "token" else mean_over_tokens(p, routing, token_mask)


def mixed_bank(B: Tensor, w: Tensor, acc: torch.dtype) -> Tensor:
    """`sum_e w_e B_e`: `[d_out, r]` for weights `[E]`, `[S, d_out, r]` for weights `[S, E]`."""
    return torch.tensordot(w.to(acc), B.to(acc), dims=1)


def expand_add_routed(y: Tensor, t: Tensor, B: Tensor, w: Tensor, scale: float, routing: str) -> Tensor:
    """`out = y + scale * sum_e w_e t B_e^T`, with the weights that `routing` calls for."""
    acc = accumulate_dtype(y.dtype)
    if routing == "token":
        z = (w[..., :, None] * t[..., None, :]).flatten(-2)  # [.., E r]
        return expand_add(y, z, bank_as_matrix(B), scale)
    mix = mixed_bank(B, w, acc)
    if routing == "sample":
        return expand_add(by_sample(y, routing), by_sample(t, routing), mix, scale).reshape(y.shape)
    return expand_add(y, t, mix, scale)


def bank_as_matrix(B: Tensor) -> Tensor:
    """The bank `[E, d_out, r]` as the factor `[d_out, E r]` of one rank-`E r` update."""
    return B.transpose(0, 1).flatten(1)


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
    active: Tensor | None = None,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`out = y + scale * sum_e w_e (dropout(x) A^T) B_e^T  [.., d_out]`, in the dtype of `y`.

    `active [E]` (bool): an inactive expert takes part, but autograd sees its `B_e` as a constant.
    """
    if active is not None:
        B = torch.where(active[:, None, None], B, B.detach())
    t = shrink(x, A, mask, dropout_p)
    if routing == "static":
        assert weights is not None
        w = weights
    else:
        assert R is not None
        _, w = routing_weights(x, t, A, R, routing, router_input, token_mask)
    return expand_add_routed(y, t, B, w.to(t.dtype), scale, routing)
