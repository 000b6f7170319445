"""The backend `triton`: every op of `ops.py` as a handful of launches of the kernels in `triton_kernels/`.

Runs CUDA, ROCm and XPU tensors, and CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`, before the first import).
Launches are planned from shapes alone (no device query, no host synchronisation, nothing cached by pointer), so CUDA
graphs can capture them. What each op launches:

| op | launches |
|---|---|
| residual add, T <= 128 or T > 2048 | 1 (F2, F1) |
| residual add, middle T | 2: split-K shrink, expand (F3) |
| routed projection | 2: shrink with router, expand with the bank mixed per program (F4, F5) |
| backward | 3: up (or a row kernel), down, reduce; 1 when `x` alone needs a gradient |

Signatures are those of `ops.SCHEMAS`; a result that was not asked for is an empty tensor.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .reference import dropout_threshold

OLDEST_TRITON = (3, 6)
SMALL, MIDDLE = 128, 2048  # T up to which one launch splits d_out, and up to which d_in is split
# From this padded rank on, and from this many partials on, adding the partials of u in every column tile of dx (in flight in
# shared memory, 2 KB each at r = 16) costs more than a second pass over g.
WIDE, MOST_PARTS = 64, 8


def unavailable_reason() -> str | None:
    """Why the backend cannot run on this machine, in one line; None when it can. Imports neither Triton nor a driver."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (CUDA and ROCm builds of PyTorch bring it)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    built = torch.version.cuda or torch.version.hip or (torch.version.xpu if hasattr(torch.version, "xpu") else None)
    if built:
        return "PyTorch finds no GPU (a driver without a device, or no driver); TRITON_INTERPRET=1 runs CPU tensors"
    return f"PyTorch {torch.__version__} has no GPU support; install a CUDA or ROCm build, or set TRITON_INTERPRET=1 for CPU tensors"


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of `lowrank_fast.triton_kernels`, imported at the first use; in a source tree, from the folder beside it."""
    package = f"{__package__}.triton_kernels"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        folder = Path(__file__).resolve().parent.parent / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[package] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if name == "launch":
        _check_version()
    return importlib.import_module(f"{package}.{name}")


def _check_version() -> None:
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        raise RuntimeError(f"backend 'triton' needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer; got {triton.__version__}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        importlib.import_module(f"{__package__}.triton_kernels.interpreter").repair_dot()


# ------------------------------------------------------------------------------------------------ shared pieces


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(n: int) -> int:
    """A rank or a number of experts as the kernels hold it: at least 16, a power of two."""
    return max(16, 1 << (n - 1).bit_length())


def _rows(x: Tensor) -> Tensor:
    """`[.., d]` as `[T, d]` with unit inner stride, copied only where strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _plan(op: str, x: Tensor, *others: Tensor | None) -> tuple[ModuleType, str]:
    """The launcher and the architecture for tensors on the device of `x`."""
    launch = kernels("launch")
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: all tensors must be on {x.device}; got one on {tensor.device}")
    if x.dtype is torch.float64:
        raise RuntimeError("backend 'triton' runs float32, bfloat16 and float16; float64 runs on 'reference' only")
    if x.device.type == "cpu" and not launch.interpreted():
        raise RuntimeError(
            f"{op}: backend 'triton' runs CPU tensors only in Triton's interpreter; set TRITON_INTERPRET=1 before starting"
        )
    return launch, launch.architecture(x.device)


def _dropout(p: float, seed: Tensor | None) -> tuple[bool, int, float]:
    """Whether there is dropout, its threshold, and the factor of what is kept."""
    if p == 0.0 or seed is None:
        return False, 0, 1.0
    return True, dropout_threshold(p), 1.0 / (1.0 - p)


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return like.new_empty(0, dtype=dtype or like.dtype)


def _hidden(x: Tensor, width: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], width), dtype=torch.float32)


def _table(kernel: str, arch: str, x: Tensor, width: int, T: int) -> Any:
    return kernels("table").row(kernel, arch, x.element_size(), width, T)


def _chunks(rank: int) -> list[slice]:
    """The ranks that one launch takes at a time."""
    widest = kernels("table").WIDEST
    return [slice(first, min(first + widest, rank)) for first in range(0, rank, widest)]


