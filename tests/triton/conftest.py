"""Triton kernels in the interpreter: every tensor between guards, every output poisoned, bfloat16 products repaired.

Triton decides at its first import whether it interprets, and other tests import it too: so these run in a process that
was started with `TRITON_INTERPRET=1` (`make test` does), and are skipped in any other. Tests that need compiled kernels
run in a subprocess without it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowrank_fast import triton_backend

from .arena import Arena

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if not INTERPRETED:
        pytest.skip(
            "Triton interprets only when TRITON_INTERPRET=1 is set before it is imported; `make test` runs these"
        )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for name in ("plan", "plan_backward", "norm"):  # imported now, whatever the test does to the environment
        triton_backend.kernels(name)


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[Arena]:
    """Allocations of the backend go through the arena while the test runs."""
    arena = Arena()

    plain = torch.Tensor.new_empty

    def new_empty(self: Tensor, *shape: object, dtype: torch.dtype | None = None, **others: object) -> Tensor:
        if others:  # the interpreter's own
            return plain(self, *shape, dtype=dtype or self.dtype, **others)
        size = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        return arena.new(size, dtype or self.dtype)  # type: ignore[arg-type]

    def empty_like(tensor: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        if memory_format is torch.contiguous_format:
            return arena.new(tuple(tensor.shape), tensor.dtype)
        strides = torch.ops.aten.empty_like.default(tensor, device="meta").stride()
        return arena.new(tuple(tensor.shape), tensor.dtype, strides)

    class Torch:
        """`torch` as the backend sees it."""

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

    shim = Torch()
    shim.empty_like = empty_like  # type: ignore[attr-defined]
    monkeypatch.setattr(triton_backend, "torch", shim)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield arena
    arena.check()
