"""The operations in a nutshell, for one instruction set: `python -m tests.support.isa_suite` in a process whose
`LOWRANK_FAST_CPU_ISA` names it. Prints the set in use; exits with an error at the first result that is not accurate.

Sizes have tails at every width of vector and tile; every operation, dtype, dtype of parameters, routing and gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lowrank_fast import _C  # type: ignore[attr-defined]

from .problems import Halves, Problem, ResidualAdd, Routed
from .targets import KERNEL_DTYPES

ALL = frozenset(("y", "x", "A", "B", "R", "weights"))
SHAPES = [
    # (tokens, d_in, d_out, rank), experts: below a vector, at its multiples, beyond them, beyond a block
    (((1,), 1, 1, 1), 1),
    (((1,), 97, 33, 8), 2),
    (((3, 5), 15, 17, 3), 3),
    (((64,), 128, 64, 16), 4),
    (((67,), 129, 259, 17), 5),
    (((33,), 771, 1029, 8), 6),
    (((7,), 96, 64, 64), 7),
    (((300,), 132, 130, 32), 9),
    (((331,), 2180, 4100, 32), 3),  # panels too large for the caches: other blocks of rows
]


def problems() -> Iterator[Problem]:
    for dtype in KERNEL_DTYPES:
        for parameter_dtype in dict.fromkeys((dtype, torch.float32)):
            for seed, (shape, experts) in enumerate(SHAPES):
                common = {"needs": ALL, "seed": seed, "dropout_p": 0.2 if seed % 3 == 2 else 0.0}
                plain = {**common, "needs": ALL & frozenset("yxAB")}
                yield ResidualAdd(*shape, dtype, parameter_dtype, **plain)  # type: ignore[arg-type]
                yield Halves(*shape, dtype, parameter_dtype, **plain)  # type: ignore[arg-type]
                layouts = {"B": ("contiguous", "transposed")[seed % 2], "x": ("contiguous", "padded_rows")[seed % 2]}
                for routing in ("batch", "token", "static"):
                    mixing = {"experts": experts, "routing": routing, "router_input": "tx"[seed % 2]}
                    yield Routed(*shape, dtype, parameter_dtype, **common, layouts=layouts, **mixing)  # type: ignore[arg-type]
            sample = {"needs": ALL, "experts": 3, "routing": "sample", "masked": True}
            yield Routed((3, 21), 70, 53, 8, dtype, parameter_dtype, **sample)  # type: ignore[arg-type]


def main() -> None:
    for problem in problems():
        try:
            problem.assert_solved_by("cpu")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{problem}") from None
    print(_C.isa())


if __name__ == "__main__":
    main()
