"""Which backend runs: the choice by device, `use_backend`, `LOWRANK_FAST_BACKEND`, and an error that says why not."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import backends, fallback, functional, use_backend

from .support.process import run_python

MISSING = [name for name in backends.NAMES if name not in backends.available()]


def _arguments(dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return tuple(torch.randn(shape, device=device).to(dtype) for shape in ((4, 6), (4, 5), (2, 5), (6, 2)))


@pytest.fixture
def fallback_calls(monkeypatch):
    """The names of the fallback's functions that were called directly: that is how the backend "reference" runs."""
    calls: list[str] = []
    for name in ("residual_add", "residual_add_backward"):
        original = getattr(fallback, name)

        def spy(*arguments, _name=name, _original=original):
            calls.append(_name)
            return _original(*arguments)

        monkeypatch.setattr(fallback, name, spy)
    return calls


def test_the_reference_is_always_available():
    assert "reference" in backends.available()
    assert backends.unavailable_reason("reference") is None


def test_every_backend_is_available_or_says_why_not():
    for name in backends.NAMES:
        reason = backends.unavailable_reason(name)
        assert (reason is None) == (name in backends.available())
        if reason is not None:
            assert len(reason) > 10 and "\n" not in reason


def test_an_unknown_name_is_an_error_that_lists_the_known_ones():
    for asked in (backends.unavailable_reason, backends.force, lambda name: use_backend(name).__enter__()):
        with pytest.raises(ValueError, match="'cuda', 'triton', 'cpu', 'reference'; got 'nonsense'"):
            asked("nonsense")


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_that_cannot_run_here_is_an_error_with_the_reason(name):
    with pytest.raises(RuntimeError) as caught, use_backend(name):
        pytest.fail("the block must not run")
    assert f"backend {name!r} is not available" in str(caught.value)
    assert backends.unavailable_reason(name) in str(caught.value)


def test_a_refused_backend_leaves_the_choice_as_it_was(fallback_calls):
    with use_backend("reference"):
        with pytest.raises(ValueError, match="nonsense"), use_backend("nonsense"):
            pass
        functional.residual_add(*_arguments())
    assert fallback_calls == ["residual_add"]


def test_use_backend_nests_and_ends_even_by_an_exception(fallback_calls):
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        functional.residual_add(*_arguments())
        assert fallback_calls == ["residual_add"]
    functional.residual_add(*_arguments())
    assert fallback_calls == ["residual_add"], "outside the block the dispatcher chooses again"


def test_backward_runs_on_the_backend_of_its_forward(fallback_calls):
    y, x, A, B = _arguments()
    with use_backend("reference"):
        out = functional.residual_add(y, x, A.requires_grad_(), B)
    out.sum().backward()
    assert fallback_calls == ["residual_add", "residual_add_backward"]


def test_float64_runs_on_the_reference_by_itself(fallback_calls):
    functional.residual_add(*_arguments(torch.float64))
    assert fallback_calls == ["residual_add"]


def test_fake_tensors_of_any_device_get_shapes(backend):
    """A model on the meta device can be built and traced, whatever the backend."""
    if backend != "reference":
        pytest.skip("a forced backend takes tensors of its own device only")
    out = functional.residual_add(*_arguments(device="meta"))
    assert out.shape == (4, 6) and out.is_meta


@pytest.mark.skipif("cpu" in MISSING, reason="the C++ kernels are not built")
def test_the_cpu_backend_refuses_what_it_cannot_run():
    with use_backend("cpu"):
        with pytest.raises(RuntimeError, match="float64 runs on 'reference' only"):
            functional.residual_add(*_arguments(torch.float64))
        with pytest.raises(RuntimeError, match="cpu tensors only; got a tensor on meta"):
            functional.residual_add(*_arguments(device="meta"))


REPORT = """
import torch
from lowrank_fast import fallback, functional
called = []
original = fallback.residual_add
fallback.residual_add = lambda *arguments: called.append("reference") or original(*arguments)
functional.residual_add(*(torch.randn(s) for s in ((4, 6), (4, 5), (2, 5), (6, 2))))
print(called)
"""


@pytest.mark.parametrize(("value", "printed"), [("reference", "['reference']"), ("", "[]"), (None, "[]")])
def test_the_environment_chooses_the_backend(value, printed):
    result = run_python(REPORT, LOWRANK_FAST_BACKEND=value)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == printed


CALL = "import torch, lowrank_fast; lowrank_fast.shrink(torch.ones(2, 3), torch.ones(1, 3))"


def test_an_unknown_backend_in_the_environment_is_an_error_of_every_call():
    says = "LOWRANK_FAST_BACKEND=nonsense: backend must be one of 'cuda', 'triton', 'cpu', 'reference'; got 'nonsense'"
    result = run_python(CALL, LOWRANK_FAST_BACKEND="nonsense")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1] == f"RuntimeError: {says}"


def test_a_backend_chosen_in_the_code_goes_before_a_wrong_environment():
    """And importing goes well, so that `lowrank-fast info` can say what there is instead."""
    code = """
import torch, lowrank_fast
x, A = torch.ones(2, 3), torch.ones(1, 3)
with lowrank_fast.use_backend("reference"):
    print(lowrank_fast.shrink(x, A).tolist())
try:
    lowrank_fast.shrink(x, A)
except RuntimeError as error:
    print(error)
"""
    result = run_python(code, LOWRANK_FAST_BACKEND="nonsense")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[[3.0], [3.0]]\nLOWRANK_FAST_BACKEND=nonsense: ")


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_backend_in_the_environment_is_an_error_with_the_reason(name):
    result = run_python(CALL, LOWRANK_FAST_BACKEND=name)
    assert result.returncode != 0
    assert f"LOWRANK_FAST_BACKEND={name}: backend {name!r} is not available: " in result.stderr
    assert backends.unavailable_reason(name) in result.stderr
