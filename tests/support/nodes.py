"""Autograd nodes that exist twice, in C++ for plain calls and in Python for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from lowrank_fast import backends

T = TypeVar("T")

needs_cpp = pytest.mark.skipif(backends.eager is None, reason="the C++ extension is not built")


def in_python(run: Callable[[], T]) -> T:
    """What `run` returns when no call is plain enough for C++."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "eager", None)
        return run()
