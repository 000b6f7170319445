"""The second stage of every parameter gradient: partials are added in a fixed order, never atomically.

One launch for all of them: the first `a_tiles` programs add `dA`, the next `b_tiles` `dB`, then `dR`, then the
gradient of static weights. `dB_e = sum_groups w_e G` for a mixed bank (`G [groups, runs, r, d_out]` is shared by
its experts), the expert's own partials for token routing. An inactive expert's gradient is filled with zeros; its
partials are not read. Partials come from L2: `runs * r * (d_in + d_out)` floats.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_runs(parts, first, runs, place, stride, mask):
    """The sum of `runs` partials `stride` apart, from run `first` on, in order."""
    total = tl.load(parts + first * stride + place, mask=mask, other=0.0)
    for run in tl.range(1, runs):
        total += tl.load(parts + (first + run) * stride + place, mask=mask, other=0.0)
    return total


@triton.jit
def reduce_matrix(parts, out, tile, runs, width, SO_R: tl.constexpr, SO_C: tl.constexpr, ROWS: tl.constexpr,
                  ROWS_P: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """`out [ROWS, width] = sum of parts [runs, ROWS, width]`, one tile of columns."""
    row = tl.arange(0, ROWS_P)
    cols = tile * BC + tl.arange(0, BC)
    mask = (row < ROWS)[:, None] & (cols < width)[None, :]
    stride = tl.cast(width, tl.int64) * ROWS
    total = sum_runs(parts, 0, runs, row.to(tl.int64)[:, None] * width + cols[None, :], stride, mask)
    place = row.to(tl.int64)[:, None] * SO_R + cols.to(tl.int64)[None, :] * SO_C
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def reduce_bank(
    parts, w, active, out, tile, groups, runs, N, so_e, SO_N: tl.constexpr, SO_R: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr, E: tl.constexpr, MIX: tl.constexpr, HAS_ACTIVE: tl.constexpr, ONE_GROUP: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """`dB` for one tile of columns, all experts."""
    rank = tl.arange(0, RP)
    cols = tile * BC + tl.arange(0, BC)
    mask = (rank < RANK)[:, None] & (cols < N)[None, :]
    place = rank.to(tl.int64)[:, None] * N + cols[None, :]
    where = rank.to(tl.int64)[:, None] * SO_R + cols.to(tl.int64)[None, :] * SO_N
    one = tl.cast(N, tl.int64) * RANK
    if (MIX != "token") and ONE_GROUP:
        shared = sum_runs(parts, 0, runs, place, one, mask)
    for e in tl.range(0, E):
        on = True
        if HAS_ACTIVE:
            on = tl.load(active + e) != 0
        total = tl.zeros([RP, BC], tl.float32)
        if on:
            if MIX == "token":
                total += sum_runs(parts + tl.cast(e, tl.int64) * one, 0, runs, place, one * E, mask)
            elif MIX == "none":
                total += shared
            elif ONE_GROUP:
                total += tl.load(w + e) * shared
            else:
                for group in tl.range(0, groups):
                    weight = tl.load(w + group * E + e)
                    total += weight * sum_runs(parts, tl.cast(group, tl.int64) * runs, runs, place, one, mask)
        tl.store(out + tl.cast(e, tl.int64) * so_e + where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["a_tiles", "b_tiles", "r_tiles", "groups", "runs", "a_runs", "dw_count"])
def reduce_kernel(
    a_parts, dA, b_parts, w, active, dB, r_parts, dR, dw_parts, dweights,
    D, N, r_width, so_e, a_tiles, b_tiles, r_tiles, groups, runs, a_runs, dw_count,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SB_N: tl.constexpr, SB_R: tl.constexpr, SR_E: tl.constexpr,
    SR_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, MIX: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    ONE_GROUP: tl.constexpr, NEED_DA: tl.constexpr, NEED_DB: tl.constexpr, NEED_DR: tl.constexpr,
    NEED_DWEIGHTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    if NEED_DA and tile < a_tiles:
        reduce_matrix(a_parts, dA, tile, a_runs, D, SA_R, SA_D, RANK, RP, BC)
    elif NEED_DB and tile < a_tiles + b_tiles:
        reduce_bank(b_parts, w, active, dB, tile - a_tiles, groups, runs, N, so_e, SB_N, SB_R, RANK, RP, E, MIX,
                    HAS_ACTIVE, ONE_GROUP, BC)  # fmt: skip
    elif NEED_DR and tile < a_tiles + b_tiles + r_tiles:
        reduce_matrix(r_parts, dR, tile - a_tiles - b_tiles, a_runs, r_width, SR_E, SR_D, E, EP, BC)
    elif NEED_DWEIGHTS:
        experts = tl.arange(0, EP)
        total = sum_runs(dw_parts, 0, dw_count, experts, E, experts < E)
        tl.store(dweights + experts, total, mask=experts < E)
