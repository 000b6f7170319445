"""What the torch bindings of the CUDA kernels cost on the host, up to the launch: `python -m tests.simt.dispatch_cost`.

Measured on CPU tensors with a launch that returns at once: dispatcher, checks, results and workspace from the
allocator, and the launch plan. Not in it: the CUDA launch itself and the CUDA caching allocator. A CPU number.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable

import torch

import lowrank_fast  # noqa: F401  (declares the ops)
from lowrank_fast.info import cpu_model

from . import build


def microseconds(run: Callable[[], object], calls: int = 2000, rounds: int = 15) -> float:
    """The fastest of `rounds` averages over `calls` calls."""
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - began) / calls)
    return 1e6 * best


def measure() -> dict[str, float]:
    """Microseconds per call for one token, d = 4096, rank 16, bfloat16; `torch.add` beside them."""
    binding = build.binding()
    binding.run_kernels(False)
    binding.register("CPU")
    try:
        y, x, g = (torch.zeros(1, 4096, dtype=torch.bfloat16) for _ in range(3))
        A, B = torch.zeros(16, 4096, dtype=torch.bfloat16), torch.zeros(4096, 16, dtype=torch.bfloat16)
        t, one = torch.zeros(1, 16), torch.zeros(1)
        forward, backward = (
            torch.ops.lowrank_fast.residual_add.default,
            torch.ops.lowrank_fast.residual_add_backward.default,
        )
        in_place = torch.ops.lowrank_fast.residual_add_.default
        from_cpp = min(binding.seconds_per_call(y, x, A, B, 20000) for _ in range(15))
        return {
            "residual_add_ from C++": 1e6 * from_cpp,
            "torch.add": microseconds(lambda: torch.add(one, one)),
            "residual_add": microseconds(lambda: forward(y, x, A, B, 1.0, 0.0, None, False)),
            "residual_add_": microseconds(lambda: in_place(y, x, A, B, 1.0, 0.0, None, False)),
            "residual_add_backward": microseconds(lambda: backward(g, x, t, A, B, 1.0, 0.0, None, True, True, True)),
        }
    finally:
        binding.unregister()
        binding.run_kernels(True)


if __name__ == "__main__":
    machine = {"cpu": cpu_model(), "torch": torch.__version__, "python": platform.python_version()}
    found = {name: round(value, 2) for name, value in measure().items()}
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, "microseconds": found}, indent=1))
