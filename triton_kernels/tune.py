"""The offline tuner: measures candidate tiles on the GPU at hand and writes a launch table.

    python -m lowrank_fast.triton_kernels.tune --out table.json
    LOWRANK_FAST_TRITON_TABLE=table.json ...

For each kernel, rank and length it runs the whole op that launches the kernel with every candidate (rows and
columns halved and doubled, two to five stages, four or eight warps) and writes the fastest. The tile of `D` is
never tuned: results must not depend on T. Candidates that do not compile or do not fit are dropped. Nothing runs at
import.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from lowrank_fast import triton_backend as backend

from . import launch, table
from .table import Tile

LENGTHS = (128, 2048, 4096, 1 << 62)
RANKS = (16, 32, 64, 128)


def candidates(tile: Tile) -> Iterator[Tile]:
    """The shipped tile first, then its neighbours."""
    yield tile
    for rows, cols, warps, stages in product((1, 2, 0.5), (1, 2, 0.5), (4, 8), (2, 3, 4, 5)):
        one = Tile(max(16, int(tile.rows * rows)), tile.inner, int(tile.cols * cols), warps, stages)
        if one != tile and (one.cols == 0 or one.cols >= 32):
            yield one


def operation(kernel: str, T: int, d: int, rank: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """A call of an op that launches `kernel`."""

    def normal(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=kind, device=device).normal_()

    y, x, A, B, t = normal(T, d), normal(T, d), normal(rank, d), normal(d, rank), normal(T, rank, kind=torch.float32)
    if kernel == "residual_add":
        return lambda: backend.residual_add(y, x, A, B, 0.5, 0.0, None, True)
    if kernel == "shrink":
        return lambda: backend.shrink(x, A, 0.0, None)
    if kernel == "expand":
        return lambda: backend.expand_add(y, t, B, 0.5)
    return lambda: backend.residual_add_backward(y, x, t, A, B, 0.5, 0.0, None, True, True, True)


def seconds(call: Callable[[], object]) -> float:
    """Median time of one call, cold weights aside: Triton's own benchmark flushes L2 between runs."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=100, return_mode="median")) * 1e-3


def tune(
    d: int, dtype: torch.dtype, device: str = "cuda", timer: Callable[[Callable[[], object]], float] = seconds
) -> dict[str, dict[str, dict[str, list[list[object]]]]]:
    """The fastest tile of each kernel by rank and length, as `table.py` reads it. Kernels that an op of this rank and
    length does not launch get no row."""
    architecture = launch.architecture(torch.device(device))
    size = str(dtype.itemsize)
    found: dict[str, dict[str, list[list[object]]]] = {}
    for kernel in ("residual_add", "shrink", "expand", "up", "up_rows", "down"):
        rows = found.setdefault(kernel, {}).setdefault(size, [])
        for rank, longest in product(RANKS, LENGTHS):
            T = min(longest, 16384)
            call = operation(kernel, T, d, rank, dtype, device)
            if kernel not in _launched(call):
                continue
            shipped = table.row(kernel, architecture, dtype.itemsize, rank, T)
            best = min(candidates(shipped), key=lambda tile: _time(kernel, tile, call, timer))
            rows.append([rank, longest, list(best)])
            print(f"{kernel} r={rank} T<={T}: {best}", flush=True)
    return {architecture: found}


def _launched(call: Callable[[], object]) -> set[str]:
    """The rows of the launch table that a call looks up; nothing runs."""
    asked: set[str] = set()
    shipped = table._row

    def row(name: str, *rest: object) -> Tile:
        asked.add(name)
        return shipped(name, *rest)

    table._row = row  # type: ignore[assignment]
    try:
        with launch.observing(lambda one: True, launch._architecture):
            call()
    finally:
        table._row = shipped
    return asked


def _time(kernel: str, tile: Tile, call: Callable[[], object], timer: Callable[[Callable[[], object]], float]) -> float:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    shipped = table._row

    def row(name: str, architecture: str, size: int, width: int, bucket: int) -> Tile:
        return tile if name == kernel else shipped(name, architecture, size, width, bucket)

    table._row = row  # type: ignore[assignment]
    try:
        return timer(call)
    except (CompilationError, OutOfResources):
        return float("inf")
    finally:
        table._row = shipped


def main() -> None:
    """Tune on the current GPU and write the table."""
    parser = argparse.ArgumentParser(description="Measure launch choices on this GPU and write a table.")
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--d", type=int, default=4096, help="width of the activations (default: %(default)s)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    reason = backend.unavailable_reason()
    if reason or not torch.cuda.is_available():
        raise SystemExit(f"lowrank_fast.triton_kernels.tune: needs a GPU: {reason or 'PyTorch finds none'}")
    found = tune(args.d, getattr(torch, args.dtype))
    path = Path(args.out)
    with tempfile.NamedTemporaryFile("w", dir=path.resolve().parent, delete=False, encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    os.replace(file.name, path)


if __name__ == "__main__":
    main()
