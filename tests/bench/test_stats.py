"""Quantiles: what medians and spreads in the reports are made of."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lowrank_fast.bench.stats import quantile, summarize

seconds = st.lists(st.floats(min_value=1e-7, max_value=1e3), min_size=1, max_size=40)


@given(seconds, st.floats(min_value=0.0, max_value=1.0))
def test_quantile_interpolates_as_torch_does(values, q):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()
    assert quantile(values, q) == pytest.approx(expected, rel=1e-12)


@given(seconds)
def test_summary_is_ordered_and_ignores_the_order_of_the_samples(values):
    summary = summarize(values)
    assert summary.min <= summary.p20 <= summary.median <= summary.p80 <= max(values)
    assert summary == summarize(values[::-1])
    assert summary.rounds == len(values)


def test_summary_of_known_seconds():
    summary = summarize([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert (summary.median, summary.p20, summary.p80, summary.min) == (3.5, 2.0, 5.0, 1.0)


def test_no_samples_is_an_error_rather_than_a_zero():
    with pytest.raises(ValueError, match="must not be empty"):
        summarize([])


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan")])
def test_quantile_outside_the_unit_interval_is_an_error(q):
    with pytest.raises(ValueError, match="q must be in"):
        quantile([1.0], q)
