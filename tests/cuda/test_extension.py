"""The built CUDA extension, as far as a machine without a GPU can tell: it loads, and every op has its CUDA kernel."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from lowrank_fast import _cuda, ops


@pytest.fixture
def extension():
    try:
        return importlib.import_module("lowrank_fast._CUDA")
    except ImportError as error:
        pytest.skip(f"the CUDA extension is not built: {error}")


@pytest.mark.parametrize("name", ops.SCHEMAS.keys() - ops.COMPOSED.keys())
def test_every_op_has_a_cuda_kernel(extension, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank_fast::{name}", "CUDA")


def test_fake_cuda_tensors_go_through_every_op(extension):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        y, x = (torch.empty(2, 5, d, device="cuda", dtype=torch.bfloat16) for d in (40, 24))
        A, B = torch.empty(4, 24, device="cuda"), torch.empty(40, 4, device="cuda")
        out, t = torch.ops.lowrank_fast.residual_add(y, x, A, B, 1.0, 0.0, None, True)
        assert (out.shape, t.shape, out.device.type) == (y.shape, (2, 5, 4), "cuda")
        dx, dA, dB = torch.ops.lowrank_fast.residual_add_backward(y, x, t, A, B, 1.0, 0.0, None, True, True, True)
        assert (dx.shape, dA.shape, dB.shape) == (x.shape, A.shape, B.shape)


def test_the_extension_names_its_architectures(extension):
    assert all(name.removesuffix("a").isdigit() for name in extension.architectures.split(";"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'lowrank_fast._CUDA'"), "is not built"),
        (ImportError("undefined symbol: _ZN3c10\nmore"), "does not load with torch"),
    ],
)
def test_a_missing_or_mismatched_extension_is_one_line(monkeypatch, error, said):
    def refuse(name: str):
        raise error

    monkeypatch.setattr(_cuda, "_module", None)
    monkeypatch.setattr(_cuda, "_reason", None)
    monkeypatch.setattr(importlib, "import_module", refuse)
    _cuda.load()
    reason = _cuda.missing_reason()
    assert reason is not None and said in reason and "reinstall" in reason and "\n" not in reason
    assert _cuda.module() is None


def test_an_extension_of_another_torch_is_left_out_and_says_so(monkeypatch):
    registered = []
    other = SimpleNamespace(torch_version="1.2.3+cu118", register=lambda: registered.append(1))
    monkeypatch.setattr(_cuda, "_module", None)
    monkeypatch.setattr(_cuda, "_reason", None)
    monkeypatch.setattr(importlib, "import_module", lambda name: other)
    _cuda.load()
    assert _cuda.module() is None and not registered
    assert f"built against torch 1.2.3+cu118, and this is {torch.__version__}; reinstall" in _cuda.missing_reason()


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(_cuda, "_reason", None)
    assert "has no CUDA" in (_cuda.missing_reason() or "")


def test_importing_the_package_does_not_initialise_cuda():
    assert "lowrank_fast" in sys.modules
    assert not torch.cuda.is_initialized()
