"""Routed projection of few rows (`T <= 128`) in one launch: `out = y + s * sum_e w_e t B_e^T`.

A program owns a run of columns and computes `t`, the router's softmax and the weights by itself, so that none waits
for another: it reads `x`, which L2 holds, once (twice for a router on `x` beside dropout or in float32).

* `MIX = "mean"` (routing per batch or sample): the weights are a mean over the rows of a group, so every program of it
  walks all of them, block by block, adds up their probabilities in one order, and keeps the `t` of its own block.
* `"weights"` (static) and `"token"`: a program computes the `t` of its own block alone.

The columns are walked in steps: of one expert each, whose factor is added to a tile of `B_mix` in float32, or, per
token, of the `HELD` experts that one product takes; of `WIDTH` ranks, all of them or half. The last step of a tile
reads `y` and writes `out`. Tiles of `D` and the order of every sum are those of `shrink.py` and `expand.py`: per token
and with static weights, a row's bits do not depend on how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_factor, load_rows, product, softmax_experts
from .expand import bank_slots
from .shrink import router_on_hidden, router_on_input, shrink_rows


@triton.jit
def held_hidden(
    p, t, first, EP: tl.constexpr, E: tl.constexpr, HELD: tl.constexpr, HP: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """`z = w (x) t  [BM, HP WIDTH]` of the experts `first .. first + HELD`, from `p [BM, EP]` and `t [BM, WIDTH]` in
    registers."""
    held = tl.arange(0, HP)
    wanted = tl.where((first + held < E) & (held < HELD), first + held, EP)
    chosen = tl.arange(0, EP)[None, :, None] == wanted[None, None, :]
    weight = tl.sum(tl.where(chosen, p[:, :, None], 0.0), 1)  # [BM, HP]: one term of each sum is not zero
    return tl.reshape(weight[:, :, None] * t[:, None, :], [BM, HP * WIDTH])


@triton.jit
def block_hidden(
    x, A, R, token_mask, t_out, p_out, seed, block, group, own, D, sx, segment, group_rows, scale_t, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROUTER: tl.constexpr, SUM: tl.constexpr,
    HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`t [BM, RP]` and `p [BM, EP]` of one block of a group's rows, stored if `own`; with `SUM`, also the sum over its
    kept rows of `p [EP]`, and their number."""
    end = (group + 1).to(tl.int64) * group_rows
    rows = group.to(tl.int64) * group_rows + block * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    APART: tl.constexpr = DROPOUT or x.dtype.element_ty == tl.float32  # two products of x at once take more registers
    t, logits = shrink_rows(
        x, A, R, seed, rows, end, D, sx, 0, tl.cdiv(D, BK), segment, threshold, SA_R, SA_D, SR_E, SR_D,
        RANK, RP, E, EP, DROPOUT, ROUTER == "x" and not APART, BM, BK, STAGES,
    )  # fmt: skip
    if ROUTER == "x" and APART:
        logits = router_on_input(x, R, rows, end, D, sx, SR_E, SR_D, E, EP, BM, BK, STAGES)
    t *= tl.cast(scale_t, tl.float32)
    saved = rows < tl.where(own, end, 0)
    tl.store(t_out + rows[:, None] * RANK + rank[None, :], t, mask=saved[:, None] & (rank < RANK)[None, :])
    p = logits
    total = tl.zeros([EP], tl.float32)
    kept = 0.0
    if ROUTER != "none":
        if ROUTER == "t":
            logits = router_on_hidden(t, R, SR_E, SR_D, RANK, RP, E, EP, BM)
        p = softmax_experts(logits, experts, E)
        tl.store(p_out + rows[:, None] * E + experts[None, :], p, mask=saved[:, None] & (experts < E)[None, :])
        if SUM:
            keep = rows < end
            if HAS_MASK:
                keep = keep & (tl.load(token_mask + rows, mask=keep, other=0) != 0)
            total = tl.sum(tl.where(keep[:, None], p, 0.0), 0)
            kept = tl.sum(keep.to(tl.float32), 0)
    return t, p, total, kept


