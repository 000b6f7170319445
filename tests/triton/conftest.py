"""Triton kernels in the interpreter: every tensor between guards, every output poisoned, products as a GPU sums them.

Triton decides at its first import whether it interprets. A run of these tests alone (`pytest tests/triton`) switches it
on before that; a run of everything does not, because other tests import Triton too and compile for the CPU: there
these are skipped, and `make test` runs them in a process of their own. Tests that need compiled kernels start a
subprocess without it.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_fast import triton_backend

from .arena import Arena

HERE = Path(__file__).resolve().parent


def pytest_configure(config: pytest.Config) -> None:
    alone = all(Path(one.split("::")[0]).resolve().is_relative_to(HERE) for one in config.args)
    if alone and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def why_not() -> str | None:
    """Why nothing here can run in this process."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "not started with TRITON_INTERPRET=1, which must be set before Triton is imported: `make test` does"
    return None


WHY_NOT: list[str | None] = []  # decided once: tests change the environment


@pytest.fixture(autouse=True)
def _interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not WHY_NOT:
        WHY_NOT.append(why_not())
    if request.node.get_closest_marker("slow") and importlib.util.find_spec("triton"):
        return  # compiles in processes of its own
    if WHY_NOT[0]:
        pytest.skip(WHY_NOT[0])
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
