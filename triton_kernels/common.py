"""Device functions that every kernel shares: products, dropout, softmax, router gradients.

Shapes are padded inside: a rank `r` to `RP = max(16, next power of two)` because a matrix instruction takes 16
values of its inner dimension, `E` experts to `EP` in the same way. Padding is masked to zero where it is read, so
that it adds nothing to any product. Rows are 64-bit everywhere: `rows * stride` passes 2^31 at 524,288 rows of 4,096.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

PRECISION_VARIABLE = "LOWRANK_FAST_TRITON_PRECISION"
_PRECISIONS = ("bf16x6", "ieee")
_precision = os.environ.get(PRECISION_VARIABLE) or "bf16x6"
if _precision not in _PRECISIONS:
    raise RuntimeError(f"{PRECISION_VARIABLE} must be one of {', '.join(_PRECISIONS)}; got {_precision!r}")
FLOAT32_PRECISION = tl.constexpr(_precision)  # of products; the compiler's cache knows it


@triton.jit
def product(a, b, acc):
    """`acc + a @ b`, summed in float32.

    Float32 operands keep their 24 bits on matrix instructions: each is the sum of three bfloat16 values, six of the
    nine products are summed smallest first (the other three are below 2^-26), and the sum is added to `acc`
    outside the matrix instruction, whose own additions truncate. TF32 would keep 11 bits. IEEE products, which
    `LOWRANK_FAST_TRITON_PRECISION=ieee` asks for, have no matrix instruction on NVIDIA: they are fused multiply-adds.
    """
    return tl.dot(a, b, acc, input_precision=FLOAT32_PRECISION)


@triton.jit
def load_rows(base, rows, cols, stride, n_rows, n_cols):
    """Tile `[BM, BC]` of a row-major tensor, read once: first in line to leave the cache."""
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    return tl.load(base + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_factor(base, rank, cols, stride_rank: tl.constexpr, stride_col: tl.constexpr, n_rank, n_cols):
    """Tile `[RP, BC]` of a factor (`A`, or `B` transposed), zero beyond the rank; stays in the cache.

    The offset is 64-bit: a factor `[r, d]` is small, but its view inside a larger bank need not be.
    """
    offset = rank.to(tl.int64)[:, None] * stride_rank + cols.to(tl.int64)[None, :] * stride_col
    mask = (rank < n_rank)[:, None] & (cols < n_cols)[None, :]
    return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
def load_factor_transposed(
    base, rank, cols, stride_rank: tl.constexpr, stride_col: tl.constexpr, n_rank: tl.constexpr, n_cols
):
    """The same tile as `[BC, RP]`."""
    offset = cols.to(tl.int64)[:, None] * stride_col + rank.to(tl.int64)[None, :] * stride_rank
    mask = (cols < n_cols)[:, None] & (rank < n_rank)[None, :]
    return tl.load(base + offset, mask=mask, other=0.0)


@triton.jit
def keep_mask(seed, rows, start, threshold, BM: tl.constexpr, BC: tl.constexpr):
    """Dropout's keep mask `[BM, BC]` for columns `start ..`; `BC` is 32 or a multiple of 64, `start` a multiple of it.

    Column `64 q + 16 w + l` of row `i` takes word `w` of Philox4x32-10 at counter `(16 q + l, i mod 2^32, i >> 32,
    stream)`, the layout of `reference.dropout_mask`: one counter gives four columns, 16 apart, of which 32 columns use
    two.
    """
    COUNTERS: tl.constexpr = BC // 4 if BC >= 64 else 16
    key = tl.load(seed)
    stream = tl.load(seed + 1)
    zero = tl.zeros([BM, COUNTERS], tl.int32)
    column = zero + (start // 64 * 16 + tl.arange(0, COUNTERS))[None, :]
    low = zero + (rows & 0xFFFFFFFF).to(tl.int32)[:, None]
    high = zero + (rows >> 32).to(tl.int32)[:, None]
    last = zero + (stream & 0xFFFFFFFF).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(key, column, low, high, last)
    limit = tl.cast(threshold, tl.uint32)
    pair0 = tl.join((w0 >= limit).to(tl.int8), (w1 >= limit).to(tl.int8))
    pair1 = tl.join((w2 >= limit).to(tl.int8), (w3 >= limit).to(tl.int8))
    if BC >= 64:
        words = tl.reshape(tl.join(pair0, pair1), [BM, BC // 64, 16, 2, 2])  # [row, q, l, w & 1, w >> 1]
        keep = tl.reshape(tl.permute(words, [0, 1, 4, 3, 2]), [BM, BC])
    else:
        pair = tl.where(start % 64 == 0, pair0, pair1)  # [row, l, w & 1]
        keep = tl.reshape(tl.permute(pair, [0, 2, 1]), [BM, BC])
    return keep != 0


@triton.jit
def softmax_experts(logits, experts, E: tl.constexpr):
    """Softmax over the first `E` columns of `logits [BM, EP]` in float32; zero beyond."""
    valid = (experts < E)[None, :]
    logits = tl.where(valid, logits, float("-inf"))
    exponent = tl.exp(logits - tl.max(logits, 1)[:, None])
    return tl.where(valid, exponent / tl.sum(exponent, 1)[:, None], 0.0)
