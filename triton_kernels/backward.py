"""Backward of both operations: `g -> u, dB` in one launch over `g`, `u -> dx, dA` in one pass over `x` and `dx`.

Streams are read once, a program's tile of the gradient stays in registers, nothing is added atomically. Two kernels:

* up: reads `g [T, d_out]`. Column programs own a tile of columns and a run of rows, and leave `s g^T t` as one partial
  per run (`[runs, r, d_out]`). For a mixed bank `B = sum_e w_e B_e` that is the shared `G` of all experts, and
  `dw_e = <G, B_e>` is taken from it before it leaves the registers. `u = s g B` comes in one of two ways:
  as one partial per column tile (`[tiles, T, r]`, `4 r / BN` of a pass), or, where those would cost a pass (a rank of
  64, many tiles, token routing), from row programs of the same launch, which own whole rows of the same run: a run is
  at most 6 MB of `g`, row and column programs of a run start together, and the second of them finds it in L2. Row
  programs of a mixed bank mix it tile by tile, which reads it from L2 once per block of rows.
* down: a tile of columns and a run of rows of `x` and `dx`. Adds the partials of `u` in order, adds the router's
  gradient to it (`dlogits = p (dp - <p, dp>)`), writes `dx = u A` and the partials of `dA = u^T x`.

`reduce.py` adds the partials. Together: read `g`, read `x`, write `dx`: 3 passes plus partials that live in L2.

Inactive experts (`active`, read on the device) are left out: a token-routed program numbers the active experts and owns
the columns of those alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import keep_mask, load_factor, load_factor_transposed, load_rows, product
from .expand import bank_slots_transposed, hidden_rows, mean_weights, mixed_factor
from .shrink import shrink_rows

# ------------------------------------------------------------------------------------------------ up: g -> u, dB


@triton.jit
def active_slots(active, slots, E: tl.constexpr, EP: tl.constexpr, WIDTH: tl.constexpr):
    """The expert of each slot `[WIDTH]` when only active experts are numbered; `E` where there is none left."""
    experts = tl.arange(0, EP)
    on = tl.load(active + experts, mask=experts < E, other=0).to(tl.int32) != 0
    number = tl.cumsum(on.to(tl.int32), 0) - 1
    match = on[None, :] & (number[None, :] == slots[:, None])  # [WIDTH, EP]
    found = tl.sum(match.to(tl.int32), 1) > 0
    return tl.where(found, tl.sum(tl.where(match, experts[None, :], 0), 1), E)


@triton.jit
def up_gradient(
    g, t, B, p, w, active, u_parts, b_parts, dw_parts,
    tile, split, group, tiles, splits, T, N, sg, sb_e, group_rows, rows_per_split, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    MIX: tl.constexpr, HAS_ACTIVE: tl.constexpr, EMIT_U: tl.constexpr, NEED_DB: tl.constexpr, NEED_DW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of columns and one run of rows of `g`. With `MIX = "token"`, the tile index also counts groups of
    `SLOTS` experts (innermost, so that the programs that share a tile of `g` run together)."""
    TOKEN: tl.constexpr = MIX == "token"
    WIDTH: tl.constexpr = SLOTS * RP if TOKEN else RP
    ACCUMULATE: tl.constexpr = NEED_DB or NEED_DW
    rank = tl.arange(0, RP)
    dtype = g.dtype.element_ty
    slot = tl.arange(0, WIDTH) // RP
    chosen = tl.arange(0, SLOTS)
    if TOKEN:
        groups: tl.constexpr = (E + SLOTS - 1) // SLOTS
        slot += (tile % groups) * SLOTS
        chosen += (tile % groups) * SLOTS
        tile = tile // groups
        if HAS_ACTIVE:
            slot = active_slots(active, slot, E, EP, WIDTH)
            chosen = active_slots(active, chosen, E, EP, SLOTS)
    cols = tile * BN + tl.arange(0, BN)
    if EMIT_U:
        if MIX == "none":
            factor = load_factor(B, rank, cols, SB_R, SB_N, RANK, N).to(dtype)  # [RP, BN]
        else:
            weights = mean_weights(w, None, None, group, 0, "weights", E, EP, 1)
            factor = mixed_factor(B, weights, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, EP, BN).to(dtype)
        factor = tl.trans(factor)  # [BN, RP]
    acc = tl.zeros([WIDTH, BN], tl.float32)
    first = group.to(tl.int64) * group_rows
    end = first + group_rows
    start = split * rows_per_split
    stop = tl.minimum(start + rows_per_split, group_rows)
    if TOKEN and HAS_ACTIVE:
        stop = tl.where(tl.min(chosen, 0) < E, stop, start)
    for begin in tl.range(start, stop, BM, num_stages=STAGES):
        rows = first + begin + tl.arange(0, BM)
        g_tile = load_rows(g, rows, cols, sg, end, N)  # [BM, BN]
        if EMIT_U:
            part = product(g_tile, factor, tl.zeros([BM, RP], tl.float32)) * tl.cast(scale, tl.float32)
            mask = (rows < end)[:, None] & (rank < RANK)[None, :]
            base = u_parts + tile.to(tl.int64) * T * RANK
            tl.store(base + rows[:, None] * RANK + rank[None, :], part, mask=mask)
        if ACCUMULATE:
            left = hidden_rows(t, rows, end, 0, T, RANK, RP, 1, BM)  # [BM, RP]
            if TOKEN:
                mask = (rows < end)[:, None] & (chosen < E)[None, :]
                weight = tl.load(p + rows[:, None] * E + chosen[None, :], mask=mask, other=0.0)  # [BM, SLOTS]
                left = tl.reshape(weight[:, :, None] * left[:, None, :], [BM, WIDTH])
            acc = product(tl.trans(left.to(dtype)), g_tile, acc)
    if ACCUMULATE:
        acc *= tl.cast(scale, tl.float32)
        run = group.to(tl.int64) * splits + split
        if NEED_DB:
            column = (cols < N)[None, :]
            if TOKEN:
                place = slot.to(tl.int64) * RANK + tl.arange(0, WIDTH) % RP
                mask = ((slot < E) & (tl.arange(0, WIDTH) % RP < RANK))[:, None] & column
                tl.store(b_parts + (run * E * RANK + place)[:, None] * N + cols[None, :], acc, mask=mask)
            else:
                place = run * RANK + rank
                tl.store(b_parts + place[:, None] * N + cols[None, :], acc, mask=(rank < RANK)[:, None] & column)
        if NEED_DW:
            for e in tl.range(0, E):
                one = load_factor(B + tl.cast(e, tl.int64) * sb_e, rank, cols, SB_R, SB_N, RANK, N).to(tl.float32)
                tl.store(dw_parts + (run * tiles + tile) * E + e, tl.sum(tl.sum(acc * one, 1), 0))


