"""Inputs at the edge of what tensors can be: inference tensors, no columns, stride 0, negated views, the meta device,
and who watches a call. Each works, or the error says what to do.
"""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_fast import _native, backends, functional, use_backend

from ..support.accuracy import assert_same_bits
from ..support.problems import Halves, Problem, ResidualAdd, Routed, evaluate
from ..support.targets import KERNEL_DTYPES, device_of

ALL = frozenset(("y", "x", "A", "B", "R", "weights"))
PROBLEMS: list[Problem] = [
    ResidualAdd((2, 3)),
    Halves((2, 3)),
    *(Routed((2, 3), routing=routing) for routing in ("batch", "sample", "token", "static")),
]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: getattr(p, "routing", type(p).__name__))


@problems
def test_inference_tensors_give_the_bits_of_ordinary_ones(backend, problem):
    inputs, _ = problem.tensors(device_of(backend))
    with use_backend(backend):
        expected = problem.call(**inputs)
        with torch.inference_mode():
            made_there = {name: value.clone() for name, value in inputs.items()}
            inside = problem.call(**made_there)
        outside = problem.call(**made_there)
    assert inside.is_inference() and made_there["x"].is_inference()
    assert_same_bits(inside, expected, "inside")
    assert_same_bits(outside, expected, "outside")


@problems
def test_an_inference_tensor_that_a_backward_would_need_is_an_error_that_says_so(backend, problem):
    inputs, _ = problem.tensors(device_of(backend))
    with torch.inference_mode():
        inputs["x"] = inputs["x"].clone()
    inputs["A"].requires_grad_()
    with (
        use_backend(backend),
        pytest.raises(RuntimeError, match=r"Inference tensors cannot be saved for backward.*clone"),
    ):
        problem.call(**inputs)


@problems
@pytest.mark.parametrize("name", ["y", "x", "A", "B", "g"])
def test_a_tensor_of_stride_zero_counts_as_its_values(backend, problem, name):
    device = device_of(backend)
    results = []
    for copied in (False, True):
        inputs, g = problem.tensors(device)
        tensors = {**inputs, "g": g}
        one = tensors[name][..., :1] if name in "AB" else tensors[name].reshape(-1, tensors[name].shape[-1])[0]
        tensors[name] = one.expand(tensors[name].shape)
        if copied:
            tensors[name] = tensors[name].contiguous()
        g = tensors.pop("g")
        with use_backend(backend):
            results.append(evaluate(problem.call, tensors, ALL & frozenset(tensors), g))
    for key, value in results[0].items():  # a BLAS may add in another order: errors are relative to the largest element
        size = max(1.0, results[1][key].abs().max().item())
        torch.testing.assert_close(value, results[1][key], rtol=1e-6, atol=1e-6 * size, msg=key)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_negated_view_counts_as_its_values(backend, recorded):
    """The imaginary part of a conjugated tensor is stored with the other sign."""
    device = device_of(backend)
    y, x = (torch.randn(5, d, dtype=torch.complex64, device=device).conj().imag for d in (30, 20))
    A, B = (torch.randn(shape, device=device) for shape in ((3, 20), (30, 3)))
    assert y.is_neg() and x.is_neg()
    A.requires_grad_(recorded)
    with use_backend(backend):
        out = functional.residual_add(y, x, A, B)
        expected = functional.residual_add(y.resolve_neg(), x.resolve_neg(), A, B)
    assert_same_bits(out.detach(), expected.detach())


@problems
@pytest.mark.parametrize("name", ["y", "x"])
def test_no_columns_are_refused(backend, problem, name):
    inputs, _ = problem.tensors(device_of(backend))
    inputs[name] = inputs[name][..., :0]
    with use_backend(backend), pytest.raises(ValueError, match=rf"{name} must be \[.., d >= 1\]; got \[2, 3, 0\]"):
        problem.call(**inputs)


