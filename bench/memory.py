"""Peak bytes of a call: what PyTorch's CPU allocator hands out while the call runs, at its highest.

`torch.profiler` with `profile_memory=True` reports every allocation and release of the CPU allocator with its size.
Their running sum starts at zero when the call starts, so inputs and preallocated buffers do not count; outputs and
temporaries do. Scratch that a library takes from malloc behind PyTorch's back (MKL, oneDNN) is not seen. Measured in a
call of its own, outside the timed rounds: the profiler slows the call down.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile


@contextmanager
def _stderr_to_null() -> Iterator[None]:
    """The profiler's C++ logger prints two lines per trace; its level can only be set before torch is imported."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def allocation_deltas(call: Callable[[], Any]) -> list[int]:
    """Signed bytes of the allocations (+) and releases (-) during `call`, in order; its result is kept alive."""
    with _stderr_to_null(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = call()
    del result
    events = trace.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [size for _, size in memory]


def peak_bytes(call: Callable[[], Any]) -> int:
    """The highest sum of bytes allocated during `call` and not yet released."""
    live = peak = 0
    for size in allocation_deltas(call):
        live += size
        peak = max(peak, live)
    return peak


def live_bytes(call: Callable[[], Any]) -> int:
    """Bytes that `call` allocated and that are still held, by its result, when it returns."""
    return sum(allocation_deltas(call))
