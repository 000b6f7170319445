"""The benchmark's providers under pytest-benchmark, to follow our own timings from one commit to the next:

    pytest tests/bench/test_timings.py --benchmark-enable --benchmark-autosave --benchmark-compare

Without `--benchmark-enable` each call runs once. Ratios between providers come from `lowrank-fast bench`, whose
providers alternate; here one is timed after the other, so compare a provider with its own past only.
"""

from __future__ import annotations

import pytest
import torch
from lowrank_fast.bench.cases import Inputs, residual, routed
from lowrank_fast.bench.registry import LIMITS, providers_for

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    pytest.param(problem, direction, provider, id=f"{problem.describe()} {direction} {provider.name}".replace(" ", "-"))
    for dtype in (torch.float32, torch.bfloat16)
    for problem, directions in (
        (residual(dtype, 512, 768, 8), ("forward_out", "backward_out", "forward_backward")),
        (residual(dtype, 1, 4096, 8), ("forward",)),
        (routed("batch", dtype, 512, 768, 8), ("forward", "forward_backward")),
        (routed("token", dtype, 512, 768, 8), ("forward", "forward_backward")),
    )
    for direction in directions
    for provider, _ in providers_for(problem.family, direction)
    if provider.name not in ("compile", *LIMITS)
]


@pytest.mark.parametrize(("problem", "direction", "provider"), CASES)
def test_time_of(benchmark, problem, direction, provider):
    benchmark.group = f"{problem.describe()} {direction}"
    with torch.set_grad_enabled(direction == "forward_backward"):
        prepared = provider.builders[problem.family, direction](Inputs(problem))
        result = prepared.outputs(benchmark(prepared.call))
    assert result and all(tensor.isfinite().all() for tensor in result.values())
