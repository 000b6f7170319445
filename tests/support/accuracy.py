"""The rule by which a result passes, against the float64 truth on the same (already rounded) inputs.

Errors are Frobenius norms of the difference to the truth. Two bounds hold at once:

* at most twice the error of the same-dtype PyTorch expression (flash-attention's rule), or half a unit in the last
  place of the activations;
* at most 1e-5 (float32), 2e-3 (float16), 1e-2 (bfloat16) of the truth's norm, or the error of the PyTorch expression
  where cancellation in the problem itself makes even that miss the bound.

Some results hang on a handful of numbers (a scalar, the mixing weights of a batch, the difference of two of them):
one evaluation of either side is then exact or far off by luck. Before such a result fails, both sides are taken over
`DRAWS` other draws of the same problem: the first bound then compares their median relative errors, the second takes
the largest error of the PyTorch expression. A NaN anywhere fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

RELATIVE_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DRAWS = 15


class Typical(NamedTuple):
    """Relative errors over other draws of a problem: the median of ours, and of the PyTorch expression."""

    ours: float
    eager: float
    eager_most: float


def distance(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of `value - truth`, in float64 on the CPU."""
    return (value.cpu().double() - truth.cpu()).norm().item()


def assert_accurate(
    name: str,
    got: Tensor,
    eager: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    typical: Callable[[str], Typical] | None = None,
    kernel: bool = True,
) -> None:
    """`got` passes the rule for activations of `dtype`, and has the shape and dtype of the PyTorch expression's result.

    `typical(name)` looks at other draws; called only when this draw misses a bound. Without it, missing one is failing.
    The first bound is for kernels: the fallback is itself a PyTorch expression, and two of these differ
    by luck alone.
    """
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, must be {list(truth.shape)}"
    assert got.dtype is eager.dtype, f"{name}: dtype {got.dtype}, must be {eager.dtype}"
    assert truth.isfinite().all() and eager.isfinite().all(), f"{name}: the problem itself is not finite"
    assert got.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} elements are not finite"
    norm = truth.norm().item()
    error, eager_error = distance(got, truth), distance(eager, truth)
    twice = not kernel or error <= max(2.0 * eager_error, torch.finfo(dtype).eps / 2 * norm)
    bounded = error <= max(RELATIVE_BOUND[dtype] * norm, eager_error)
    said = f"{name}: error {error:.3e}, PyTorch expression {eager_error:.3e}, norm {norm:.3e}"
    if typical is not None and not (twice and bounded):
        other = typical(name)
        twice = twice or other.ours <= 2.0 * other.eager
        bounded = bounded or error <= other.eager_most * norm
        said += f"; over other draws, relative: {other}"
    assert twice, f"{said}: more than twice the error of the PyTorch expression"
    assert bounded, f"{said}: more than {RELATIVE_BOUND[dtype]} of the norm"


def assert_all_accurate(
    got: Mapping[str, Tensor | None],
    eager: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    typical: Callable[[str], Typical] | None = None,
    kernel: bool = True,
) -> None:
    """The rule for every result by name; a gradient is None exactly where it was not asked for."""
    assert got.keys() == truth.keys()
    for name, value in got.items():
        expected, plain = truth[name], eager[name]
        if expected is None:
            assert value is None, f"{name}: must be None; got {list(value.shape)}"
            continue
        assert value is not None and plain is not None, f"{name}: must be a tensor; got None"
        assert_accurate(name, value, plain, expected, dtype, typical, kernel)


def assert_same_bits(got: Tensor, expected: Tensor, what: str = "result") -> None:
    """Equal bit for bit, NaN included."""
    assert got.dtype is expected.dtype and got.shape == expected.shape, f"{what}: {got.shape} {got.dtype}"
    width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[got.element_size()]
    same = got.contiguous().view(width) == expected.contiguous().view(width)
    assert same.all(), f"{what}: {int((~same).sum())} of {same.numel()} elements differ in their bits"
