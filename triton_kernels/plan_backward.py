"""From shapes to launches, backward: what one call passes from launch to launch, and which launches it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, plan, table
from .backward import down_kernel, up_kernel
from .reduce import reduce_kernel

# From this padded rank on, and from this many partials on, adding the partials of u in every column tile of dx (in
# flight in shared memory, 2 KB each at r = 16) costs more than row programs that read g a second time, from L2.
WIDE, MOST_PARTS = 64, 8
# Bytes of g in one run that row and column programs share: at r = 64 and d_out = 4096, the programs that an H100
# holds at once belong to six runs, 36 MB of its 50 MB of L2, and those of an A100 to three, 18 MB of 40.
SHARED_RUN = 6 << 20
# Bytes of the experts' tiles that a step of row programs loads: twice in the pipeline's buffers, beside those of g.
MIXED_TILES = 32 << 10


class Backward:
    """What one backward call passes from launch to launch: `u` and the partials, for `reduce` to add."""

    def __init__(
        self, op: str, g: Tensor, x: Tensor | None, A: Tensor | None, B: Tensor | None, p: float, seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.op, self.A, self.B = op, A, B
        self.shape = g.shape[:-1]
        self.g = plan.as_rows(g)
        self.x = None if x is None else plan.as_rows(x)
        self.T = self.g.shape[0]
        self.dtype = dtype
        drop, self.threshold, self.keep_scale = plan.dropout(p, seed)
        self.seed = seed if drop else None
        factor = A if B is None else B
        assert factor is not None
        self.rank = factor.shape[0] if B is None else factor.shape[-1]
        self.experts = B.shape[0] if B is not None and B.dim() == 3 else 1
        self.mix, self.groups, self.scale = "none", 1, 1.0
        self.u = self.t = self.p = self.w = self.active = self.R = self.token_mask = self.counts = None  # type: Tensor | None
        self.parts, self.runs, self.down_runs, self.dw_count = 1, 1, 1, 0
        self.routed, self.router = "none", "none"
        self.a_parts = self.b_parts = self.r_parts = self.dw = None  # type: Tensor | None

    def allocate(self, need_dx: bool, A: Tensor | None) -> tuple[Tensor, Tensor]:
        """`dx` and `dA`, empty `[0]` where not needed."""
        assert self.A is not None
        dx = self.g.new_empty((*self.shape, self.A.shape[1]) if need_dx else (0,), dtype=self.dtype)
        return dx, self.A.new_empty(0) if A is None else torch.empty_like(A)

    def _floats(self, *shape: int) -> Tensor:
        return self.g.new_empty(shape, dtype=torch.float32)

    def _slots(self) -> int:
        widest = table.WIDEST // plan.padded(self.rank)
        return min(plan.padded_experts(self.experts), max(1, widest)) if self.mix == "token" else 1

    def up(self, *, emit_u: bool, need_dB: bool, need_dw: bool = False) -> None:
        """One pass over `g`: `u` or partials of it, partials of `dB` (or the shared `G`) and of `dw`."""
        arch = plan.place(self.op, self.g, self.B, self.t, self.p, self.w, self.active)
        assert self.B is not None
        (T, N), rank, slots, token = self.g.shape, self.rank, self._slots(), self.mix == "token"
        columns_work = need_dB or need_dw
        by_rows = emit_u and (token or self.wide() or not columns_work)
        kernel, held = "up", 1
        if by_rows and self.mix == "weights":
            kernel, held = "up_mixed", self._mixed_at_once(arch)
        elif by_rows:
            kernel, held = "up_rows", plan.held_experts(self.experts, rank) if token else 1
        width = plan.padded(rank) * max(slots if need_dB else 1, plan.padded_experts(held) if token else 1)
        tile = plan.pick(kernel, arch, self.g, width, T)
        tiles = plan.cdiv(N, tile.cols) * (plan.cdiv(self.experts, slots) if token else 1)
        columns = tiles if columns_work or not by_rows else 0
        per_run, runs = plan.runs(T // self.groups, tile, tiles, self.groups, rank, arch)
        blocks = 0
        if by_rows:
            shared = max(SHARED_RUN // (N * self.g.element_size()), 12 * rank) // tile.rows * tile.rows
            per_run = max(tile.rows, min(per_run, shared)) if columns_work else tile.rows
            runs, self.parts = plan.cdiv(T // self.groups, per_run), plan.cdiv(self.experts, held) if token else 1
            blocks = per_run // tile.rows * self.parts
        elif emit_u:
            self.parts = tiles
        if emit_u:
            self.u = self._floats(self.parts, T, rank)
        if need_dB:
            self._allocate_dB(runs)
        if token and by_rows:
            self.dw = self._floats(T, self.experts)
        elif need_dw:
            self.dw_count = runs * tiles
            self.dw = self._floats(self.groups * self.dw_count, self.experts)
        launch.run(
            launch.Launch(
                "up_kernel",
                up_kernel,
                (columns + blocks, runs, self.groups),
                (
                    self.g, self.t if columns_work or token else None, self.B, self.p if token else None,
                    self.w if self.mix == "weights" else None, self.active if need_dB else None, self.u,
                    self.b_parts, self.dw,
                    T, N, self.g.stride(0), self.B.stride(0) if self.B.dim() == 3 else 0, T // self.groups, per_run,
                    columns, plan.segment(N, tile)[0] if by_rows else 1, float(self.scale),
                ),
                dict(
                    SB_N=self.B.stride(-2), SB_R=self.B.stride(-1), RANK=rank, RP=plan.padded(rank), E=self.experts,
                    EP=plan.padded(self.experts), MIX=self.mix, HAS_ACTIVE=self.active is not None and need_dB,
                    EMIT_U=emit_u and not by_rows, NEED_DB=need_dB, NEED_DW=need_dw and not token, BY_ROWS=by_rows,
                    HELD=held, HP=plan.padded_experts(held), BM=tile.rows, BK=tile.inner, BN=tile.cols, SLOTS=slots,
                    STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip

    def wide(self) -> bool:
        """Whether `u` should reach `down` as one tensor, not as one partial per column tile of `g`."""
        arch = plan.place(self.op, self.g)
        tile = plan.pick("up", arch, self.g, plan.padded(self.rank), self.T)
        return plan.padded(self.rank) >= WIDE or plan.cdiv(self.g.shape[1], tile.cols) > MOST_PARTS

    def _mixed_at_once(self, arch: str) -> int:
        """Experts whose tiles a step of row programs loads; the steps that one tile takes share them evenly."""
        assert self.B is not None
        tile = plan.pick("up_mixed", arch, self.g, plan.padded(self.rank), self.T)
        bytes_each = tile.inner * plan.padded(self.rank) * self.B.element_size()
        most = max(1, MIXED_TILES // bytes_each)
        return plan.cdiv(self.experts, plan.cdiv(self.experts, most))

    def _allocate_dB(self, runs: int) -> None:
        self.runs = runs
        experts = self.experts if self.mix == "token" else 1
        self.b_parts = self._floats(self.groups * self.runs, experts * self.rank, self.g.shape[1])

    def down(self, dx: Tensor | None, need_dA: bool, *, need_dR: bool = False) -> None:
        """One pass over `x` and `dx`: `dx`, partials of `dA` and `dR`."""
        arch = plan.place(self.op, self.g, self.x, self.A, self.R, self.u, self.p, self.seed)
        if dx is not None and dx.numel() == 0:
            dx = None
        need_dx = dx is not None
        if not (need_dx or need_dA or need_dR):
            return
        assert self.A is not None
        T, D, rank = self.T, self.A.shape[1], self.rank
        width = plan.padded(rank)
        if self.router == "x":  # a second accumulator: never the tile with most columns or stages
            width = max(width + plan.padded(self.experts), 64)
        sample = dx if dx is not None else self.g if self.x is None else self.x
        tile = plan.pick("down", arch, sample, width, T)
        if self.seed is not None and tile.cols < 64:  # one word of Philox has four columns, 16 apart
            tile = tile._replace(cols=64, warps=2 * tile.warps)
        down_tiles = plan.cdiv(D, tile.cols) if need_dx or need_dA or (need_dR and self.router == "x") else 0
        extra = int(need_dR and self.router == "t")
        per_run, self.down_runs = plan.runs(T // self.groups, tile, down_tiles + extra, self.groups, rank, arch)
        runs = self.groups * self.down_runs
        if need_dA:
            self.a_parts = self._floats(runs, rank, D)
        if need_dR:
            self.r_parts = self._floats(runs, self.experts, rank if self.router == "t" else D)
        R, token = self.R, self.routed == "token"
        launch.run(
            launch.Launch(
                "down_kernel",
                down_kernel,
                (down_tiles + extra, self.down_runs, self.groups),
                (
                    self.x if need_dA or (need_dR and self.router == "x") else None, self.u, self.A, R, self.p,
                    self.t if extra else None, self.dw if token else None, None if token else self.dw,
                    self.token_mask, self.counts, self.seed, sample, self.a_parts, self.r_parts,
                    T, D, 0 if self.x is None else self.x.stride(0), T // self.groups, per_run, self.dw_count,
                    down_tiles, self.keep_scale, self.threshold,
                ),
                dict(
                    SA_R=self.A.stride(0), SA_D=self.A.stride(1), SR_E=0 if R is None else R.stride(0),
                    SR_D=0 if R is None else R.stride(1), RANK=rank, RP=plan.padded(rank), E=self.experts,
                    EP=plan.padded(self.experts), PARTS=self.parts, ROUTED=self.routed, ROUTER=self.router,
                    HAS_MASK=self.token_mask is not None, DROPOUT=self.seed is not None,
                    NEED_DX=need_dx, NEED_DA=need_dA, NEED_DR=need_dR,
                    BM=tile.rows, BD=tile.cols, CHUNK=16, STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip

    def reduce(
        self,
        *,
        dA: Tensor | None = None,
        dB: Tensor | None = None,
        dR: Tensor | None = None,
        dweights: Tensor | None = None,
    ) -> None:
        """Add the partials of everything that was asked for, in one launch."""
        outputs = [out for out in (dA, dB, dR, dweights) if out is not None]
        if not outputs:
            return
        arch = plan.place(self.op, self.g, *outputs)
        tile = plan.pick("reduce", arch, self.g, plan.padded(self.rank), self.T)
        D, N = (0 if dA is None else dA.shape[1]), (0 if dB is None else dB.shape[-2])
        r_width = 0 if dR is None else dR.shape[1]
        a_tiles, b_tiles, r_tiles = (plan.cdiv(n, tile.cols) for n in (D, N, r_width))
        B, bank = dB, dB is not None and dB.dim() == 3

        def strides(out: Tensor | None) -> tuple[int, int]:
            return (0, 0) if out is None else (out.stride(-2), out.stride(-1))

        launch.run(
            launch.Launch(
                "reduce_kernel",
                reduce_kernel,
                (a_tiles + b_tiles + r_tiles + int(dweights is not None), 1, 1),
                (
                    self.a_parts, dA, self.b_parts, self.w, self.active, dB, self.r_parts, dR, self.dw, dweights,
                    D, N, r_width, B.stride(0) if B is not None and bank else 0, a_tiles, b_tiles, r_tiles,
                    self.groups, self.runs, self.groups * self.down_runs, self.dw_count,
                ),
                dict(
                    SA_R=strides(dA)[0], SA_D=strides(dA)[1], SB_N=strides(dB)[0], SB_R=strides(dB)[1],
                    SR_E=strides(dR)[0], SR_D=strides(dR)[1], RANK=self.rank, RP=plan.padded(self.rank), E=self.experts,
                    EP=plan.padded(self.experts), MIX=self.mix, HAS_ACTIVE=self.active is not None,
                    ONE_GROUP=self.groups == 1, NEED_DA=dA is not None,
                    NEED_DB=dB is not None, NEED_DR=dR is not None, NEED_DWEIGHTS=dweights is not None, BC=tile.cols,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip
