"""Quantiles of measured seconds: median, 20th and 80th percentile, minimum.

Other work on the machine only ever adds time, so the minimum over alternating rounds is the steadiest figure for
ratios; the median and the spread beside it say how noisy the machine was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(values: Sequence[float], q: float) -> float:
    """The `q`-quantile (0 <= q <= 1) by linear interpolation between the sorted values (numpy's default).

    Raises ValueError for an empty list or `q` out of range.
    """
    if not values:
        raise ValueError("quantile: values must not be empty")
    if not 0.0 <= q <= 1.0:
        raise ValueError(f"quantile: q must be in [0, 1]; got {q}")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True)
class Summary:
    """Seconds per call over `rounds` samples."""

    median: float
    p20: float
    p80: float
    min: float
    rounds: int


def summarize(seconds: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile and minimum of `seconds`; raises ValueError when there are none."""
    return Summary(
        median=quantile(seconds, 0.5),
        p20=quantile(seconds, 0.2),
        p80=quantile(seconds, 0.8),
        min=min(seconds),
        rounds=len(seconds),
    )
