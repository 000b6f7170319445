"""The suite under test is `lowrank_fast.bench`; in a tree that is not installed, `bench/` is loaded under that name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import lowrank_fast

if importlib.util.find_spec("lowrank_fast.bench") is None:
    folder = Path(__file__).resolve().parents[2] / "bench"
    spec = importlib.util.spec_from_file_location(
        "lowrank_fast.bench", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["lowrank_fast.bench"] = lowrank_fast.bench = module
    spec.loader.exec_module(module)


@pytest.fixture
def one_thread():
    """Tiny calls on one thread: the parallel regions of a busy machine would make the tests wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
