"""The cases of each suite, and how many seconds they may take."""

from __future__ import annotations

import torch

from .cases import Case, Problem, residual, routed

Shape = tuple[int, int]  # (T, d)

DEFAULT_SHAPES: tuple[Shape, ...] = ((2048, 4096), (4096, 768), (64, 4096), (1, 4096))
QUICK_SHAPES: tuple[Shape, ...] = ((4096, 768), (1, 4096))
LARGE = 3_000_000  # elements of an activation from which a call is bound by memory bandwidth
SWEEP_D, SWEEP_RANK = 1024, 8
EXPERTS = 4

_ALL = ("forward", "forward_out", "forward_inplace", "backward_out", "forward_backward")
_INFERENCE = ("forward", "forward_out", "forward_inplace")
_ROUTED = ("forward", "forward_inplace", "forward_backward")


def _large(shape: Shape) -> bool:
    return shape[0] * shape[1] >= LARGE


def _cases(problem: Problem, directions: tuple[str, ...], suite: str = "ops") -> list[Case]:
    return [Case(problem, direction, suite) for direction in directions]


def ops(dtypes: list[torch.dtype], shapes: tuple[Shape, ...], quick: bool) -> list[Case]:
    """Residual add in every direction at rank 8, its bandwidth-bound directions at 16 and 32, and both routed forms.

    One token is inference only. The routed forms train at the smallest of the large shapes: HydraLoRA's loop at the
    largest one takes the time of fifty calls of ours.
    """
    plan: list[Case] = []
    large = [shape for shape in shapes if _large(shape)]
    train_routed = min(large, key=lambda shape: shape[0] * shape[1]) if large else shapes[0]
    for dtype in dtypes:
        for shape in shapes:
            plan += _cases(residual(dtype, *shape, 8), _INFERENCE if shape[0] == 1 else _ALL)
            if _large(shape) and not quick:
                for rank in (16, 32):
                    plan += _cases(residual(dtype, *shape, rank), ("forward_out", "backward_out"))
        for routing in ("batch", "token"):
            for shape in shapes:
                problem = routed(routing, dtype, *shape, 8, EXPERTS)
                if shape == train_routed:
                    plan += _cases(problem, _ROUTED)
                elif not quick and not _large(shape):
                    plan += _cases(problem, ("forward",))
    return plan


def sweep(dtypes: list[torch.dtype], sizes: tuple[int, ...]) -> list[Case]:
    """Residual add into `out` at d = 1024, r = 8, for each number of tokens."""
    return [
        Case(residual(dtype, tokens, SWEEP_D, SWEEP_RANK), "forward_out", "sweep")
        for dtype in dtypes
        for tokens in sizes
    ]


SWEEP_SIZES = (1024, 4096, 16384, 65536)
SWEEP_QUICK = (1024, 4096, 8192)
SWEEP_FULL = (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def targets(dtypes: list[torch.dtype]) -> list[Case]:
    """Every case that the table of targets reads."""
    plan: list[Case] = []
    for dtype in dtypes:
        for shape in DEFAULT_SHAPES:
            if _large(shape):
                for rank in (8, 16, 32):
                    plan += _cases(residual(dtype, *shape, rank), ("forward_out", "backward_out", "forward_backward"))
                plan += _cases(routed("token", dtype, *shape, 8, EXPERTS), _ROUTED)
                plan += _cases(routed("batch", dtype, *shape, 8, EXPERTS), ("forward_backward",))
            elif shape[0] == 1:
                for rank in (8, 16, 32):
                    plan += _cases(residual(dtype, *shape, rank), ("forward",))
            else:
                plan += _cases(residual(dtype, *shape, 8), ("forward_out",))
                plan += _cases(residual(dtype, *shape, 32), ("forward_out", "backward_out"))
    return plan + sweep(dtypes, SWEEP_FULL)
