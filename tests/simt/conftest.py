"""Makes the harness a backend, "simt", so that the project's own problems (tests/support) run on the CUDA kernels."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lowrank_fast import backends

from . import build
from .harness import Simt

OPS = (
    "residual_add", "residual_add_", "residual_add_out", "residual_add_backward", "shrink", "shrink_backward",
    "expand_add", "expand_add_", "expand_add_backward", "routed_projection", "routed_projection_backward",
)  # fmt: skip


@pytest.fixture(scope="session", autouse=True)
def _harness_builds() -> None:
    reason = build.missing_reason()
    if reason is not None:
        pytest.skip(reason)
    build.build()


@pytest.fixture(params=[0], ids=lambda seed: f"seed{seed}")
def simt(request, monkeypatch):
    """The backend "simt" with one schedule; a finding of the harness fails the test."""
    machine = Simt(seed=request.param)
    monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, "simt"))
    monkeypatch.setitem(backends._REASONS, "simt", lambda: None)
    monkeypatch.setitem(backends._NAMESPACES, "simt", SimpleNamespace(**{name: getattr(machine, name) for name in OPS}))
    return machine
