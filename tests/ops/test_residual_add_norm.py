"""`residual_add_norm` on every backend: both results and every gradient against float64, and what calls may expect."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_fast import functional, reference, residual_add_norm, use_backend

from ..support.accuracy import assert_all_accurate, assert_same_bits
from ..support.memory import poisoned_memory
from ..support.problems import ResidualAdd
from ..support.targets import KERNEL_DTYPES, device_of, interpreted

kinds = pytest.mark.parametrize("kind", ["rms", "layer"])


def _tensors(backend: str, kind: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """`y, x, A, B, weight` and for LayerNorm `bias`, and the gradients of both results."""
    inputs, g = ResidualAdd((2, 19), 40, 66, 5, dtype, torch.float32).tensors(device_of(backend))
    generator = torch.Generator().manual_seed(3)
    for name in ("weight", "bias") if kind == "layer" else ("weight",):
        inputs[name] = torch.randn(66, generator=generator).to(g.device)
    return inputs, (g, torch.randn(g.shape, generator=generator).to(dtype).to(g.device))


def _call(tensors: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    return residual_add_norm(**tensors, scale=0.7, eps=1e-5, kind=kind)


def _expression(tensors: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    y, x, A, B = (tensors[name].to(tensors["y"].dtype) for name in "yxAB")
    out = y + 0.7 * ((x @ A.T) @ B.T)
    return out, reference.norm(out, tensors["weight"], tensors.get("bias"), 1e-5, kind == "layer")


def _results(function, tensors: dict[str, Tensor], gradients: tuple[Tensor, Tensor], kind: str) -> dict[str, Tensor]:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in tensors.items()}
    out, normed = function(leaves, kind)
    found = torch.autograd.grad((out, normed), list(leaves.values()), gradients)
    return {"out": out.detach(), "normed": normed.detach(), **dict(zip(leaves, found, strict=True))}


@kinds
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_results_and_gradients_are_as_accurate_as_pytorch(backend, dtype, kind):
    tensors, gradients = _tensors(backend, kind, dtype)
    with use_backend(backend), poisoned_memory():
        ours = _results(_call, tensors, gradients, kind)
    eager = _results(_expression, tensors, gradients, kind)
    exact = {name: value.double() for name, value in tensors.items()}
    truth = _results(_expression, exact, tuple(g.double() for g in gradients), kind)
    assert_all_accurate(ours, eager, truth, dtype)


@kinds
def test_without_gradients_the_bits_are_the_same(backend, kind):
    tensors, _ = _tensors(backend, kind, torch.float32)
    with use_backend(backend), poisoned_memory():
        plain = _call(tensors, kind)
        recorded = _call({**tensors, "A": tensors["A"].clone().requires_grad_()}, kind)
        out = functional.residual_add(*(tensors[name] for name in "yxAB"), 0.7)
    for one, other in zip(plain, recorded, strict=True):
        assert not one.requires_grad and other.requires_grad
        assert_same_bits(one, other.detach())
    torch.testing.assert_close(plain[0], out, rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_needed_is_none(backend):
    tensors, _ = _tensors(backend, "rms", torch.float32)
    tensors["y"].requires_grad_()
    with use_backend(backend):
        _call(tensors, "rms")[1].sum().backward()
    assert tensors["y"].grad is not None
    assert all(value.grad is None for name, value in tensors.items() if name != "y")


def test_double_backward_is_refused(backend):
    tensors, _ = _tensors(backend, "rms", torch.float32)
    A = tensors["A"].requires_grad_()
    with use_backend(backend):
        (first,) = torch.autograd.grad(_call(tensors, "rms")[1].square().sum(), A, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()


@kinds
def test_it_compiles_without_a_graph_break_to_the_same_bits(backend, kind):
    if interpreted(backend):
        pytest.skip("torch.compile cannot trace Triton's interpreter")
    torch._dynamo.reset()
    tensors, gradients = _tensors(backend, kind, torch.float32)
    compiled = torch.compile(_call, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        plain, traced = (_results(call, tensors, gradients, kind) for call in (_call, compiled))
    for name, value in plain.items():
        torch.testing.assert_close(traced[name], value, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "batch"}, "kind must be one of 'rms', 'layer'; got 'batch'"),
        ({"bias": torch.ones(66)}, "bias must be None with kind='rms'"),
        ({"weight": torch.ones(65)}, r"weight must be \[d_out=66\]; got \[65\]"),
        ({"weight": torch.ones(66, device="meta")}, "weight must be on the device of the activations, cpu; got meta"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_named(settings, message):
    tensors, _ = _tensors("reference", "rms", torch.float32)
    with pytest.raises(ValueError, match=f"residual_add_norm: {message}"):
        residual_add_norm(**tensors | settings)
