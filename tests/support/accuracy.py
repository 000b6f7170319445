"""The rule by which a result passes, against the float64 truth on the same (already rounded) inputs.

Errors are Frobenius norms of the difference to the truth. Two bounds hold at once:

* at most twice the error of the same-dtype PyTorch expression (flash-attention's rule), or half a unit in the last
  place of the dtype that the result has, which no result can be asked to beat;
* at most 1e-5 (float32), 2e-3 (float16), 1e-2 (bfloat16) of the truth's norm.

The first is a statement about sizes of errors, and one rounding error says little about their size: with one token and
rank 1 every element of `dx = u A` has the relative error of the one number `u`, which is anything between exact and a
unit or two, on either side. The ratio of two such errors passes 2 in three draws of ten, whoever computes them (it is
Cauchy distributed); that of the norms of `INDEPENDENT` errors each, in less than one of a million. So a result that
misses a bound, and hangs on fewer independent numbers than that, is judged by the root of the sum of squares over more
draws of the same problem, as many as make up that number. A result that hangs on more is judged on its own draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
INDEPENDENT = 64


class Errors(NamedTuple):
    """Frobenius norms, over one draw or several: our error, that of the PyTorch expression, and the truth's norm."""

    ours: float
    eager: float
    norm: float


def measured(got: Tensor, eager: Tensor, truth: Tensor) -> Errors:
    exact = truth.cpu()
    return Errors(*((value.cpu().double() - exact).norm().item() for value in (got, eager)), exact.norm().item())


def pooled(draws: Iterable[Errors]) -> Errors:
    return Errors(*(math.hypot(*norms) for norms in zip(*draws, strict=True)))


def broken_rule(errors: Errors, dtype: torch.dtype, result_dtype: torch.dtype) -> str | None:
    """What is wrong with the errors of a result for activations of `dtype`; None when they pass."""
    if not errors.ours <= max(2.0 * errors.eager, torch.finfo(result_dtype).eps / 2 * errors.norm):
        return f"{errors}: more than twice the error of the PyTorch expression"
    if not errors.ours <= RELATIVE_BOUND[dtype] * errors.norm:
        return f"{errors}: more than {RELATIVE_BOUND[dtype]} of the norm"
    return None


def assert_accurate(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    more_draws: Callable[[str], Iterable[Errors]] | None = None,
) -> None:
    """`got` passes the rule for activations of `dtype`, and has the shape and dtype of the PyTorch expression's result.

    `more_draws(name)` are the errors of further draws: none where this one says enough. Asked for only when it misses.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, must be {list(truth.shape)}"
    assert got.dtype is eager.dtype, f"{name}: dtype {got.dtype}, must be {eager.dtype}"
    assert truth.isfinite().all() and eager.isfinite().all(), f"{name}: the problem itself is not finite"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
    errors = measured(got, eager, truth)
    broken = broken_rule(errors, dtype, got.dtype)
    if broken and more_draws is not None:
        draws = [errors, *more_draws(name)]
        broken = broken_rule(pooled(draws), dtype, got.dtype)
        broken = broken and f"over {len(draws)} draws, {broken}"
    assert not broken, f"{name}: {broken}"


def assert_all_accurate(
    got: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    more_draws: Callable[[str], Iterable[Errors]] | None = None,
) -> None:
    """The rule for every result by name; a gradient is None exactly where it was not asked for."""
    assert got.keys() == truth.keys()
    for name, value in got.items():
        expected, plain = truth[name], eager[name]
        if expected is None:
            assert value is None, f"{name}: must be None; got {list(value.shape)}"
            continue
        assert value is not None and plain is not None, f"{name}: must be a tensor; got None"
        assert_accurate(name, value, plain, expected, dtype, more_draws)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal bit for bit, NaN included."""
    assert got.dtype is expected.dtype and got.shape == expected.shape, f"{what}: {got.shape} {got.dtype}"
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
    same = got.contiguous().view(width) == expected.contiguous().view(width)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} elements differ in their bits"
