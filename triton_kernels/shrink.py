"""Shrink, `t = x A^T [T, r]`, with the router's softmax and its column sums while `t` is in registers.

A program owns `BM` rows of one group of rows (one sample with `routing="sample"`, else the whole call) and one run
of `D`:

* no split: `t` is final. With a router, `p = softmax(t R^T)` or `softmax(x R^T)` is written beside it, and each program
  leaves the sum of its kept rows' `p` (`sums [groups, blocks, EP]`) and their number (`counts [groups, blocks]`), from
  which `expand.py` takes the mean: no atomics, one order.
* split-K (middle T): the second grid dimension takes one of `SEGMENTS` fixed runs of `D` and writes a partial
  `[S, T, r]`, which `expand.py` adds in order. The same runs are added in the same order without a split.

DRAM: one pass over `x`; `t` and `p` are `T (r + E)` floats.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import keep_mask, load_factor_transposed, load_rows, product, softmax_experts


@triton.jit
def shrink_rows(
    x, A, R, seed, rows, end, D, sx, first, last, segment, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    DROPOUT: tl.constexpr, ROUTER_ON_X: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`dropout(x) A^T [BM, RP]` and `x R^T [BM, EP]` over the tiles `first .. last` of `D`, in runs of `segment`
    tiles."""
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    total = tl.zeros([BM, RP], tl.float32)
    run = tl.zeros([BM, RP], tl.float32)
    logits = tl.zeros([BM, EP], tl.float32)
    for tile in tl.range(first, last, num_stages=STAGES):
        cols = tile * BK + tl.arange(0, BK)
        x_tile = load_rows(x, rows, cols, sx, end, D)  # [BM, BK]
        if ROUTER_ON_X:
            r_tile = load_factor_transposed(R, experts, cols, SR_E, SR_D, E, D).to(x_tile.dtype)  # [BK, EP]
            logits = product(x_tile, r_tile, logits)
        if DROPOUT:
            x_tile = tl.where(keep_mask(seed, rows, tile * BK, threshold, BM, BK), x_tile, 0.0)
        a_tile = load_factor_transposed(A, rank, cols, SA_R, SA_D, RANK, D).to(x_tile.dtype)  # [BK, RP]
        run = product(x_tile, a_tile, run)
        if (tile + 1) % segment == 0:
            total += run
            run = tl.zeros([BM, RP], tl.float32)
    return total + run, logits


@triton.jit
def router_on_input(
    x, R, rows, end, D, sx, SR_E: tl.constexpr, SR_D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`x R^T [BM, EP]`, in the order of `shrink_rows`, by a walk of its own."""
    experts = tl.arange(0, EP)
    logits = tl.zeros([BM, EP], tl.float32)
    for tile in tl.range(0, tl.cdiv(D, BK), num_stages=STAGES):
        cols = tile * BK + tl.arange(0, BK)
        x_tile = load_rows(x, rows, cols, sx, end, D)  # [BM, BK]
        r_tile = load_factor_transposed(R, experts, cols, SR_E, SR_D, E, D).to(x_tile.dtype)  # [BK, EP]
        logits = product(x_tile, r_tile, logits)
    return logits


@triton.jit(do_not_specialize=["T", "segment", "threshold", "group_rows"])
def shrink_kernel(
    x, A, R, token_mask, t_out, p_out, sums, counts, seed,
    T, D, sx, segment, group_rows, scale_t, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    ROUTER: tl.constexpr, SUMS: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = (group + 1).to(tl.int64) * group_rows
    rows = group.to(tl.int64) * group_rows + block * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    tiles = tl.cdiv(D, BK)
    first = 0
    last = tiles
    if SPLIT:
        first = split * segment
        last = tl.minimum(first + segment, tiles)
    t, logits = shrink_rows(
        x, A, R, seed, rows, end, D, sx, first, last, segment, threshold, SA_R, SA_D, SR_E, SR_D,
        RANK, RP, E, EP, DROPOUT, ROUTER == "x", BM, BK, STAGES,
    )  # fmt: skip
    inside = rows < end
    base = t_out
    if SPLIT:
        base += split.to(tl.int64) * T * RANK
    else:
        t *= tl.cast(scale_t, tl.float32)
    tl.store(base + rows[:, None] * RANK + rank[None, :], t, mask=inside[:, None] & (rank < RANK)[None, :])
    if ROUTER != "none":
        if ROUTER == "t":
            # The weights stay in the router's dtype times float32 t: the logits decide a softmax, and E r values
            # are nothing.
            logits = router_on_hidden(t, R, SR_E, SR_D, RANK, RP, E, EP, BM)
        p = softmax_experts(logits, experts, E)
        tl.store(p_out + rows[:, None] * E + experts[None, :], p, mask=inside[:, None] & (experts < E)[None, :])
        if SUMS:
            keep = inside
            if HAS_MASK:
                keep = inside & (tl.load(token_mask + rows, mask=inside, other=0) != 0)
            place = group.to(tl.int64) * tl.num_programs(0) + block
            tl.store(sums + place * EP + experts, tl.sum(tl.where(keep[:, None], p, 0.0), 0))
            tl.store(counts + place, tl.sum(keep.to(tl.float32), 0))


@triton.jit
def router_on_hidden(
    t, R, SR_E: tl.constexpr, SR_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`t R^T [BM, EP]` with `t [BM, RP]` in registers: E dot products of r values, in float32."""
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    logits = tl.zeros([BM, EP], tl.float32)
    for e in tl.static_range(E):
        row = tl.load(R + e * SR_E + rank * SR_D, mask=rank < RANK, other=0.0).to(tl.float32)
        value = tl.sum(t * row[None, :], 1)
        logits = tl.where((experts == e)[None, :], value[:, None], logits)
    return logits