@triton.jit
def hidden_by_rows(
    g, B, u_out, rows, end, N, sg, segment, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`u = s g B` of whole rows."""
    rank = tl.arange(0, RP)
    u, _ = shrink_rows(
        g, B, None, None, rows, end, N, sg, 0, tl.cdiv(N, BK), segment, 0,
        SB_R, SB_N, 0, 0, RANK, RP, 1, 1, False, False, BM, BK, STAGES,
    )  # fmt: skip
    mask = (rows < end)[:, None] & (rank < RANK)[None, :]
    tl.store(u_out + rows[:, None] * RANK + rank[None, :], u * tl.cast(scale, tl.float32), mask=mask)


@triton.jit
def mixed_hidden_by_rows(
    g, B, w, u_out, rows, end, group, N, sg, sb_e, segment, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    HELD: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`u = s g sum_e w_e B_e` of whole rows. A step mixes one tile of `HELD` experts, so that their loads fit the
    pipeline's buffers; a larger bank takes several steps for a tile, whose `g` then comes from L2."""
    PASSES: tl.constexpr = (E + HELD - 1) // HELD
    rank = tl.arange(0, RP)
    weights = mean_weights(w, None, None, group, 0, "weights", E, EP, 1)
    experts = tl.arange(0, EP)
    total = tl.zeros([BM, RP], tl.float32)
    run = tl.zeros([BM, RP], tl.float32)
    for step in tl.range(0, tl.cdiv(N, BK) * PASSES, num_stages=STAGES):
        cols = (step // PASSES) * BK + tl.arange(0, BK)
        g_tile = load_rows(g, rows, cols, sg, end, N)  # [BM, BK]
        factor = tl.zeros([BK, RP], tl.float32)
        for k in tl.static_range(HELD):
            e = (step % PASSES) * HELD + k
            weight = tl.sum(tl.where(experts == e, weights, 0.0), 0)  # zero beyond E
            one = B + tl.minimum(e, E - 1).to(tl.int64) * sb_e
            factor += weight * load_factor_transposed(one, rank, cols, SB_R, SB_N, RANK, N).to(tl.float32)
        run = product(g_tile, factor.to(g_tile.dtype), run)
        if (step + 1) % (segment * PASSES) == 0:
            total += run
            run = tl.zeros([BM, RP], tl.float32)
    mask = (rows < end)[:, None] & (rank < RANK)[None, :]
    tl.store(u_out + rows[:, None] * RANK + rank[None, :], (total + run) * tl.cast(scale, tl.float32), mask=mask)


@triton.jit
def token_hidden_by_rows(
    g, t, B, p, u_out, dw_out, rows, end, T, N, sg, sb_e, part, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, HELD: tl.constexpr,
    HP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Token routing, whole rows: `dz = s g B_cat [BM, HELD r]` stays in registers and leaves as `dt = sum_e w_e dz_e
    [T, r]` and `dw_e = <dz_e, t> [T, E]`. A bank too wide for that comes in parts of `HELD` experts, each with
    programs and a partial of `dt` of its own."""
    held = tl.arange(0, HP)
    rank = tl.arange(0, RP)
    first_expert = part * HELD
    slots = first_expert + tl.arange(0, HP * RP) // RP
    dz = tl.zeros([BM, HP * RP], tl.float32)
    for tile in tl.range(0, tl.cdiv(N, BK), num_stages=STAGES):
        cols = tile * BK + tl.arange(0, BK)
        g_tile = load_rows(g, rows, cols, sg, end, N)  # [BM, BK]
        factor = bank_slots_transposed(B, slots, cols, N, sb_e, SB_N, SB_R, RANK, RP, E, HP * RP)  # [BK, HP RP]
        dz = product(g_tile, factor.to(g_tile.dtype), dz)
    dz = tl.reshape(dz * tl.cast(scale, tl.float32), [BM, HP, RP])
    inside = (rows < end)[:, None]
    chosen = first_expert + held
    valid = inside & ((chosen < E) & (held < HELD))[None, :]
    weight = tl.load(p + rows[:, None] * E + chosen[None, :], mask=valid, other=0.0)  # [BM, HP]
    hidden = hidden_rows(t, rows, end, 0, T, RANK, RP, 1, BM)  # [BM, RP]
    tl.store(dw_out + rows[:, None] * E + chosen[None, :], tl.sum(dz * hidden[:, None, :], 2), mask=valid)
    dt = tl.sum(dz * weight[:, :, None], 1)
    place = part * T.to(tl.int64) * RANK + rows[:, None] * RANK + rank[None, :]
    tl.store(u_out + place, dt, mask=inside & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["T", "group_rows", "rows_per_split", "up_tiles", "segment"])
def up_kernel(
    g, t, B, p, w, active, u_out, b_parts, dw_out,
    T, N, sg, sb_e, group_rows, rows_per_split, up_tiles, segment, scale,
    SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    MIX: tl.constexpr, HAS_ACTIVE: tl.constexpr, EMIT_U: tl.constexpr, NEED_DB: tl.constexpr, NEED_DW: tl.constexpr,
    BY_ROWS: tl.constexpr, HELD: tl.constexpr, HP: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SLOTS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns `0 .. up_tiles` own tiles of columns; with `BY_ROWS`, the others own the blocks of rows of the run (with
    `MIX = "token"`, of each part of the bank)."""
    column, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if BY_ROWS and column >= up_tiles:
        parts: tl.constexpr = (E + HELD - 1) // HELD if MIX == "token" else 1
        block = (column - up_tiles) // parts
        before = group.to(tl.int64) * group_rows
        first = before + split * rows_per_split
        end = tl.minimum(first + rows_per_split, before + group_rows)
        rows = first + block * BM + tl.arange(0, BM)
        if MIX == "token":
            token_hidden_by_rows(
                g, t, B, p, u_out, dw_out, rows, end, T, N, sg, sb_e, (column - up_tiles) % parts, scale,
                SB_N, SB_R, RANK, RP, E, HELD, HP, BM, BK, STAGES,
            )  # fmt: skip
        elif MIX == "weights":
            mixed_hidden_by_rows(
                g, B, w, u_out, rows, end, group, N, sg, sb_e, segment, scale,
                SB_N, SB_R, RANK, RP, E, EP, HELD, BM, BK, STAGES,
            )  # fmt: skip
        else:
            hidden_by_rows(g, B, u_out, rows, end, N, sg, segment, scale, SB_N, SB_R, RANK, RP, BM, BK, STAGES)
    elif EMIT_U or NEED_DB or NEED_DW:
        up_gradient(
            g, t, B, p, w, active, u_out, b_parts, dw_out,
            column, split, group, up_tiles, tl.num_programs(1), T, N, sg, sb_e, group_rows, rows_per_split, scale,
            SB_N, SB_R, RANK, RP, E, EP, MIX, HAS_ACTIVE, EMIT_U, NEED_DB, NEED_DW, BM, BN, SLOTS, STAGES,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ down: u -> dx, dA


@triton.jit
def logit_gradient(p, dw_rows, dw, token_mask, rows, end, E: tl.constexpr, EP: tl.constexpr, ROUTED: tl.constexpr,
                   HAS_MASK: tl.constexpr):  # fmt: skip
    """`p (dp - <p, dp>)  [BM, EP]`, with `dp` a row's own (`"token"`) or the mean's, up to the factor of
    `mean_gradient`."""
    experts = tl.arange(0, EP)
    mask = (rows < end)[:, None] & (experts < E)[None, :]
    place = rows[:, None] * E + experts[None, :]
    probability = tl.load(p + place, mask=mask, other=0.0)
    if ROUTED == "token":
        dp = tl.load(dw_rows + place, mask=mask, other=0.0)
    else:
        dp = tl.zeros_like(probability) + dw[None, :]
        if HAS_MASK:
            keep = tl.load(token_mask + rows, mask=rows < end, other=0) != 0
            dp = tl.where(keep[:, None], dp, 0.0)
    return probability * (dp - tl.sum(probability * dp, 1)[:, None])


@triton.jit
def mean_gradient(dw_parts, counts, group, group_rows, parts, E: tl.constexpr, EP: tl.constexpr, HAS_MASK: tl.constexpr,
                  CHUNK: tl.constexpr):  # fmt: skip
    """`dw [EP]` scaled into [-1, 1], and the factor `max |dw| / rows averaged over` that belongs to it.

    Split so because a 16-bit product takes the first as an operand: `dw / rows` would vanish in float16,
    and `dw` overflow.
    """
    experts = tl.arange(0, EP)
    index = tl.arange(0, CHUNK)
    total = tl.zeros([CHUNK, EP], tl.float32)
    for start in tl.range(0, parts, CHUNK):
        place = group.to(tl.int64) * parts + start + index
        mask = (start + index < parts)[:, None] & (experts < E)[None, :]
        total += tl.load(dw_parts + place[:, None] * E + experts[None, :], mask=mask, other=0.0)
    dw = tl.sum(total, 0)
    largest = tl.max(tl.abs(dw), 0)
    number = tl.cast(group_rows, tl.float32)
    if HAS_MASK:
        number = tl.load(counts + group)
    unit = tl.where(largest > 0.0, largest, 1.0)
    return dw / unit, unit / tl.maximum(number, 1.0)


@triton.jit
def down_gradient(
    x, u_parts, A, R, p, dw_rows, dw_parts, token_mask, counts, seed, dx, a_parts, r_parts,
    tile, split, group, splits, T, D, sx, group_rows, rows_per_split, dw_count, keep_scale, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PARTS: tl.constexpr,
    ROUTED: tl.constexpr, ROUTER: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, NEED_DR: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of columns and one run of rows of `x` and `dx`."""
    ON_X: tl.constexpr = (ROUTER == "x") and (ROUTED != "none")
    ON_T: tl.constexpr = (ROUTER == "t") and (ROUTED != "none")
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    cols = tile * BD + tl.arange(0, BD)
    dtype = dx.dtype.element_ty
    dw = tl.zeros([EP], tl.float32)
    unit = 1.0
    if ROUTED == "mean":
        dw, unit = mean_gradient(dw_parts, counts, group, group_rows, dw_count, E, EP, HAS_MASK, CHUNK)
    if NEED_DX:
        factor = load_factor(A, rank, cols, SA_R, SA_D, RANK, D).to(dtype)  # [RP, BD]
        if ON_X:
            router = load_factor(R, experts, cols, SR_E, SR_D, E, D).to(dtype)  # [EP, BD]
    acc = tl.zeros([RP, BD], tl.float32)
    acc_r = tl.zeros([EP, BD], tl.float32)
    first = group.to(tl.int64) * group_rows
    end = first + group_rows
    start = split * rows_per_split
    for begin in tl.range(start, tl.minimum(start + rows_per_split, group_rows), BM, num_stages=STAGES):
        rows = first + begin + tl.arange(0, BM)
        if NEED_DX or NEED_DA:
            u = hidden_rows(u_parts, rows, end, 0, T, RANK, RP, PARTS, BM)  # [BM, RP]
        if ROUTED != "none":
            logits = logit_gradient(p, dw_rows, dw, token_mask, rows, end, E, EP, ROUTED, HAS_MASK)  # [BM, EP]
            if ON_T:
                u += hidden_gradient(logits * unit, R, SR_E, SR_D, RANK, RP, E, EP, BM)
        if NEED_DX or NEED_DA:
            u = (u * tl.cast(keep_scale, tl.float32)).to(dtype)
        if DROPOUT:
            keep = keep_mask(seed, rows, tile * BD, threshold, BM, BD)
        if NEED_DX:
            value = product(u, factor, tl.zeros([BM, BD], tl.float32))
            if DROPOUT:
                value = tl.where(keep, value, 0.0)
            if ON_X:
                value += product(logits.to(dtype), router, tl.zeros([BM, BD], tl.float32)) * unit
            mask = (rows < end)[:, None] & (cols < D)[None, :]
            tl.store(dx + rows[:, None] * D + cols[None, :], value.to(dtype), mask=mask)
        if NEED_DA or (NEED_DR and ON_X):
            x_tile = load_rows(x, rows, cols, sx, end, D)  # [BM, BD]
            if NEED_DR and ON_X:
                acc_r = product(tl.trans(logits.to(dtype)), x_tile, acc_r)
            if NEED_DA:
                if DROPOUT:
                    x_tile = tl.where(keep, x_tile, 0.0)
                acc = product(tl.trans(u), x_tile, acc)
    run = group.to(tl.int64) * splits + split
    if NEED_DA:
        mask = (rank < RANK)[:, None] & (cols < D)[None, :]
        tl.store(a_parts + (run * RANK + rank)[:, None] * D + cols[None, :], acc, mask=mask)
    if NEED_DR and ON_X:
        mask = (experts < E)[:, None] & (cols < D)[None, :]
        tl.store(r_parts + (run * E + experts)[:, None] * D + cols[None, :], acc_r * unit, mask=mask)


@triton.jit
def hidden_gradient(logits, R, SR_E: tl.constexpr, SR_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
                    E: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr):  # fmt: skip
    """`dlogits R [BM, RP]`, the router's share of the gradient of `t`: E multiply-adds per value, in float32."""
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    value = tl.zeros([BM, RP], tl.float32)
    for e in tl.static_range(E):
        row = tl.load(R + e * SR_E + rank * SR_D, mask=rank < RANK, other=0.0).to(tl.float32)
        value += tl.sum(tl.where((experts == e)[None, :], logits, 0.0), 1)[:, None] * row[None, :]
    return value


@triton.jit
def router_gradient(
    t, p, dw_rows, dw_parts, token_mask, counts, r_parts, split, group, splits, T, group_rows, rows_per_split, dw_count,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROUTED: tl.constexpr, HAS_MASK:
    tl.constexpr, BM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """`dR = dlogits^T t [E, r]` over one run of rows, for a router on `t`."""
    rank = tl.arange(0, RP)
    experts = tl.arange(0, EP)
    dw = tl.zeros([EP], tl.float32)
    unit = 1.0
    if ROUTED == "mean":
        dw, unit = mean_gradient(dw_parts, counts, group, group_rows, dw_count, E, EP, HAS_MASK, CHUNK)
    acc = tl.zeros([EP, RP], tl.float32)
    first = group.to(tl.int64) * group_rows
    end = first + group_rows
    start = split * rows_per_split
    for begin in tl.range(start, tl.minimum(start + rows_per_split, group_rows), BM):
        rows = first + begin + tl.arange(0, BM)
        logits = logit_gradient(p, dw_rows, dw, token_mask, rows, end, E, EP, ROUTED, HAS_MASK)  # [BM, EP]
        hidden = hidden_rows(t, rows, end, 0, T, RANK, RP, 1, BM)  # [BM, RP]
        for e in tl.static_range(E):
            column = tl.sum(tl.where((experts == e)[None, :], logits, 0.0), 1)
            value = tl.sum(column[:, None] * hidden, 0)
            acc += tl.where((experts == e)[:, None], value[None, :], 0.0)
    run = group.to(tl.int64) * splits + split
    mask = (experts < E)[:, None] & (rank < RANK)[None, :]
    tl.store(r_parts + (run * E + experts)[:, None] * RANK + rank[None, :], acc * unit, mask=mask)


@triton.jit(do_not_specialize=["T", "group_rows", "rows_per_split", "dw_count", "threshold", "down_tiles"])
def down_kernel(
    x, u_parts, A, R, p, t, dw_rows, dw_parts, token_mask, counts, seed, dx, a_parts, r_parts,
    T, D, sx, group_rows, rows_per_split, dw_count, down_tiles, keep_scale, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SR_E: tl.constexpr, SR_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, PARTS: tl.constexpr,
    ROUTED: tl.constexpr, ROUTER: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_DA: tl.constexpr, NEED_DR: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Columns `0 .. down_tiles` run the body above, and one more the gradient of a router on `t`."""
    column, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    if column < down_tiles:
        down_gradient(
            x, u_parts, A, R, p, dw_rows, dw_parts, token_mask, counts, seed, dx, a_parts, r_parts,
            column, split, group, splits, T, D, sx, group_rows, rows_per_split, dw_count, keep_scale,
            threshold, SA_R, SA_D, SR_E, SR_D, RANK, RP, E, EP, PARTS, ROUTED, ROUTER, HAS_MASK, DROPOUT, NEED_DX,
            NEED_DA, NEED_DR, BM, BD, CHUNK, STAGES,
        )  # fmt: skip
    elif NEED_DR and (ROUTER == "t"):
        router_gradient(
            t, p, dw_rows, dw_parts, token_mask, counts, r_parts, split, group, splits,
            T, group_rows, rows_per_split, dw_count, RANK, RP, E, EP, ROUTED, HAS_MASK, BM, CHUNK,
        )  # fmt: skip
