"""The built CUDA extension, as far as a machine without a GPU can tell: it loads, and every op has its CUDA kernel."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from lowrank_fast import _cuda, ops

from ..support.process import run_python


@pytest.fixture
def extension():
    try:
        return importlib.import_module("lowrank_fast._CUDA")
    except ImportError as error:
        pytest.skip(f"the CUDA extension is not built: {error}")


@pytest.mark.parametrize("name", sorted(ops.SCHEMAS.keys() - ops.COMPOSED.keys()))
def test_every_op_has_a_cuda_kernel(extension, name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"lowrank_fast::{name}", "CUDA")


def test_fake_cuda_tensors_go_through_every_op(extension):
    from torch._subclasses.fake_tensor import FakeTensorMode

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device="cuda", dtype=dtype)

    with FakeTensorMode():
        y, x, A, B, bank, R = (made(*s) for s in ((2, 5, 40), (2, 5, 24), (4, 24), (40, 4), (3, 40, 4), (3, 4)))
        t, p, w = (made(*s, dtype=torch.float32) for s in ((2, 5, 4), (2, 5, 3), (3,)))
        drop, routed = (0.0, None), (x, A, bank, R, None, None, 1.0, "batch", "t", 0.0, None)
        calls = {
            "residual_add": ((y, x, A, B, 1.0, *drop, True), {}, [y, t]),
            "residual_add_": ((y, x, A, B, 1.0, *drop, True), {}, [t]),
            "residual_add_out": ((y, x, A, B, 1.0, *drop, True), {"out": made(2, 5, 40)}, [t]),
            "residual_add_norm": ((y, x, A, B, 1.0, made(40), None, 1e-6, False), {}, [y, y]),
            "residual_add_backward": ((y, x, t, A, B, 1.0, *drop, True, True, True), {}, [x, A, B]),
            "residual_add_backward_out": ((y, x, t, A, B, 1.0, *drop), dict(dx=x, dA=A, dB=B), []),
            "shrink": ((x, A, *drop), {}, [t]),
            "shrink_backward": ((t, x, A, *drop, torch.bfloat16, True, True), {}, [x, A]),
            "expand_add": ((y, t, B, 1.0), {}, [y]),
            "expand_add_": ((y, t, B, 1.0), {}, []),
            "expand_add_backward": ((y, t, B, 1.0, True, True), {}, [t, B]),
            "routed_projection": ((y, *routed), {}, [y, t, p, w]),
            "routed_projection_": ((y, *routed), {}, [t, p, w]),
            "routed_projection_backward": (
                (y, x, t, p, w, A, bank, R, None, None, 1.0, "batch", "t", *drop, [True, True, True, True, False]),
                {},
                [x, A, bank, R, made(0, dtype=torch.float32)],
            ),
        }
        assert calls.keys() == ops.SCHEMAS.keys()
        for name, (arguments, named, expected) in calls.items():
            result = getattr(torch.ops.lowrank_fast, name)(*arguments, **named)
            results = result if isinstance(result, tuple) else () if result is None else (result,)
            assert [(r.shape, r.dtype, r.device) for r in results] == [
                (e.shape, e.dtype, e.device) for e in expected
            ], name


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


INFO = "from lowrank_fast.cli import main; raise SystemExit(main(['info', '--json']))"
BROKEN = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "lowrank_fast._CUDA":
            raise ImportError("undefined symbol: _ZN3c104cuda")
sys.meta_path.insert(0, Broken())
"""
OTHER = """
import sys, types
sys.modules["lowrank_fast._CUDA"] = types.SimpleNamespace(torch_version="1.2.3+cu118", register=None)
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        (BROKEN, "the CUDA extension does not load with torch"),
        (OTHER, "the CUDA extension was built against torch 1.2.3+cu118, and this is"),
    ],
    ids=["does not load", "of another torch"],
)
def test_a_mismatched_extension_leaves_the_package_working_and_info_says_what_to_do(before, said):
    done = run_python(before + INFO, LOWRANK_FAST_BACKEND=None)
    assert done.returncode == 0, done.stderr
    reason = json.loads(done.stdout)["backends"]["cuda"]
    assert said in reason and "reinstall lowrank_fast" in reason and "\n" not in reason
    assert json.loads(done.stdout)["backends"]["reference"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_package_works_and_info_says_what_is_missing():
    code = "import torch, lowrank_fast as f; r = torch.randn; f.residual_add(r(3, 8), r(3, 4), r(2, 4), r(8, 2))\n"
    done = run_python(code + INFO, LOWRANK_FAST_BACKEND=None)
    assert done.returncode == 0, done.stderr
    reason = json.loads(done.stdout)["backends"]["cuda"]
    assert "\n" not in reason
    if _cuda.module() is None:
        assert reason.startswith("the CUDA extension is not built; reinstall with nvcc")
    elif torch.version.cuda is None:
        assert reason.endswith("has no CUDA; install a CUDA build of torch")
    else:
        assert reason.startswith("torch sees no CUDA GPU; check the driver with nvidia-smi")


def test_cudart_stays_inside_the_extension(extension):
    """Whatever CUDA runtime torch has loaded, ours neither takes its functions nor offers its own."""
    listing = subprocess.run(["nm", "-D", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert "PyInit__CUDA" in listing
    assert not [line for line in listing.splitlines() if line.split()[-1].startswith(("cuda", "__cuda"))]
    needed = subprocess.run(["readelf", "-d", extension.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
def test_the_extension_finds_the_streams_of_torch(extension):
    assert extension.finds_torch_cuda
