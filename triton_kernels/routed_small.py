"""Routed projection of few rows (`T <= 128`) in one launch: `out = y + s * sum_e w_e t B_e^T`.

A program owns a run of columns and computes `t`, the router's softmax and the weights by itself, so that none waits
for another: `x`, which L2 holds, is read once per program.

* `MIX = "mean"` (routing per batch or sample): a program takes all rows of its group, because the weights are a mean
  over them; no partial sums, one order.
* `"weights"` (static) and `"token"`: the rows are split in blocks of `BM` as well.

The columns are walked in steps: of one expert each, whose factor is added to a tile of `B_mix` in float32, or, per
token, of the `HELD` experts that one product takes. The last step of a tile reads `y` and writes `out`. Tiles of `D`
and the order of every sum are those of `shrink.py` and `expand.py`: per token and with static weights, a row's bits do
not depend on how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_factor, load_rows, product, softmax_experts
from .expand import bank_slots
from .shrink import router_on_hidden, shrink_rows


@triton.jit
def held_hidden(
    p, t, first, EP: tl.constexpr, E: tl.constexpr, HELD: tl.constexpr, HP: tl.constexpr, RP: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """`z = w (x) t  [BM, HP RP]` of the experts `first .. first + HELD`, from `p [BM, EP]` and `t [BM, RP]` in
    registers."""
    held = tl.arange(0, HP)
    wanted = tl.where((first + held < E) & (held < HELD), first + held, EP)
    chosen = tl.arange(0, EP)[None, :, None] == wanted[None, None, :]
    weight = tl.sum(tl.where(chosen, p[:, :, None], 0.0), 1)  # [BM, HP]: one term of each sum is not zero
    return tl.reshape(weight[:, :, None] * t[:, None, :], [BM, HP * RP])


@triton.jit(do_not_specialize=["T", "segment", "tiles", "group_rows", "threshold"])
def routed_small_kernel(
    x, A, y, B, R, token_mask, w_in, out, t_out, p_out, w_out, seed,
    T, D, N, sx, sy, so, sb_e, segment, tiles, group_rows, scale_t, scale, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr, SB_N: tl.constexpr,
    SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, HELD: tl.constexpr,
    HP: tl.constexpr, MIX: tl.constexpr, ROUTER: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PASSES: tl.constexpr = (E + HELD - 1) // HELD
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    end = (group + 1).to(tl.int64) * group_rows
    rows = group.to(tl.int64) * group_rows + block * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    dtype = out.dtype.element_ty
    t, logits = shrink_rows(
        x, A, R, seed, rows, end, D, sx, 0, tl.cdiv(D, BK), segment, threshold, SA_R, SA_D, SR_E, SR_D,
        RANK, RP, E, EP, DROPOUT, ROUTER == "x", BM, BK, STAGES,
    )  # fmt: skip
    t *= tl.cast(scale_t, tl.float32)
    inside = rows < end
    saved = rows < tl.where(split == 0, end, 0)  # by one of the programs that share these rows
    tl.store(t_out + rows[:, None] * RANK + rank[None, :], t, mask=saved[:, None] & (rank < RANK)[None, :])
    if ROUTER == "none":
        w = tl.load(w_in + experts, mask=experts < E, other=0.0).to(tl.float32)
    else:
        if ROUTER == "t":
            logits = router_on_hidden(t, R, SR_E, SR_D, RANK, RP, E, EP, BM)
        p = softmax_experts(logits, experts, E)
        tl.store(p_out + rows[:, None] * E + experts[None, :], p, mask=saved[:, None] & (experts < E)[None, :])
        if MIX == "mean":
            keep = inside
            if HAS_MASK:
                keep = inside & (tl.load(token_mask + rows, mask=inside, other=0) != 0)
            w = tl.sum(tl.where(keep[:, None], p, 0.0), 0) / tl.maximum(tl.sum(keep.to(tl.float32), 0), 1.0)
    if MIX != "token":
        tl.store(w_out + group * E + experts, w, mask=experts < tl.where(split + block == 0, E, 0))
    left = t.to(dtype)
    start = split * tiles * BN
    steps = tl.cdiv(tl.minimum(start + tiles * BN, N) - start, BN) * PASSES
    slots = tl.arange(0, HP * RP) // RP
    update = tl.zeros([BM, BN], tl.float32)
    mixed = tl.zeros([RP, BN], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        part = step % PASSES
        cols = start + (step // PASSES) * BN + tl.arange(0, BN)
        if MIX == "token":
            z = held_hidden(p, t, part * HELD, EP, E, HELD, HP, RP, BM).to(dtype)  # [BM, HP RP]
            some = bank_slots(B, part * HELD + slots, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, HP * RP)
            update = product(z, some.to(dtype), tl.where(part == 0, 0.0, update))
        else:
            weight = tl.sum(tl.where(experts == part, w, 0.0), 0)
            one = load_factor(B + tl.cast(part, tl.int64) * sb_e, rank, cols, SB_R, SB_N, RANK, N)  # [RP, BN]
            mixed = tl.where(part == 0, 0.0, mixed) + weight * one.to(tl.float32)
            update = product(left, mixed.to(dtype), tl.zeros([BM, BN], tl.float32))
        written = tl.where(part == PASSES - 1, end, 0)
        value = update * tl.cast(scale, tl.float32) + load_rows(y, rows, cols, sy, written, N).to(tl.float32)
        mask = (rows < written)[:, None] & (cols < N)[None, :]
        tl.store(out + rows[:, None] * so + cols[None, :], value.to(dtype), mask=mask)
