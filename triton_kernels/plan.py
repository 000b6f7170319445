"""From shapes to launches: tiles, grids and arguments of each kernel, for one launch at a time.

Everything is decided from shapes, dtypes and the architecture's row of `table.py`: no device query, no host
synchronisation. Activations are `[T, d]` with unit inner stride here, factors have any strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import dropout_threshold
from . import launch, table
from .common import FLOAT32_PRECISION
from .expand import expand_kernel
from .residual_add import residual_add_kernel
from .routed_small import routed_small_kernel
from .shrink import shrink_kernel


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded(n: int) -> int:
    """A rank or a number of experts as the kernels hold it: at least 16, a power of two."""
    return max(16, 1 << (n - 1).bit_length())


def padded_experts(n: int) -> int:
    """Experts as a rank-`E r` factor holds them: a power of two, beside a rank that is padded itself."""
    return 1 << (n - 1).bit_length()


def held_experts(experts: int, rank: int, widest: int = table.WIDEST) -> int:
    """Experts that one product of a token-routed bank takes, of at most `widest` experts times padded rank."""
    return min(experts, max(1, widest // padded(rank)))


def token_step(experts: int, rank: int, y: Tensor) -> tuple[int, int]:
    """Experts, and ranks of each, that one product of the token-routed expand takes for a stream like `y`."""
    widest = table.TOKEN_WIDEST[y.element_size()]
    return held_experts(experts, rank, widest), min(padded(rank), widest)


def dropout(p: float, seed: Tensor | None) -> tuple[bool, int, float]:
    """Whether there is dropout, its threshold, and the factor of what is kept."""
    if p == 0.0 or seed is None:
        return False, 0, 1.0
    return True, dropout_threshold(p), 1.0 / (1.0 - p)


def as_rows(x: Tensor) -> Tensor:
    """`[.., d]` as `[T, d]` with unit inner stride, copied only where strides leave no other way."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def place(op: str, x: Tensor, *others: Tensor | None) -> str:
    """The architecture for tensors on the device of `x`; raises for what the kernels do not run."""
    for tensor in others:
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: all tensors must be on {x.device}; got one on {tensor.device}")
    if x.dtype is torch.float64:
        raise RuntimeError("backend 'triton' runs float32, bfloat16 and float16; float64 runs on 'reference' only")
    if x.device.type == "cpu" and not launch.interpreted():
        raise RuntimeError(
            f"{op}: backend 'triton' runs CPU tensors only in Triton's interpreter; "
            "set TRITON_INTERPRET=1 before starting"
        )
    return launch.architecture(x.device)


def pick(kernel: str, arch: str, x: Tensor, width: int, T: int, drop: bool = False, router: str = "none") -> Any:
    """The row of the launch table for `x [T, d_in]` and a padded rank, or number of experts, `width`.

    Philox (`drop`) and a router on x take registers beside the products, so that some kernels get the row of fewer
    tokens, or at most 32 rows to a tile. IEEE products of float32 values, which are added up in registers, have a tile
    of their own."""
    float32 = x.dtype is torch.float32
    if kernel == "routed_small" and float32 and FLOAT32_PRECISION.value == "ieee":
        return table.IEEE_SMALL
    if kernel == "routed_small" and float32 and width > 64:
        # Found by compiling for every architecture: with dropout the tall tile does not spill, and the short one does
        # on sm_100; without, a router on x spills in the tall one.
        T = table.SMALL if drop else min(T, 16) if router == "x" else T
    elif kernel == "routed_small" and drop and not (float32 and width > 32):
        T = min(T, 16)
    tile = table.row(kernel, arch, x.element_size(), width, T)
    most = 16 if router == "x" and x.element_size() == 2 else 32
    return tile._replace(rows=min(tile.rows, most)) if drop else tile


def chunks(rank: int, widest: int = table.WIDEST) -> list[slice]:
    """The ranks that one launch takes at a time."""
    return [slice(first, min(first + widest, rank)) for first in range(0, rank, widest)]


def segment(d: int, tile: Any) -> tuple[int, int]:
    """Tiles of `D` in one run, and the number of runs."""
    tiles = cdiv(d, tile.inner)
    segment = max(1, cdiv(tiles, table.SEGMENTS))
    return segment, max(1, cdiv(tiles, segment))


