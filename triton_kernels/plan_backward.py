"""From shapes to launches, backward: what one call passes from launch to launch, and which launches it takes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, plan, table
from .backward import down_kernel, token_hidden_kernel, up_kernel
from .reduce import reduce_kernel, sum_parts_kernel

# From this padded rank on, and from this many partials on, adding the partials of u in every column tile of dx (in
# flight in shared memory, 2 KB each at r = 16) costs more than a second pass over g.
WIDE, MOST_PARTS = 64, 8


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
        """One pass over `g`: partials of `u`, of `dB` (or the shared `G`) and of `dw`."""
        arch = plan.place(self.op, self.g, self.B, self.t, self.p, self.w, self.active)
        assert self.B is not None
        (T, N), rank, slots = self.g.shape, self.rank, self._slots()
        width = slots * plan.padded(rank)
        tile = plan.pick("up", arch, self.g, width, T)
        columns = plan.cdiv(N, tile.cols)
        expert_groups = plan.cdiv(self.experts, slots) if self.mix == "token" else 1
        per_run, self.runs = plan.runs(T // self.groups, tile, columns * expert_groups, self.groups, rank, arch)
        if emit_u:
            self.u, self.parts = self._floats(columns, T, rank), columns
        if need_dB:
            self._allocate_dB()
        if need_dw:
            self.dw_count = self.runs * columns
            self.dw = self._floats(self.groups * self.dw_count, self.experts)
        bank = self.B.dim() == 3
        launch.run(
            launch.Launch(
                "up_kernel",
                up_kernel,
                (columns * expert_groups, self.runs, self.groups),
                (
                    self.g, self.t if need_dB or need_dw else None, self.B, self.p if self.mix == "token" else None,
                    self.w if self.mix == "weights" else None, self.active, self.u if emit_u else None,
                    self.b_parts, self.dw,
                    T, N, self.g.stride(0), self.B.stride(0) if bank else 0, T // self.groups, per_run,
                    float(self.scale),
                ),
                dict(
                    SB_N=self.B.stride(-2), SB_R=self.B.stride(-1), RANK=rank, RP=plan.padded(rank), E=self.experts,
                    EP=plan.padded(self.experts), MIX=self.mix, HAS_ACTIVE=self.active is not None, EMIT_U=emit_u,
                    NEED_DB=need_dB, NEED_DW=need_dw, BM=tile.rows, BN=tile.cols, SLOTS=slots, STAGES=tile.stages,
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

    def sum_u(self) -> None:
        """Add the partials of `u` once, where adding them in every column tile of `dx` would cost more."""
        if self.u is None or self.parts == 1:
            return
        arch = plan.place(self.op, self.g)
        tile = plan.pick("reduce", arch, self.g, plan.padded(self.rank), self.T)
        u, count, block = self._floats(self.T, self.rank), self.T * self.rank, 8 * tile.cols
        launch.run(
            launch.Launch(
                "sum_parts_kernel",
                sum_parts_kernel,
                (plan.cdiv(count, block), 1, 1),
                (self.u, u, count, self.parts),
                dict(BLOCK=block),
                tile.warps,
                tile.stages,
            )
        )
        self.u, self.parts = u, 1

    def _allocate_dB(self) -> None:
        experts = self.experts if self.mix == "token" else 1
        self.b_parts = self._floats(self.groups * self.runs, experts * self.rank, self.g.shape[1])

    def down(self, dx: Tensor | None, need_dA: bool, *, need_dR: bool = False, with_dB: bool = False) -> None:
        """One pass over `x` and `dx`: `dx`, partials of `dA` and `dR`; `with_dB` adds the pass over `g` for `dB`."""
        arch = plan.place(self.op, self.g, self.x, self.A, self.R, self.u, self.p, self.seed)
        if dx is not None and dx.numel() == 0:
            dx = None
        need_dx = dx is not None
        if not (need_dx or need_dA or need_dR or with_dB):
            return
        assert self.A is not None
        T, D, rank = self.T, self.A.shape[1], self.rank
        N = self.g.shape[1] if with_dB else 0
        slots = self._slots() if with_dB else 1
        width = plan.padded(rank) * slots + (plan.padded(self.experts) if self.router == "x" else 0)
        sample = dx if dx is not None else self.g if self.x is None else self.x
        tile = plan.pick("down", arch, sample, width, T)
        down_tiles = plan.cdiv(D, tile.cols) if need_dx or need_dA or (need_dR and self.router == "x") else 0
        up_tiles = plan.cdiv(N, tile.cols) * (plan.cdiv(self.experts, slots) if self.mix == "token" else 1)
        extra = int(need_dR and self.router == "t")
        columns = up_tiles + down_tiles + extra
        per_run, self.down_runs = plan.runs(T // self.groups, tile, columns, self.groups, rank, arch)
        runs = self.groups * self.down_runs
        if need_dA:
            self.a_parts = self._floats(runs, rank, D)
        if need_dR:
            self.r_parts = self._floats(runs, self.experts, rank if self.router == "t" else D)
        if with_dB:
            self.runs = self.down_runs
            self._allocate_dB()
        B, R = self.B if with_dB else None, self.R
        token = self.routed == "token"
        launch.run(
            launch.Launch(
                "down_kernel",
                down_kernel,
                (columns, self.down_runs, self.groups),
                (
                    self.x if need_dA or (need_dR and self.router == "x") else None, self.u, self.A, R, self.p,
                    self.t if with_dB or extra else None, self.dw if token else None, None if token else self.dw,
                    self.token_mask, self.counts, self.seed, sample, self.a_parts, self.r_parts,
                    self.g if with_dB else None, B, self.active, self.b_parts,
                    T, D, N, 0 if self.x is None else self.x.stride(0), self.g.stride(0) if with_dB else 0,
                    B.stride(0) if B is not None and B.dim() == 3 else 0, T // self.groups, per_run, self.dw_count,
                    up_tiles, down_tiles, self.keep_scale, float(self.scale), self.threshold,
                ),
                dict(
                    SA_R=self.A.stride(0), SA_D=self.A.stride(1), SR_E=0 if R is None else R.stride(0),
                    SR_D=0 if R is None else R.stride(1), SB_N=0 if B is None else B.stride(-2),
                    SB_R=0 if B is None else B.stride(-1), RANK=rank, RP=plan.padded(rank), E=self.experts,
                    EP=plan.padded(self.experts), PARTS=self.parts, ROUTED=self.routed, ROUTER=self.router,
                    MIX=self.mix,
                    HAS_MASK=self.token_mask is not None, DROPOUT=self.seed is not None,
                    HAS_ACTIVE=self.active is not None, NEED_DX=need_dx, NEED_DA=need_dA, NEED_DR=need_dR,
                    WITH_UP=with_dB, BM=tile.rows, BD=tile.cols, SLOTS=slots, CHUNK=16, STAGES=tile.stages,
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


def token_hidden(state: Backward) -> None:
    """The row kernel of token routing: `u = dt [chunks, T, r]` and `dw [T, E]`, from one pass over `g` per chunk of
    experts."""
    arch = plan.place(state.op, state.g, state.B, state.p, state.t)
    assert state.B is not None
    (T, N), rank, experts = state.g.shape, state.rank, state.experts
    width = max(1, table.WIDEST // plan.padded(rank))
    state.parts = plan.cdiv(experts, width)
    state.u, state.dw = state._floats(state.parts, T, rank), state._floats(T, experts)
    for part, first in enumerate(range(0, experts, width)):
        chunk = min(width, experts - first)
        held = plan.padded_experts(chunk)
        tile = plan.pick("token_hidden", arch, state.g, held * plan.padded(rank), T)
        launch.run(
            launch.Launch(
                "token_hidden_kernel",
                token_hidden_kernel,
                (plan.cdiv(T, tile.rows), 1, 1),
                (
                    state.g, state.t, state.B, state.p, state.u[part], state.dw, T, N, state.g.stride(0),
                    state.B.stride(0), first, float(state.scale),
                ),
                dict(
                    SB_N=state.B.stride(-2), SB_R=state.B.stride(-1), RANK=rank, RP=plan.padded(rank), E=chunk, EP=held,
                    EXPERTS=experts, BM=tile.rows, BN=tile.cols, STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip
