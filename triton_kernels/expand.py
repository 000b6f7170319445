"""Expand, `out = y + s * t B^T [T, d_out]`, with the experts mixed once per program.

A program owns `BN` columns and a run of rows: the tile of `B` is loaded (mixed, for a bank) once and stays in registers
while `y` streams in and `out` streams out. 2 passes and nothing else; `t` comes from L2.

* `MIX = "weights"`: `B_mix = sum_e w_e B_e` with `w [groups, E]` given; `"sums"`: `w` is the mean that `shrink.py` left
  as partial sums, added here in order (a few KB from L2) and written out once for backward.
* `"token"`: one rank-`E r` update: `z = w (x) t` is built in registers from `p [T, E]` and `t [T, r]`. A bank too wide
  for one product (`E r > 128`) takes several steps for a block of rows, of `HELD` experts each and, where `RP < r`, of
  `RP` ranks; the tiles of `B` then come from L2, and the last step reads `y` and writes `out`.
* `PARTS > 1`: `t` is the sum of `PARTS` partials `[PARTS, T, r]` of a split-K shrink, added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load_factor, load_rows, product


@triton.jit
def mean_weights(
    w_in, sums, counts, group, blocks, MIX: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, CHUNK: tl.constexpr
):
    """`w [EP]` of one group, zero beyond `E`: as given, or the mean over the group's row blocks, summed in one
    order."""
    experts = tl.arange(0, EP)
    if MIX == "weights":
        w = tl.load(w_in + group * E + experts, mask=experts < E, other=0.0).to(tl.float32)
    else:
        index = tl.arange(0, CHUNK)
        total = tl.zeros([CHUNK, EP], tl.float32)
        number = tl.zeros([CHUNK], tl.float32)
        base = group.to(tl.int64) * blocks
        for start in tl.range(0, blocks, CHUNK):
            place = base + start + index
            mask = start + index < blocks
            total += tl.load(sums + place[:, None] * EP + experts[None, :], mask=mask[:, None], other=0.0)
            number += tl.load(counts + place, mask=mask, other=0.0)
        w = tl.sum(total, 0) / tl.maximum(tl.sum(number, 0), 1.0)
    return w


@triton.jit
def mixed_factor(
    B, w, cols, N, sb_e, SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`sum_e w_e B_e^T` as a float32 tile `[RP, BN]`."""
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    mix = tl.zeros([RP, BN], tl.float32)
    for e in tl.range(0, E):
        weight = tl.sum(tl.where(experts == e, w, 0.0), 0)
        mix += weight * load_factor(B + tl.cast(e, tl.int64) * sb_e, rank, cols, SB_R, SB_N, RANK, N).to(tl.float32)
    return mix


