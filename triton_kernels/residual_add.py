"""Residual add in one pass: `out = [y +] s_out * (s_t * x A^T) B^T`.

A program owns `BM` rows. It walks `D` and keeps `t [BM, r]` in registers, then walks `N` and writes the result: `x` and
`y` are read once, `out` is written once, `D + 2N` passes in units of `[T, .]`. `A` and `B` are read `T / BM` times from
L2: with `BM >= 4r` that is at most a sixth of the activations' bytes.

Three uses of one kernel:

* forward (F1): `s_t = 1`, `s_out = s`, `t` stored if backward needs it;
* small T (F2): a second grid dimension splits `N`, every program computes its own `t` from L2; still one launch;
* backward of `x` alone (`A` and `B` frozen): `x := g`, `A := B^T`, `B := A^T`, no `y`; 2 passes.

`D` is summed in `SEGMENTS` runs that are then added in order, as split-K in `shrink.py` does: the two agree bit for
bit, and a row's result does not depend on how many rows the call has. A tile `BK` is the same for every `T`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import keep_mask, load_factor, load_rows, product
from .shrink import shrink_rows


@triton.jit(do_not_specialize=["T", "segment", "tiles", "threshold"])
def residual_add_kernel(
    x, A, y, B, out, t_out, seed,
    T, D, N, sx, sy, so, segment, tiles, scale_t, scale_out, threshold,
    SA_R: tl.constexpr, SA_D: tl.constexpr, SB_N: tl.constexpr, SB_R: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr,
    HAS_Y: tl.constexpr, SAVE_T: tl.constexpr, DROP_INPUT: tl.constexpr, DROP_OUTPUT: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    rank = tl.arange(0, RP)
    t, _ = shrink_rows(
        x, A, None, seed, rows, T, D, sx, 0, tl.cdiv(D, BK), segment, threshold,
        SA_R, SA_D, 0, 0, RANK, RP, 1, 1, DROP_INPUT, False, BM, BK, STAGES,
    )  # fmt: skip
    t *= tl.cast(scale_t, tl.float32)
    if SAVE_T:  # noqa: SIM102 (the outer one is decided at compile time)
        if tl.program_id(1) == 0:
            mask = (rows < T)[:, None] & (rank < RANK)[None, :]
            tl.store(t_out + rows[:, None] * RANK + rank[None, :], t, mask=mask)
    left = t.to(out.dtype.element_ty)
    # In tiles, not columns: a multiple of BN that the compiler can see is what keeps the loads 16 bytes wide.
    start = tl.program_id(1) * tiles * BN
    stop = tl.minimum(start + tiles * BN, N)
    for begin in tl.range(start, stop, BN, num_stages=STAGES):
        cols = begin + tl.arange(0, BN)
        b_tile = load_factor(B, rank, cols, SB_R, SB_N, RANK, N).to(left.dtype)  # [RP, BN]
        update = product(left, b_tile, tl.zeros([BM, BN], tl.float32)) * tl.cast(scale_out, tl.float32)
        if DROP_OUTPUT:
            update = tl.where(keep_mask(seed, rows, begin, threshold, BM, BN), update, 0.0)
        if HAS_Y:
            update += load_rows(y, rows, cols, sy, T, N).to(tl.float32)
        mask = (rows < T)[:, None] & (cols < N)[None, :]
        tl.store(out + rows[:, None] * so + cols[None, :], update.to(out.dtype.element_ty), mask=mask)