def runs(rows: int, tile: Any, columns: int, groups: int, rank: int, arch: str) -> tuple[int, int]:
    """Rows of one run (a multiple of the tile) and runs per group: enough programs to fill the machine once, and not so
    many that their partials (`4 r` bytes per column each) cost more than an eighth of the rows that they reduce."""
    blocks = max(1, cdiv(rows, tile.rows))
    wanted = max(1, table.PROCESSORS[arch] // max(1, columns * groups))
    affordable = max(1, rows // (4 * rank))
    per_run = cdiv(blocks, min(wanted, affordable, blocks))
    return per_run * tile.rows, cdiv(blocks, per_run)


def fused(
    op: str, x: Tensor, A: Tensor, y: Tensor | None, B: Tensor, out: Tensor, t_out: Tensor | None,
    scale_t: float, scale_out: float, seed: Tensor | None, threshold: int, drop: str,
) -> None:  # fmt: skip
    """`out = [y +] scale_out * (scale_t * x A^T) B^T` on `[T, .]` tensors; `drop`: "input", "output" or "none"."""
    arch = place(op, x, A, y, B, out, seed)
    (T, D), N, rank = x.shape, out.shape[1], A.shape[0]
    tile = pick("residual_add", arch, x, padded(rank), T, drop != "none")
    blocks, tiles = cdiv(T, tile.rows), cdiv(N, tile.cols)
    splits = min(max(table.PROCESSORS[arch] // blocks, 1), tiles)
    per_split = cdiv(tiles, splits)
    launch.run(
        launch.Launch(
            "residual_add_kernel",
            residual_add_kernel,
            (blocks, cdiv(tiles, per_split), 1),
            (
                x, A, y, B, out, t_out, seed, T, D, N, x.stride(0), 0 if y is None else y.stride(0), out.stride(0),
                segment(D, tile)[0], per_split, float(scale_t), float(scale_out), threshold,
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


def shrink(
    op: str, x: Tensor, A: Tensor, t: Tensor, scale_t: float, seed: Tensor | None, threshold: int,
    *, parts: int = 1, R: Tensor | None = None, router: str = "none", p: Tensor | None = None, groups: int = 1,
    means: bool = False, token_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, int]:  # fmt: skip
    """`t = scale_t * dropout(x) A^T` (raw partials if `parts > 1`), with `p`, and its sums and counts per row block
    if `means`."""
    arch = place(op, x, A, R, token_mask, seed)
    T, D = x.shape
    rank = A.shape[0]
    experts = 1 if R is None else R.shape[0]
    tile = pick("shrink", arch, x, max(padded(rank), padded(experts)), T, seed is not None, router)
    blocks = cdiv(T // groups, tile.rows)
    sums = counts = None
    if means:
        sums = t.new_empty(groups * blocks, padded(experts))
        counts = t.new_empty(groups * blocks)
    launch.run(
        launch.Launch(
            "shrink_kernel",
            shrink_kernel,
            (blocks, parts, groups),
            (
                x, A, R, token_mask, t, p, sums, counts, seed,
                T, D, x.stride(0), segment(D, tile)[0], T // groups, float(scale_t), threshold,
            ),
            dict(
                SA_R=A.stride(0), SA_D=A.stride(1), SR_E=0 if R is None else R.stride(0), SR_D=0 if R is None else
                R.stride(1), RANK=rank, RP=padded(rank), E=experts, EP=padded(experts), ROUTER=router, SUMS=means,
                HAS_MASK=token_mask is not None, DROPOUT=seed is not None, SPLIT=parts > 1,
                BM=tile.rows, BK=tile.inner, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip
    return sums, counts, blocks


def expand(
    op: str, y: Tensor, t: Tensor, B: Tensor, out: Tensor, scale: float,
    *, mix: str = "none", p: Tensor | None = None, w: Tensor | None = None, sums: Tensor | None = None,
    counts: Tensor | None = None, blocks: int = 0, groups: int = 1, parts: int = 1, scale_t: float = 1.0,
    t_out: Tensor | None = None, w_out: Tensor | None = None,
) -> None:  # fmt: skip
    """`out = y + scale * t B^T`; `B` is a bank `[E, d_out, r]` with `mix` "weights", "sums" or "token"."""
    arch = place(op, y, t, B, out, p, w)
    (T, N), rank = y.shape, B.shape[-1]
    bank = B.dim() == 3
    experts = B.shape[0] if bank else 1
    held, width = token_step(experts, rank, y) if mix == "token" else (1, padded(rank))
    steps = cdiv(experts, held) * cdiv(rank, width) if mix == "token" else 1
    kernel = "expand_parts" if parts > 1 else "expand" if steps == 1 else "expand_wide"
    tile = pick(kernel, arch, y, padded_experts(held) * width, T)
    columns = cdiv(N, tile.cols)
    per_group = T // groups
    wanted = max(1, 2 * table.PROCESSORS[arch] // (columns * groups))
    per_run = cdiv(cdiv(per_group, tile.rows), wanted) * tile.rows
    launch.run(
        launch.Launch(
            "expand_kernel",
            expand_kernel,
            (columns, cdiv(per_group, per_run), groups),
            (
                y, t, B, p, w, sums, counts, out, t_out, w_out,
                T, N, y.stride(0), out.stride(0), B.stride(0) if bank else 0, blocks, per_group, per_run,
                float(scale_t), float(scale),
            ),
            dict(
                SB_N=B.stride(-2), SB_R=B.stride(-1), RANK=rank, RP=width, E=experts, EP=padded(experts),
                HELD=held, HP=padded_experts(held), MIX=mix, PARTS=parts, SAVE_T=t_out is not None,
                SAVE_W=w_out is not None, BM=tile.rows, BN=tile.cols, CHUNK=64, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip


def fits_small(x: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether `routed_small` takes the rows of `x [T, d_in]`, the rank of `A [r, d_in]` and the experts of
    `B [E, d_out, r]`."""
    return x.shape[0] <= table.SMALL and max(A.shape[0], B.shape[0]) <= table.WIDEST


def routed_small(
    op: str, y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, w_in: Tensor | None,
    token_mask: Tensor | None, out: Tensor, t: Tensor, p: Tensor | None, w: Tensor | None, scale: float,
    keep_scale: float, seed: Tensor | None, threshold: int,
    *, router: str, groups: int,
) -> None:  # fmt: skip
    """`out = y + scale * sum_e w_e t B_e^T`, `t`, `p` and `w` in one launch, where `fits_small`; `y`, `out`
    `[T, d_out]`, `x` `[T, d_in]`, `B` `[E, d_out, r]`, `t` `[T, r]`, `p` `[T, E]`, `w` `[groups, E]`. The weights:
    `w_in [E]`, or `p` where `w` is None, or else its mean over each group."""
    arch = place(op, x, A, y, B, R, w_in, token_mask, out, seed)
    (T, D), (experts, N, rank) = x.shape, B.shape
    mix = "weights" if w_in is not None else "token" if w is None else "mean"
    group_rows, width = T // groups, max(padded(rank), padded(experts))
    kernel = {"weights": "residual_add", "token": "token_small", "mean": "routed_small"}[mix]
    tile = pick(kernel, arch, x, width, group_rows, seed is not None, router)
    held, per_step = token_step(experts, rank, y)
    if mix != "token":
        held, per_step = 1, per_step if mix == "mean" else padded(rank)
    blocks, tiles = cdiv(group_rows, tile.rows), cdiv(N, tile.cols)
    # Every program of a mean reads all of x: beyond half of the processors, L2 takes longer to deliver it.
    processors = table.PROCESSORS[arch] // (2 if mix == "mean" else 1)
    per_split = cdiv(tiles, min(max(processors // (blocks * groups), 1), tiles))
    launch.run(
        launch.Launch(
            "routed_small_kernel",
            routed_small_kernel,
            (blocks, cdiv(tiles, per_split), groups),
            (
                x, A, y, B, R, token_mask, w_in, out, t, p, w, seed,
                T, D, N, x.stride(0), y.stride(0), out.stride(0), B.stride(0), segment(D, tile)[0], per_split,
                group_rows, float(keep_scale), float(scale), threshold,
            ),
            dict(
                SA_R=A.stride(0), SA_D=A.stride(1), SR_E=0 if R is None else R.stride(0), SR_D=0 if R is None else
                R.stride(1), SB_N=B.stride(1), SB_R=B.stride(2), RANK=rank, RP=padded(rank), E=experts,
                EP=padded(experts), HELD=held, HP=padded_experts(held), WIDTH=per_step, MIX=mix, ROUTER=router,
                HAS_MASK=token_mask is not None, DROPOUT=seed is not None,
                BM=tile.rows, BK=tile.inner, BN=tile.cols, STAGES=tile.stages,
            ),
            tile.warps,
            tile.stages,
        )
    )  # fmt: skip
