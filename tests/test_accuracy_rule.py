"""The rule of `tests/support/accuracy.py`: what it refuses, and why a few results are judged over several draws."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from .support.accuracy import INDEPENDENT, Errors, assert_accurate, broken_rule, measured, pooled
from .support.problems import ResidualAdd, Results

F32 = torch.float32


def _rule(ours: float, eager: float, norm: float = 1.0, dtype: torch.dtype = F32) -> str | None:
    return broken_rule(Errors(ours, eager, norm), dtype, dtype)


def test_more_than_twice_the_expressions_error_is_refused():
    assert _rule(2.0e-6, 1e-6) is None
    assert "twice" in _rule(2.1e-6, 1e-6)


def test_more_than_the_bound_is_refused_whatever_the_expression_does():
    assert "1e-05 of the norm" in _rule(1.1e-5, 1e-4)
    assert "0.01 of the norm" in _rule(1.1e-2, 1e-1, dtype=torch.bfloat16)


def test_half_a_unit_in_the_last_place_is_always_allowed():
    assert _rule(5.9e-8, 0.0) is None
    assert _rule(6.0e-8, 0.0) is not None
    assert broken_rule(Errors(1e-3, 0.0, 1.0), torch.bfloat16, F32) is not None, "of the result's dtype: a gradient's"


def test_nan_is_refused_without_another_draw():
    truth = torch.ones(4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 of 4 elements are not finite"):
        assert_accurate("x", torch.tensor([1, 1, float("nan"), 1]), truth.float(), truth, F32, lambda name: 1 / 0)


@dataclass(frozen=True)
class ThreeTimesTheError(ResidualAdd):
    """A backend with three times the error of the PyTorch expression in `dx`, in every draw."""

    def ours(self, backend: str) -> Results:
        eager, truth = self.eager(), self.truth()
        return {name: (truth[name] + 3 * (value - truth[name])).float() for name, value in eager.items()}


@pytest.mark.parametrize(("tokens", "rank"), [(1, 1), (3, 5), (40, 4)])
def test_three_times_the_error_is_refused_on_few_numbers_and_on_many(tokens, rank):
    with pytest.raises(AssertionError, match="twice the error"):
        ThreeTimesTheError((tokens,), 24, 200, rank, needs=frozenset("x")).assert_solved_by("reference")


def test_one_number_says_little_about_the_size_of_its_error(backend):
    """Without further draws equally accurate backends miss the factor of two now and then; with them, never."""
    own_draw_misses = 0
    for seed in range(40):
        problem = ResidualAdd((1,), 24, 200, 1, needs=frozenset("x"), seed=1000 * seed)
        errors = measured(problem.ours(backend)["dx"], problem.eager()["dx"], problem.truth()["dx"])
        own_draw_misses += broken_rule(errors, F32, F32) is not None
        problem.assert_solved_by(backend)
    if backend != "reference":  # which may well run the very products of the expression
        assert own_draw_misses > 0


def test_as_many_draws_as_make_up_the_numbers_and_none_where_one_has_them():
    for tokens, rank, more in ((1, 1, INDEPENDENT - 1), (4, 8, 1), (8, 8, 0)):
        problem = ResidualAdd((tokens,), 24, 40, rank, needs=frozenset("x"))
        assert len(list(problem.more_draws("dx", "reference"))) == more
    assert pooled([Errors(3.0, 1.0, 6.0), Errors(4.0, 1.0, 8.0)]) == (5.0, pytest.approx(2**0.5), 10.0)
