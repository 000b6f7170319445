"""Fixtures and settings of the whole suite.

* `backend`: every backend that runs on this machine; `kernel_backend`: those of them that are kernels of ours, which
  promise more than the plain PyTorch reference does (a row's bits do not depend on its neighbours).
* hypothesis draws the same examples in every run (`derandomize`), so that a green suite stays green: 30 for each
  property, 6 where Triton interprets its kernels. Set `LOWRANK_FAST_TEST_EXAMPLES` to another number, 500 say, for a
  longer search.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import hypothesis
import pytest
import torch

from lowrank_fast import backends, triton_backend

EXAMPLES = "LOWRANK_FAST_TEST_EXAMPLES"

hypothesis.settings.register_profile(
    "lowrank_fast",
    max_examples=int(os.environ.get(EXAMPLES, "6" if os.environ.get("TRITON_INTERPRET") == "1" else "30")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.load_profile("lowrank_fast")


# With `pytest -n 2` (pytest-xdist) tests go to the processes one by one, but these files as a whole: their tests
# share a fixture that takes a minute.
TOGETHER = ("tests/cuda/test_codegen.py", "tests/peft/test_distributed.py", "tests/simt/test_binding.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return file if file in TOGETHER else nodeid

    return Together(config, log)


@pytest.fixture(scope="session", autouse=True)
def _overflow_raises() -> None:
    """An integer overflow in an interpreted kernel is an error."""
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        triton_backend.kernels("interpreter").check_overflow()


# Module scope: hypothesis refuses fixtures that look as if they were set up afresh for each example.
@pytest.fixture(scope="module", params=backends.available())
def backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend that runs on this machine."""
    return request.param


@pytest.fixture(scope="module", params=[name for name in backends.available() if name != "reference"])
def kernel_backend(request: pytest.FixtureRequest) -> str:
    """The name of a backend with kernels of ours."""
    return request.param


@pytest.fixture
def two_threads():
    """Run with two threads, whatever the process had, so that a split over threads is exercised."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
