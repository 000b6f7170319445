"""Residual add with the next normalisation: `out = y + s t B^T` and `RMSNorm(out)` or `LayerNorm(out)` in one launch.

A program owns `BM` rows: it shrinks `x` to `t` in registers, writes `out` tile by tile while it sums what the norm
needs, and walks the rows once more to write the normalised result. That second read of `out` is of what the program
has just written: `BM * d_out` values, 256 KB at the most, which L2 still holds. 4 passes reach DRAM (read `x` and
`y`, write `out` and the normalised `out`) where a norm of its own makes 5.

The mean of squares (and, for LayerNorm, the mean) is of the values before they are rounded to the dtype of `out`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_factor, load_rows, product
from .shrink import shrink_rows


@triton.jit(do_not_specialize=["T", "segment"])
def residual_add_norm_kernel(
    x, A, y, B, weight, bias, out, normed,
    T, D, N, sx, sy, segment, scale, eps,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr,
    LAYER: tl.constexpr, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP)
    dtype = out.dtype.element_ty
    t, _ = shrink_rows(
        x, A, None, None, rows, T, D, sx, 0, tl.cdiv(D, BK), segment, 0,
        SA_R, SA_D, 0, 0, RANK, RP, 1, 1, False, False, BM, BK, STAGES,
    )  # fmt: skip
    left = t.to(dtype)
    count = tl.zeros([BM], tl.float32)
    mean = tl.zeros([BM], tl.float32)
    squares = tl.zeros([BM], tl.float32)
    for begin in tl.range(0, N, BN, num_stages=STAGES):
        cols = begin + tl.arange(0, BN)
        inside = (cols < N)[None, :]
        b_tile = load_factor(B, rank, cols, SB_R, SB_N, RANK, N).to(dtype)  # [RP, BN]
        value = product(left, b_tile, tl.zeros([BM, BN], tl.float32)) * tl.cast(scale, tl.float32)
        value += load_rows(y, rows, cols, sy, T, N).to(tl.float32)
        tl.store(out + rows[:, None] * N + cols[None, :], value.to(dtype), mask=(rows < T)[:, None] & inside)
        if LAYER:
            # Chan's update of mean and squares about it: the sums of squares of large means do not cancel.
            width = tl.minimum(N - begin, BN).to(tl.float32)
            here = tl.sum(tl.where(inside, value, 0.0), 1) / width
            away = tl.where(inside, value - here[:, None], 0.0)
            total = count + width
            shift = here - mean
            squares += tl.sum(away * away, 1) + shift * shift * count * width / total
            mean += shift * width / total
            count = total
        else:
            squares += tl.sum(tl.where(inside, value * value, 0.0), 1)
    inverse = 1.0 / tl.sqrt(squares / N + tl.cast(eps, tl.float32))
    # One program's threads wrote what they now read, in other layouts: every write must be visible first.
    tl.debug_barrier()
    for begin in tl.range(0, N, BN, num_stages=STAGES):
        cols = begin + tl.arange(0, BN)
        mask = (rows < T)[:, None] & (cols < N)[None, :]
        value = tl.load(out + rows[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        gain = tl.load(weight + cols, mask=cols < N, other=0.0).to(tl.float32)
        value = (value - mean[:, None]) * inverse[:, None] * gain[None, :]
        if HAS_BIAS:
            value += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
        tl.store(normed + rows[:, None] * N + cols[None, :], value.to(dtype), mask=mask)