@triton.jit
def bank_slots(B, slot_expert, first, cols, N, sb_e, SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr,
               RP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Tile `[WIDTH, BN]` of the bank as one factor: slot `k` is rank `first + k % RP` of expert `slot_expert[k]`."""
    rank = first + tl.arange(0, WIDTH) % RP
    offset = slot_expert.to(tl.int64) * sb_e + rank * SB_R
    mask = ((rank < RANK) & (slot_expert < E))[:, None] & (cols < N)[None, :]
    return tl.load(B + offset[:, None] + cols.to(tl.int64)[None, :] * SB_N, mask=mask, other=0.0)


@triton.jit
def bank_slots_transposed(B, slot_expert, cols, N, sb_e, SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr,
                          RP: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """The same tile as `[BN, WIDTH]`."""
    rank = tl.arange(0, WIDTH) % RP
    offset = slot_expert.to(tl.int64) * sb_e + rank * SB_R
    mask = (cols < N)[:, None] & ((rank < RANK) & (slot_expert < E))[None, :]
    return tl.load(B + cols.to(tl.int64)[:, None] * SB_N + offset[None, :], mask=mask, other=0.0)


@triton.jit
def hidden_rows(t, rows, end, first, T, RANK: tl.constexpr, RP: tl.constexpr, PARTS: tl.constexpr, BM: tl.constexpr):
    """`t [BM, RP]` from rank `first` on in float32: the sum of `PARTS` partials, in order."""
    rank = first + tl.arange(0, RP)
    mask = (rows < end)[:, None] & (rank < RANK)[None, :]
    place = rows[:, None] * RANK + rank[None, :]
    value = tl.load(t + place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(t + part * T.to(tl.int64) * RANK + place, mask=mask, other=0.0)
    return value


@triton.jit
def token_hidden(
    p, hidden, rows, end, first, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, HELD: tl.constexpr,
    HP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """`z = w (x) t  [BM, HP RP]` of the experts `first .. first + HELD`, from `t [BM, RP]`."""
    held = tl.arange(0, HP)
    mask = (rows < end)[:, None] & ((first + held < E) & (held < HELD))[None, :]
    weight = tl.load(p + rows[:, None] * E + (first + held)[None, :], mask=mask, other=0.0)  # [BM, HP]
    return tl.reshape(weight[:, :, None] * hidden[:, None, :], [BM, HP * RP])


@triton.jit(do_not_specialize=["T", "blocks", "group_rows", "rows_per_split"])
def expand_kernel(
    y, t, B, p, w_in, sums, counts, out, t_out, w_out,
    T, N, sy, so, sb_e, blocks, group_rows, rows_per_split, scale_t, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    HELD: tl.constexpr, HP: tl.constexpr, MIX: tl.constexpr, PARTS: tl.constexpr, SAVE_T: tl.constexpr,
    SAVE_W: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (RANK + RP - 1) // RP
    PASSES: tl.constexpr = (E + HELD - 1) // HELD * PIECES if MIX == "token" else 1
    tile, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = tile * BN + tl.arange(0, BN)
    rank = tl.arange(0, RP)
    dtype = out.dtype.element_ty
    if MIX == "none":
        factor = load_factor(B, rank, cols, SB_R, SB_N, RANK, N).to(dtype)  # [RP, BN]
    elif MIX == "token":
        slots = tl.arange(0, HP * RP) // RP
        if PASSES == 1:
            factor = bank_slots(B, slots, 0, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, HP * RP).to(dtype)  # [HP RP, BN]
    else:
        w = mean_weights(w_in, sums, counts, group, blocks, MIX, E, EP, CHUNK)
        if SAVE_W:  # noqa: SIM102 (the outer one is decided at compile time)
            if (tile == 0) & (split == 0):
                experts = tl.arange(0, EP)
                tl.store(w_out + group * E + experts, w, mask=experts < E)
        factor = mixed_factor(B, w, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, EP, BN).to(dtype)  # [RP, BN]
    first = group.to(tl.int64) * group_rows
    end = first + group_rows
    start = split * rows_per_split
    steps = tl.cdiv(tl.minimum(start + rows_per_split, group_rows) - start, BM) * PASSES
    update = tl.zeros([BM, BN], tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        rows = first + start + (step // PASSES) * BM + tl.arange(0, BM)
        part = step % PASSES // PIECES * HELD  # the first expert of this step, and the first rank
        piece = step % PIECES * RP
        left = hidden_rows(t, rows, end, piece, T, RANK, RP, PARTS, BM)  # [BM, RP]
        if PARTS > 1:
            left *= tl.cast(scale_t, tl.float32)
        if SAVE_T:  # noqa: SIM102 (the outer one is decided at compile time)
            if tile == 0:
                mask = (rows < end)[:, None] & (rank < RANK)[None, :]
                tl.store(t_out + rows[:, None] * RANK + rank[None, :], left, mask=mask)
        if MIX == "token":
            left = token_hidden(p, left, rows, end, part, RANK, RP, E, HELD, HP, BM)
        if PASSES == 1:
            update = product(left.to(dtype), factor, tl.zeros([BM, BN], tl.float32))
            written = end
        else:
            some = bank_slots(B, part + slots, piece, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, HP * RP)
            update = product(left.to(dtype), some.to(dtype), tl.where(step % PASSES == 0, 0.0, update))
            written = tl.where(step % PASSES == PASSES - 1, end, 0)
        value = update * tl.cast(scale, tl.float32) + load_rows(y, rows, cols, sy, written, N).to(tl.float32)
        mask = (rows < written)[:, None] & (cols < N)[None, :]
        tl.store(out + rows[:, None] * so + cols[None, :], value.to(dtype), mask=mask)