def _check_bank(A: Tensor) -> None:
    if A.shape[0] > kernels("table").WIDEST:
        raise ValueError(
            f"routed_projection: backend 'triton' takes ranks up to {kernels('table').WIDEST}; got {A.shape[0]}: "
            "use backend 'reference'"
        )


def _segment(d: int, tile: Any) -> tuple[int, int]:
    """Tiles of `D` in one run, and the number of runs."""
    tiles = _cdiv(d, tile.inner)
    segment = max(1, _cdiv(tiles, kernels("table").SEGMENTS))
    return segment, max(1, _cdiv(tiles, segment))


def _runs(rows: int, tile: Any, columns: int, groups: int, rank: int, arch: str) -> tuple[int, int]:
    """Rows of one run (a multiple of the tile) and runs per group: enough programs to fill the machine once, and not so
    many that their partials (`4 r` bytes per column each) cost more than an eighth of the rows that they reduce."""
    blocks = max(1, _cdiv(rows, tile.rows))
    wanted = max(1, kernels("table").PROCESSORS[arch] // max(1, columns * groups))
    affordable = max(1, rows // (4 * rank))
    per_run = _cdiv(blocks, min(wanted, affordable, blocks))
    return per_run * tile.rows, _cdiv(blocks, per_run)


# ------------------------------------------------------------------------------------------------ single launches


def _fused(
    op: str, x: Tensor, A: Tensor, y: Tensor | None, B: Tensor, out: Tensor, t_out: Tensor | None,
    scale_t: float, scale_out: float, seed: Tensor | None, threshold: int, drop: str,
) -> None:  # fmt: skip
    """`out = [y +] scale_out * (scale_t * x A^T) B^T` on `[T, .]` tensors; `drop`: "input", "output" or "none"."""
    launch, arch = _plan(op, x, A, y, B, out, seed)
    (T, D), N, rank = x.shape, out.shape[1], A.shape[0]
    tile = _table("residual_add", arch, x, padded(rank), T)
    blocks, tiles = _cdiv(T, tile.rows), _cdiv(N, tile.cols)
    splits = min(max(kernels("table").PROCESSORS[arch] // blocks, 1), tiles)
    per_split = _cdiv(tiles, splits)
    launch.run(
        launch.Launch(
            "residual_add_kernel",
            kernels("residual_add").residual_add_kernel,
            (blocks, _cdiv(tiles, per_split), 1),
            (
                x, A, y, B, out, t_out, seed, T, D, N, x.stride(0), 0 if y is None else y.stride(0), out.stride(0),
                _segment(D, tile)[0], per_split, float(scale_t), float(scale_out), threshold,
            ),
            dict(
                SA_R=A.stride(0), SA_D=A.stride(1), SB_N=B.stride(0), SB_R=B.stride(1), RANK=rank, RP=padded(rank),
                HAS_Y=y is not None, SAVE_T=t_out is not None, DROP_INPUT=drop == "input", DROP_OUTPUT=drop == "output",
                BM=tile.rows, BK=tile.inner, BN=tile.cols, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip


def _shrink(
    op: str, x: Tensor, A: Tensor, t: Tensor, scale_t: float, seed: Tensor | None, threshold: int,
    *, parts: int = 1, R: Tensor | None = None, router: str = "none", p: Tensor | None = None, groups: int = 1,
    means: bool = False, token_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int]:  # fmt: skip
    """`t = scale_t * dropout(x) A^T` (raw partials if `parts > 1`), with `p`, and its sums and counts per row block if `means`."""
    launch, arch = _plan(op, x, A, R, token_mask, seed)
    T, D = x.shape
    rank = A.shape[0]
    experts = 1 if R is None else R.shape[0]
    tile = _table("shrink", arch, x, max(padded(rank), padded(experts)), T)
    blocks = _cdiv(T // groups, tile.rows)
    sums = counts = None
    if means:
        sums = t.new_empty(groups * blocks, padded(experts))
        counts = t.new_empty(groups * blocks)
    launch.run(
        launch.Launch(
            "shrink_kernel",
            kernels("shrink").shrink_kernel,
            (blocks, parts, groups),
            (
                x, A, R, token_mask, t, p, sums, counts, seed,
                T, D, x.stride(0), _segment(D, tile)[0], T // groups, float(scale_t), threshold,
            ),
            dict(
                SA_R=A.stride(0), SA_D=A.stride(1), SR_E=0 if R is None else R.stride(0), SR_D=0 if R is None else R.stride(1),
                RANK=rank, RP=padded(rank), E=experts, EP=padded(experts), ROUTER=router, SUMS=means,
                HAS_MASK=token_mask is not None, DROPOUT=seed is not None, SPLIT=parts > 1,
                BM=tile.rows, BK=tile.inner, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip
    return sums, counts, blocks


def _expand(
    op: str, y: Tensor, t: Tensor, B: Tensor, out: Tensor, scale: float,
    *, mix: str = "none", p: Tensor | None = None, w: Tensor | None = None, sums: Tensor | None = None,
    counts: Tensor | None = None, blocks: int = 0, groups: int = 1, parts: int = 1, scale_t: float = 1.0,
    t_out: Tensor | None = None, w_out: Tensor | None = None, first: int = 0, chunk: int = 0,
) -> None:  # fmt: skip
    """`out = y + scale * t B^T`; `B` is a bank `[E, d_out, r]` with `mix` "weights", "sums" or "token" (experts `first ..`)."""
    launch, arch = _plan(op, y, t, B, out, p, w)
    (T, N), rank = y.shape, B.shape[-1]
    bank = B.dim() == 3
    total = B.shape[0] if bank else 1
    experts = chunk or total
    held = padded_experts(experts) if mix == "token" else padded(experts)
    width = held * padded(rank) if mix == "token" else padded(rank)
    tile = _table("expand", arch, y, width, T)
    columns = _cdiv(N, tile.cols)
    per_group = T // groups
    wanted = max(1, 2 * kernels("table").PROCESSORS[arch] // (columns * groups))
    per_run = _cdiv(_cdiv(per_group, tile.rows), wanted) * tile.rows
    launch.run(
        launch.Launch(
            "expand_kernel",
            kernels("expand").expand_kernel,
            (columns, _cdiv(per_group, per_run), groups),
            (
                y, t, B, p, w, sums, counts, out, t_out, w_out,
                T, N, y.stride(0), out.stride(0), B.stride(0) if bank else 0, blocks, per_group, per_run, first,
                float(scale_t), float(scale),
            ),
            dict(
                SB_N=B.stride(-2), SB_R=B.stride(-1), RANK=rank, RP=padded(rank), E=experts, EP=held, EXPERTS=total,
                MIX=mix, PARTS=parts, SAVE_T=t_out is not None, SAVE_W=w_out is not None,
                BM=tile.rows, BN=tile.cols, CHUNK=64, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip


def padded_experts(n: int) -> int:
    """Experts as a rank-`E r` factor holds them: a power of two, beside a rank that is padded itself."""
    return 1 << (n - 1).bit_length()


# ------------------------------------------------------------------------------------------------ residual add, forward


def residual_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> tuple[Tensor, Tensor]:
    """`out = y + scale * dropout(x) A^T B^T`, and `t` for backward."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, out=out)


def residual_add_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool
) -> Tensor:
    """`residual_add` over `y`."""
    return residual_add_out(y, x, A, B, scale, dropout_p, seed, save_t, out=y)


def residual_add_out(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None, save_t: bool,
    *, out: Tensor,
) -> Tensor:  # fmt: skip
    """`residual_add` into `out`, which may be `y` itself."""
    t = _hidden(x, A.shape[0]) if save_t else _empty(x, torch.float32)
    with _Target(out) as target:
        _residual_add(_rows(y), _rows(x), A, B, target, t if save_t else None, scale, dropout_p, seed)
    return t


class _Target:
    """`[.., d]` as a `[T, d]` that can be written; copied back at the end where strides forbid a view."""

    def __init__(self, out: Tensor) -> None:
        self.out = out
        flat = out.reshape(-1, out.shape[-1])
        self.direct = flat.data_ptr() == out.data_ptr() and (flat.stride(1) == 1 or flat.shape[1] == 1)
        self.rows = flat if self.direct else torch.empty(flat.shape, dtype=out.dtype, device=out.device)

    def __enter__(self) -> Tensor:
        return self.rows

    def __exit__(self, *error: object) -> None:
        if not self.direct:
            self.out.copy_(self.rows.view(self.out.shape))


def _residual_add(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, out: Tensor, t: Tensor | None, scale: float, p: float, seed: Tensor | None
) -> None:
    T, rank = x.shape[0], A.shape[0]
    if T == 0 or out.shape[1] == 0:
        return
    if rank > kernels("table").WIDEST:
        for part in _chunks(rank):
            hidden = None if t is None else t.new_empty(T, part.stop - part.start)
            _residual_add(y, x, A[part], B[:, part], out, hidden, scale, p, seed)
            if t is not None:
                t.view(T, rank)[:, part] = hidden
            y = out
        return
    drop, threshold, keep_scale = _dropout(p, seed)
    seed = seed if drop else None
    if T <= SMALL or T > MIDDLE:
        _fused("residual_add", x, A, y, B, out, t, keep_scale, scale, seed, threshold, "input" if drop else "none")
        return
    _, arch = _plan("residual_add", x)
    parts = _segment(x.shape[1], _table("shrink", arch, x, padded(rank), T))[1]
    hidden = x.new_empty((parts, T, rank), dtype=torch.float32)
    _shrink("residual_add", x, A, hidden, keep_scale, seed, threshold, parts=parts)
    scale_t = keep_scale if parts > 1 else 1.0
    _expand("residual_add", y, hidden, B, out, scale, parts=parts, scale_t=scale_t, t_out=t)


# ------------------------------------------------------------------------------------------------ the two halves


def shrink(x: Tensor, A: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    """`t = dropout(x) A^T [.., r]` in float32."""
    t = _hidden(x, A.shape[0])
    drop, threshold, keep_scale = _dropout(dropout_p, seed)
    if x.numel() // max(x.shape[-1], 1):
        for part in _chunks(A.shape[0]):
            width = part.stop - part.start
            hidden = t if width == A.shape[0] else _hidden(x, width)
            _shrink("shrink", _rows(x), A[part], hidden, keep_scale, seed if drop else None, threshold)
            if hidden is not t:
                t[..., part] = hidden
    return t


def expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float) -> Tensor:
    """`y + scale * t B^T`."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    _expand_add(y, t, B, scale, out)
    return out


def expand_add_(y: Tensor, t: Tensor, B: Tensor, scale: float) -> None:
    """`expand_add` over `y`."""
    _expand_add(y, t, B, scale, y)


def _expand_add(y: Tensor, t: Tensor, B: Tensor, scale: float, out: Tensor) -> None:
    with _Target(out) as target:
        source = _rows(y)
        for part in _chunks(B.shape[1]) if target.numel() else []:
            _expand("expand_add", source, _rows(t)[:, part].contiguous(), B[:, part], target, scale)
            source = target


def shrink_backward(
    dt: Tensor, x: Tensor | None, A: Tensor, dropout_p: float, seed: Tensor | None, dx_dtype: torch.dtype,
    need_dx: bool, need_dA: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`dx = dropout(dt A)` and `dA = dt^T dropout(x)`."""
    if A.shape[0] > kernels("table").WIDEST:
        pieces = [
            shrink_backward(dt[..., part].contiguous(), x, A[part], dropout_p, seed, dx_dtype, need_dx, need_dA)
            for part in _chunks(A.shape[0])
        ]
        return _joined(pieces, (None, 0))
    state = _Backward("shrink_backward", dt, x, A, None, dropout_p, seed, dx_dtype)
    state.u, state.parts = _rows(dt).contiguous(), 1
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    state.down(dx, need_dA)
    state.reduce(dA=dA if need_dA else None)
    return dx, dA


def expand_add_backward(
    g: Tensor, t: Tensor, B: Tensor, scale: float, need_dt: bool, need_dB: bool
) -> tuple[Tensor, Tensor]:
    """`dt = scale * g B` in float32 and `dB = scale * g^T t`."""
    if B.shape[1] > kernels("table").WIDEST:
        pieces = [
            expand_add_backward(g, t[..., part].contiguous(), B[:, part], scale, need_dt, need_dB)
            for part in _chunks(B.shape[1])
        ]
        return _joined(pieces, (-1, 1))
    dt = _hidden(g, B.shape[1]) if need_dt else _empty(g, torch.float32)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    rows = _rows(g)
    if need_dt and rows.shape[0]:
        _shrink("expand_add_backward", rows, B.mT, dt, scale, None, 0)
    if need_dB:
        state = _Backward("expand_add_backward", g, None, None, B, 0.0, None, g.dtype)
        state.t, state.scale = _rows(t).contiguous(), scale
        state.up(emit_u=False, need_dB=True)
        state.reduce(dB=dB)
    return dt, dB


def _joined(pieces: list[tuple[Tensor, ...]], dims: tuple[int | None, ...]) -> Any:
    """Results of chunks of the rank as one: added where the dimension is None, else concatenated along it."""
    results = []
    for values, dim in zip(zip(*pieces, strict=True), dims, strict=True):
        if values[0].numel() == 0:
            results.append(values[0])
        else:
            results.append(torch.cat(values, dim) if dim is not None else functools.reduce(torch.add, values))
    return tuple(results)


# ------------------------------------------------------------------------------------------------ backward


class _Backward:
    """What one backward call passes from launch to launch: `u` and the partials, for `reduce` to add."""

    def __init__(
        self, op: str, g: Tensor, x: Tensor | None, A: Tensor | None, B: Tensor | None, p: float, seed: Tensor | None,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.op, self.A, self.B = op, A, B
        self.shape = g.shape[:-1]
        self.g = _rows(g)
        self.x = None if x is None else _rows(x)
        self.T = self.g.shape[0]
        self.dtype = dtype
        drop, self.threshold, self.keep_scale = _dropout(p, seed)
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
        widest = kernels("table").WIDEST // padded(self.rank)
        return min(padded_experts(self.experts), max(1, widest)) if self.mix == "token" else 1

    def up(self, *, emit_u: bool, need_dB: bool, need_dw: bool = False) -> None:
        """One pass over `g`: partials of `u`, of `dB` (or the shared `G`) and of `dw`."""
        launch, arch = _plan(self.op, self.g, self.B, self.t, self.p, self.w, self.active)
        assert self.B is not None
        (T, N), rank, slots = self.g.shape, self.rank, self._slots()
        width = slots * padded(rank)
        tile = _table("up", arch, self.g, width, T)
        columns = _cdiv(N, tile.cols)
        expert_groups = _cdiv(self.experts, slots) if self.mix == "token" else 1
        per_run, self.runs = _runs(T // self.groups, tile, columns * expert_groups, self.groups, rank, arch)
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
                kernels("backward").up_kernel,
                (columns * expert_groups, self.runs, self.groups),
                (
                    self.g, self.t if need_dB or need_dw else None, self.B, self.p if self.mix == "token" else None,
                    self.w if self.mix == "weights" else None, self.active, self.u if emit_u else None, self.b_parts, self.dw,
                    T, N, self.g.stride(0), self.B.stride(0) if bank else 0, T // self.groups, per_run, float(self.scale),
                ),
                dict(
                    SB_N=self.B.stride(-2), SB_R=self.B.stride(-1), RANK=rank, RP=padded(rank), E=self.experts,
                    EP=padded(self.experts), MIX=self.mix, HAS_ACTIVE=self.active is not None, EMIT_U=emit_u,
                    NEED_DB=need_dB, NEED_DW=need_dw, BM=tile.rows, BN=tile.cols, SLOTS=slots, STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip

    def wide(self) -> bool:
        """Whether `u` should reach `down` as one tensor, not as one partial per column tile of `g`."""
        arch = _plan(self.op, self.g)[1]
        tile = _table("up", arch, self.g, padded(self.rank), self.T)
        return padded(self.rank) >= WIDE or _cdiv(self.g.shape[1], tile.cols) > MOST_PARTS

    def sum_u(self) -> None:
        """Add the partials of `u` once, where adding them in every column tile of `dx` would cost more."""
        if self.u is None or self.parts == 1:
            return
        launch, arch = _plan(self.op, self.g)
        tile = _table("reduce", arch, self.g, padded(self.rank), self.T)
        u, count, block = self._floats(self.T, self.rank), self.T * self.rank, 8 * tile.cols
        launch.run(
            launch.Launch(
                "sum_parts_kernel",
                kernels("reduce").sum_parts_kernel,
                (_cdiv(count, block), 1, 1),
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
        launch, arch = _plan(self.op, self.g, self.x, self.A, self.R, self.u, self.p, self.seed)
        if dx is not None and dx.numel() == 0:
            dx = None
        need_dx = dx is not None
        if not (need_dx or need_dA or need_dR or with_dB):
            return
        assert self.A is not None
        T, D, rank = self.T, self.A.shape[1], self.rank
        N = self.g.shape[1] if with_dB else 0
        slots = self._slots() if with_dB else 1
        width = padded(rank) * slots + (padded(self.experts) if self.router == "x" else 0)
        sample = self.g if dx is None else dx
        tile = _table("down", arch, sample, width, T)
        down_tiles = _cdiv(D, tile.cols) if need_dx or need_dA or (need_dR and self.router == "x") else 0
        up_tiles = _cdiv(N, tile.cols) * (_cdiv(self.experts, slots) if self.mix == "token" else 1)
        extra = int(need_dR and self.router == "t")
        columns = up_tiles + down_tiles + extra
        per_run, self.down_runs = _runs(T // self.groups, tile, columns, self.groups, rank, arch)
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
                kernels("backward").down_kernel,
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
                    SB_R=0 if B is None else B.stride(-1), RANK=rank, RP=padded(rank), E=self.experts,
                    EP=padded(self.experts), PARTS=self.parts, ROUTED=self.routed, ROUTER=self.router, MIX=self.mix,
                    HAS_MASK=self.token_mask is not None, DROPOUT=self.seed is not None,
                    HAS_ACTIVE=self.active is not None, NEED_DX=need_dx, NEED_DA=need_dA, NEED_DR=need_dR,
                    WITH_UP=with_dB, BM=tile.rows, BD=tile.cols, SLOTS=slots, CHUNK=16, STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip

    def reduce(
        self, *, dA: Tensor | None = None, dB: Tensor | None = None, dR: Tensor | None = None, dweights: Tensor | None = None
    ) -> None:
        """Add the partials of everything that was asked for, in one launch."""
        outputs = [out for out in (dA, dB, dR, dweights) if out is not None]
        if not outputs:
            return
        launch, arch = _plan(self.op, self.g, *outputs)
        tile = _table("reduce", arch, self.g, padded(self.rank), self.T)
        D, N = (0 if dA is None else dA.shape[1]), (0 if dB is None else dB.shape[-2])
        r_width = 0 if dR is None else dR.shape[1]
        a_tiles, b_tiles, r_tiles = (_cdiv(n, tile.cols) for n in (D, N, r_width))
        B, bank = dB, dB is not None and dB.dim() == 3

        def strides(out: Tensor | None) -> tuple[int, int]:
            return (0, 0) if out is None else (out.stride(-2), out.stride(-1))

        launch.run(
            launch.Launch(
                "reduce_kernel",
                kernels("reduce").reduce_kernel,
                (a_tiles + b_tiles + r_tiles + int(dweights is not None), 1, 1),
                (
                    self.a_parts, dA, self.b_parts, self.w, self.active, dB, self.r_parts, dR, self.dw, dweights,
                    D, N, r_width, B.stride(0) if B is not None and bank else 0, a_tiles, b_tiles, r_tiles,
                    self.groups, self.runs, self.groups * self.down_runs, self.dw_count,
                ),
                dict(
                    SA_R=strides(dA)[0], SA_D=strides(dA)[1], SB_N=strides(dB)[0], SB_R=strides(dB)[1],
                    SR_E=strides(dR)[0], SR_D=strides(dR)[1], RANK=self.rank, RP=padded(self.rank), E=self.experts,
                    EP=padded(self.experts), MIX=self.mix, HAS_ACTIVE=self.active is not None,
                    ONE_GROUP=self.groups == 1, NEED_DA=dA is not None,
                    NEED_DB=dB is not None, NEED_DR=dR is not None, NEED_DWEIGHTS=dweights is not None, BC=tile.cols,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip


def residual_add_backward(
    g: Tensor, x: Tensor | None, t: Tensor, A: Tensor, B: Tensor, scale: float, dropout_p: float, seed: Tensor | None,
    need_dx: bool, need_dA: bool, need_dB: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`u = scale * g B`, `dx = u A`, `dA = u^T x`, `dB = scale * g^T t`."""
    if A.shape[0] > kernels("table").WIDEST:
        pieces = [
            residual_add_backward(
                g, x, t[..., part].contiguous(), A[part], B[:, part], scale, dropout_p, seed, need_dx, need_dA, need_dB
            )
            for part in _chunks(A.shape[0])
        ]  # fmt: skip
        return _joined(pieces, (None, 0, 1))
    state = _Backward("residual_add_backward", g, x, A, B, dropout_p, seed, g.dtype)
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    if state.T == 0:
        return dx, dA.zero_(), dB.zero_()
    state.t, state.scale = _rows(t).contiguous() if need_dB else None, scale
    if need_dx and not (need_dA or need_dB):
        rows = dx.view(-1, dx.shape[-1])
        drop = "output" if state.seed is not None else "none"
        _fused(state.op, state.g, B.mT, None, A.mT, rows, None, scale, state.keep_scale, state.seed, state.threshold, drop)
        return dx, dA, dB
    need_u = need_dx or need_dA
    by_rows = need_u and (not need_dB or state.wide())
    if by_rows:
        state.u = state._floats(state.T, state.rank)
        _shrink(state.op, state.g, B.mT, state.u, scale, None, 0)
    else:
        state.up(emit_u=need_u, need_dB=need_dB)
    if need_u:
        state.down(dx, need_dA, with_dB=by_rows and need_dB)
    state.reduce(dA=dA if need_dA else None, dB=dB if need_dB else None)
    return dx, dA, dB


# ------------------------------------------------------------------------------------------------ routed projection


def routed_projection(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None, token_mask: Tensor | None,
    scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`out = y + scale * sum_e w_e t B_e^T`, with `t`, `p` and `w` for backward."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    arguments = (A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
    return out, *_routed_projection(y, x, out, *arguments)


def routed_projection_(
    y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None, token_mask: Tensor | None,
    scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`routed_projection` over `y`."""
    arguments = (A, B, R, weights, token_mask, scale, routing, router_input, dropout_p, seed)
    return _routed_projection(y, x, y, *arguments)


def _routed_projection(
    y: Tensor, x: Tensor, out: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None,
    token_mask: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    op = "routed_projection"
    _check_bank(A)
    experts = B.shape[0]
    static, token = routing == "static", routing == "token"
    groups = x.shape[0] if routing == "sample" else 1
    t = _hidden(x, A.shape[0])
    p = _empty(t) if static else _hidden(x, experts)
    if static:
        assert weights is not None
        w = weights.to(torch.float32, copy=True)
    else:
        w = _empty(t) if token else t.new_empty((groups, experts) if routing == "sample" else (experts,))
    rows, hidden = _rows(x), t.view(-1, A.shape[0])
    if rows.shape[0] == 0:
        return t, p, w.zero_() if not static else w
    drop, threshold, keep_scale = _dropout(dropout_p, seed)
    means = not (static or token)
    mask = token_mask.reshape(-1).contiguous().view(torch.uint8) if means and token_mask is not None else None
    sums, counts, blocks = _shrink(
        op, rows, A, hidden, keep_scale, seed if drop else None, threshold,
        R=R, router="none" if static else router_input, p=None if static else p, groups=groups, means=means, token_mask=mask,
    )  # fmt: skip
    with _Target(out) as target:
        if token:
            width = max(1, kernels("table").WIDEST // padded(A.shape[0]))
            for first in range(0, experts, width):
                source = _rows(y) if first == 0 else target
                chunk = min(width, experts - first)
                _expand(op, source, hidden, B, target, scale, mix="token", p=p, first=first, chunk=chunk)
        elif static:
            _expand(op, _rows(y), hidden, B, target, scale, mix="weights", w=w)
        else:
            _expand(
                op, _rows(y), hidden, B, target, scale, mix="sums", sums=sums, counts=counts, blocks=blocks, groups=groups,
                w_out=w,
            )  # fmt: skip
    return t, p, w


def routed_projection_backward(
    g: Tensor, x: Tensor | None, t: Tensor, p: Tensor, w: Tensor, A: Tensor, B: Tensor, R: Tensor | None,
    token_mask: Tensor | None, active: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx, dA, dB, dR, dweights` by design section 4: one shared `G` for mixed banks, rank `E r` for token routing."""
    need_dx, need_dA, need_dB, need_dR, need_dweights = needs
    state = _Backward("routed_projection_backward", g, x, A, B, dropout_p, seed, g.dtype)
    dx, dA = state.allocate(need_dx, A if need_dA else None)
    dB = torch.empty_like(B) if need_dB else _empty(B)
    dR = torch.empty_like(R) if need_dR and R is not None else _empty(A)
    dweights = w.new_empty(state.experts) if need_dweights else _empty(w)
    if state.T == 0:
        return dx, dA.zero_(), dB.zero_(), dR.zero_(), dweights.zero_()
    token = routing == "token"
    state.t, state.scale, state.w = t.view(-1, A.shape[0]), scale, w
    state.groups = g.shape[0] if routing == "sample" else 1
    state.mix = "token" if token else "weights"
    state.active = None if active is None or not need_dB else active.contiguous().view(torch.uint8)
    need_u = need_dx or need_dA
    learned = routing != "static" and (need_dR or need_dx or (router_input == "t" and need_dA))
    if routing != "static":
        state.p = p.view(-1, state.experts)
    if learned:
        state.routed, state.router, state.R = "token" if token else "mean", router_input, R
        if token_mask is not None and not token:
            keep = token_mask.reshape(state.groups, -1)
            state.token_mask, state.counts = keep.contiguous().view(torch.uint8), keep.sum(1, dtype=torch.float32)
    if token and (need_u or need_dR):
        _token_hidden(state)
        state.down(dx, need_dA, need_dR=need_dR, with_dB=need_dB)
    else:
        state.up(emit_u=need_u, need_dB=need_dB, need_dw=need_dweights or (learned and not token))
        if state.wide():
            state.sum_u()
        state.down(dx, need_dA, need_dR=need_dR)
    state.reduce(
        dA=dA if need_dA else None, dB=dB if need_dB else None, dR=dR if need_dR else None,
        dweights=dweights if need_dweights else None,
    )  # fmt: skip
    return dx, dA, dB, dR, dweights


def _token_hidden(state: _Backward) -> None:
    """The row kernel of token routing: `u = dt [chunks, T, r]` and `dw [T, E]`, from one pass over `g` per chunk of experts."""
    launch, arch = _plan(state.op, state.g, state.B, state.p, state.t)
    assert state.B is not None
    (T, N), rank, experts = state.g.shape, state.rank, state.experts
    width = max(1, kernels("table").WIDEST // padded(rank))
    state.parts = _cdiv(experts, width)
    state.u, state.dw = state._floats(state.parts, T, rank), state._floats(T, experts)
    for part, first in enumerate(range(0, experts, width)):
        chunk = min(width, experts - first)
        held = padded_experts(chunk)
        tile = _table("token_hidden", arch, state.g, held * padded(rank), T)
        launch.run(
            launch.Launch(
                "token_hidden_kernel",
                kernels("backward").token_hidden_kernel,
                (_cdiv(T, tile.rows), 1, 1),
                (
                    state.g, state.t, state.B, state.p, state.u[part], state.dw, T, N, state.g.stride(0),
                    state.B.stride(0), first, float(state.scale),
                ),
                dict(
                    SB_N=state.B.stride(-2), SB_R=state.B.stride(-1), RANK=rank, RP=padded(rank), E=chunk, EP=held,
                    EXPERTS=experts, BM=tile.rows, BN=tile.cols, STAGES=tile.stages,
                ),
                tile.warps,
                tile.stages,
            )
        )  # fmt: skip