@triton.jit(do_not_specialize=["T", "segment", "tiles", "group_rows", "threshold"])
def routed_small_kernel(
    x, A, y, B, R, token_mask, w_in, out, t_out, p_out, w_out, seed,
    T, D, N, sx, sy, so, sb_e, segment, tiles, group_rows, scale_t, scale, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr, SB_N: tl.constexpr,
    SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, HELD: tl.constexpr,
    HP: tl.constexpr, WIDTH: tl.constexpr, MIX: tl.constexpr, ROUTER: tl.constexpr, HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = RP // WIDTH
    PASSES: tl.constexpr = (E + HELD - 1) // HELD * PIECES
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = (group + 1).to(tl.int64) * group_rows
    rows = group.to(tl.int64) * group_rows + block * BM + tl.arange(0, BM)
    experts = tl.arange(0, EP)
    dtype = out.dtype.element_ty
    if MIX == "mean":
        t = tl.zeros([BM, RP], tl.float32)
        w = tl.zeros([EP], tl.float32)
        count = 0.0
        for other in tl.range(0, tl.num_programs(0), num_stages=1):
            some, p, total, kept = block_hidden(
                x, A, R, token_mask, t_out, p_out, seed, other, group, (other == block) & (split == 0), D, sx,
                segment, group_rows, scale_t, threshold, SA_R, SA_D, SR_E, SR_D, RANK, RP, E, EP, ROUTER, True,
                HAS_MASK, DROPOUT, BM, BK, STAGES,
            )  # fmt: skip
            t = tl.where(other == block, some, t)
            w += total
            count += kept
        w /= tl.maximum(count, 1.0)
    else:
        t, p, _, _ = block_hidden(
            x, A, R, token_mask, t_out, p_out, seed, block, group, split == 0, D, sx, segment, group_rows, scale_t,
            threshold, SA_R, SA_D, SR_E, SR_D, RANK, RP, E, EP, ROUTER, False, HAS_MASK, DROPOUT, BM, BK, STAGES,
        )  # fmt: skip
        if ROUTER == "none":
            w = tl.load(w_in + experts, mask=experts < E, other=0.0).to(tl.float32)
    if MIX != "token":
        tl.store(w_out + group * E + experts, w, mask=experts < tl.where(split + block == 0, E, 0))
    start = split * tiles * BN
    steps = tl.cdiv(tl.minimum(start + tiles * BN, N) - start, BN) * PASSES
    slots = tl.arange(0, HP * WIDTH) // WIDTH
    low, high = t, t
    if PIECES == 2:
        low, high = tl.split(tl.permute(tl.reshape(t, [BM, 2, WIDTH]), [0, 2, 1]))
    update = tl.zeros([BM, BN], tl.float32)
    lower = tl.zeros([BM, BN], tl.float32)
    mixed = tl.zeros([WIDTH, BN], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        part = step % PASSES
        cols = start + (step // PASSES) * BN + tl.arange(0, BN)
        if MIX == "token":
            first, piece = part // PIECES * HELD, part % PIECES
            z = held_hidden(p, tl.where(piece == 0, low, high), first, EP, E, HELD, HP, WIDTH, BM).to(dtype)
            some = bank_slots(B, first + slots, piece * WIDTH, cols, N, sb_e, SB_N, SB_R, RANK, WIDTH, E, HP * WIDTH)
            update = product(z, some.to(dtype), tl.where(part == 0, 0.0, update))
        else:
            e, piece = part % E, part // E
            weight = tl.sum(tl.where(experts == e, w, 0.0), 0)
            place = B + tl.cast(e, tl.int64) * sb_e + piece * WIDTH * SB_R
            one = load_factor(place, tl.arange(0, WIDTH), cols, SB_R, SB_N, RANK - piece * WIDTH, N)  # [WIDTH, BN]
            mixed = tl.where(e == 0, 0.0, mixed) + weight * one.to(tl.float32)
            left = tl.where(piece == 0, low, high).to(dtype)
            update = product(left, mixed.to(dtype), tl.where(piece == 0, 0.0, lower))
            if PIECES == 2:
                lower = tl.where(part == E - 1, update, lower)
        written = tl.where(part == PASSES - 1, end, 0)
        value = update * tl.cast(scale, tl.float32) + load_rows(y, rows, cols, sy, written, N).to(tl.float32)
        mask = (rows < written)[:, None] & (cols < N)[None, :]
        tl.store(out + rows[:, None] * so + cols[None, :], value.to(dtype), mask=mask)