@problems
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_on_the_meta_device_every_function_gives_shapes_and_dtypes(problem, dtype):
    """A model can be built and traced there, forward and backward."""
    problem = problem.but(dtype=dtype)
    real, (inputs, g) = problem.but(needs=ALL & frozenset(problem.shapes())).eager(), problem.tensors()
    meta = {name: value.to("meta") for name, value in inputs.items()}
    results = evaluate(problem.prepared("meta"), meta, ALL & frozenset(meta), g.to("meta"))
    for name, value in results.items():
        assert value.is_meta and (value.shape, value.dtype) == (real[name].shape, real[name].dtype), name


# ------------------------------------------------------------------------------------------------ who watches


@pytest.mark.skipif(_native.module() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("recorded", [False, True])
def test_the_way_around_python_is_taken_and_gives_the_same_bits(monkeypatch, recorded):
    y, x, A, B = ResidualAdd((5, 7)).tensors()[0].values()
    A.requires_grad_(recorded)
    fast = backends.eager.residual_add(y, x, A, B, 0.5, False, None)
    monkeypatch.setattr(backends, "eager", None)
    slow = functional.residual_add(y, x, A, B, 0.5)
    assert fast.requires_grad == slow.requires_grad == recorded
    assert_same_bits(fast.detach(), slow.detach())


@pytest.mark.skipif(_native.module() is None, reason="the C++ extension is not built")
def test_the_way_around_python_writes_where_it_is_told():
    y, x, A, B = ResidualAdd((5, 7)).tensors()[0].values()
    expected = functional.residual_add(y, x, A, B, 0.5)
    out = torch.full_like(y, float("nan"))
    assert backends.eager.residual_add(y, x, A, B, 0.5, False, out) is out and out._version == 1
    own = y.clone()
    assert backends.eager.residual_add(own, x, A, B, 0.5, False, own) is own and own._version == 1
    assert backends.eager.residual_add(y, x, A, B, 0.5, True, None) is y
    for written in (out, own, y):
        assert_same_bits(written, expected)
    shifted = torch.zeros(y.numel() + 1)
    assert (
        backends.eager.residual_add(shifted[:-1].view(y.shape), x, A, B, 0.5, False, shifted[1:].view(y.shape)) is None
    )


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [_Dispatched, _Called])
def test_a_mode_sees_the_op(mode):
    y, x, A, B = ResidualAdd().tensors()[0].values()
    with mode() as watching:
        functional.residual_add(y, x, A, B)
    assert any("lowrank_fast" in name for name in watching.seen), watching.seen


def test_a_subclass_sees_the_op():
    class Marked(torch.Tensor):
        pass

    y, x, A, B = ResidualAdd().tensors()[0].values()
    assert type(functional.residual_add(y.as_subclass(Marked), x, A, B)) is Marked


@pytest.mark.skipif(_native.module() is None, reason="the C++ extension is not built")
def test_the_profiler_sees_the_op():
    y, x, A, B = ResidualAdd().tensors()[0].values()
    with torch.profiler.profile() as profile:
        functional.residual_add(y, x, A.requires_grad_(), B).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"lowrank_fast::residual_add", "lowrank_fast::residual_add_backward"} <= names


@pytest.mark.skipif(_native.module() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    "change",
    [
        {"scale": 2},
        {"scale": torch.tensor(2.0)},
        {"x": torch.zeros(6, 23)},
        {"x": torch.zeros(6, 24, dtype=torch.bfloat16)},
        {"A": torch.zeros(4, 24, device="meta")},
        {"B": torch.zeros(40, 5)},
        {"y": None},
        {"inplace": True, "x": torch.zeros(6, 48)[:, ::2]},
        {"inplace": True, "out": torch.zeros(6, 40)},
        {"out": torch.zeros(6, 41)},
        {"out": torch.zeros(6, 40, dtype=torch.bfloat16)},
        {"out": torch.zeros(40).expand(6, 40)},
        {"out": torch.zeros(6, 40, requires_grad=True)},
        {"out": torch.zeros(6, 40), "A": torch.zeros(4, 24, requires_grad=True)},
    ],
    ids=lambda change: ",".join(change),
)
def test_the_way_around_python_leaves_everything_unusual_to_it(change):
    y, x, A, B = ResidualAdd().tensors()[0].values()
    arguments = {"y": y, "x": x, "A": A, "B": B, "scale": 0.5, "inplace": False, "out": None} | change
    assert backends.eager.residual_add(*arguments.values()) is None
