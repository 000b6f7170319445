"""What autograd and autocast may expect: double backward refused, accumulation, checkpointing, `no_grad`, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_same_bits
from ..support.problems import Halves, ResidualAdd, Routed
from ..support.targets import device_of

PROBLEMS = [
    ResidualAdd(),
    Halves(),
    *(Routed((2, 3), routing=routing) for routing in ("batch", "sample", "token", "static")),
]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: getattr(p, "routing", type(p).__name__))


def _leaves(problem, backend: str):
    inputs, g = problem.tensors(device_of(backend))
    return {name: value.requires_grad_() for name, value in inputs.items()}, g


@problems
def test_double_backward_is_refused_with_a_clear_error(backend, problem):
    leaves, _ = _leaves(problem, backend)
    with use_backend(backend):
        out = problem.call(**leaves)
        (first,) = torch.autograd.grad(out.square().sum(), leaves["A"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()


@problems
def test_double_backward_is_refused_where_no_gradient_coming_in_requires_grad(backend, problem):
    leaves, _ = _leaves(problem, backend)
    with use_backend(backend):
        (first,) = torch.autograd.grad(problem.call(**leaves).sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.square().sum().backward()


def test_the_gradient_of_y_is_the_one_coming_in_and_stays_differentiable(backend):
    leaves, _ = _leaves(ResidualAdd(), backend)
    with use_backend(backend):
        out = functional.residual_add(**leaves)
        (first,) = torch.autograd.grad(out.square().sum(), leaves["y"], create_graph=True)
    assert torch.allclose(first, 2 * out)
    assert first.requires_grad


@problems
def test_forward_mode_is_refused_with_and_without_requires_grad(backend, problem):
    inputs, _ = problem.tensors(device_of(backend))
    for requires_grad in (False, True):
        values = {name: value.clone().requires_grad_(requires_grad) for name, value in inputs.items()}
        with use_backend(backend), forward_ad.dual_level():
            values["x"] = forward_ad.make_dual(values["x"], torch.ones_like(values["x"]))
            with pytest.raises(RuntimeError, match=r"jvp"):
                problem.call(**values)
    with use_backend(backend), pytest.raises(RuntimeError):
        torch.func.jvp(lambda x: problem.call(**(inputs | {"x": x})), (inputs["x"],), (torch.ones_like(inputs["x"]),))


@problems
def test_no_grad_records_nothing_and_gives_the_same_bits(backend, problem):
    leaves, _ = _leaves(problem, backend)
    with use_backend(backend):
        recorded = problem.call(**leaves)
        with torch.no_grad():
            plain = problem.call(**leaves)
        with torch.inference_mode():
            inferred = problem.call(**leaves)
    assert recorded.requires_grad and not plain.requires_grad and not inferred.requires_grad
    assert_same_bits(plain, recorded.detach(), "no_grad")
    assert_same_bits(inferred, recorded.detach(), "inference_mode")


@problems
def test_gradients_accumulate_over_two_backwards(backend, problem):
    leaves, g = _leaves(problem, backend)
    with use_backend(backend):
        problem.call(**leaves).backward(g)
        once = {name: leaf.grad.clone() for name, leaf in leaves.items()}
        problem.call(**leaves).backward(g)
    for name, leaf in leaves.items():
        assert_same_bits(leaf.grad, once[name] * 2, name)


@problems
def test_a_parameter_used_in_two_layers_gets_the_sum_of_its_gradients(backend, problem):
    """EffiLoRA and Lily share A between layers."""
    leaves, g = _leaves(problem, backend)
    with use_backend(backend):
        y = leaves.pop("y")
        out = problem.call(y=problem.call(y=y, **leaves), **leaves)
        out.backward(g)
        shared = leaves["A"].grad.clone()
        leaves["A"].grad = None
        problem.call(y=y.detach(), **leaves).backward(g)
    assert_same_bits(shared, leaves["A"].grad * 2, "dA")


@problems
def test_backward_twice_through_a_retained_graph_gives_the_same_bits(backend, problem):
    leaves, g = _leaves(problem, backend)
    with use_backend(backend):
        out = problem.call(**leaves)
        first = torch.autograd.grad(out, list(leaves.values()), g, retain_graph=True)
        second = torch.autograd.grad(out, list(leaves.values()), g)
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


@problems
def test_activation_checkpointing_recomputes_the_same_gradients(backend, problem):
    problem = problem.but(dropout_p=0.3)
    results = []
    for recompute in (False, True):
        leaves, g = _leaves(problem, backend)
        torch.manual_seed(5)
        with use_backend(backend):
            values = list(leaves.values())
            names = list(leaves)

            def run(*tensors, names=names):
                return problem.call(**dict(zip(names, tensors, strict=True)))

            out = checkpoint(run, *values, use_reentrant=False) if recompute else run(*values)
            out.backward(g)
        results.append({name: leaf.grad for name, leaf in leaves.items()})
    for name, value in results[0].items():
        assert_same_bits(results[1][name], value, name)


def test_the_stream_may_be_the_input(backend):
    """`y is x`: the usual residual of LoR2C across an identity; the gradients of both roles add up."""
    torch.manual_seed(0)
    h, A, B = (torch.randn(shape, device=device_of(backend)) for shape in ((9, 20), (3, 20), (20, 3)))
    h.requires_grad_()
    with use_backend(backend):
        out = functional.residual_add(h, h, A, B, 0.5)
        (gradient,) = torch.autograd.grad(out.sum(), h)
    exact = torch.ones_like(h).double() + 0.5 * torch.ones_like(h).double() @ B.double() @ A.double()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ autocast


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["residual_add", "routed_projection"])
def test_under_autocast_the_stream_keeps_its_dtype_and_x_is_cast_to_it(backend, op, stream, x_dtype):
    device = device_of(backend)
    problem = Routed((9,), 24, 40, 3, torch.float32, torch.float32)
    y, x, A, B, R = problem.tensors(device)[0].values()
    y, x = y.to(stream), x.to(x_dtype)
    x.requires_grad_()
    rest = (A, B[0]) if op == "residual_add" else (A, B, R)
    function = getattr(functional, op)
    with use_backend(backend):
        with torch.autocast(device.type, torch.bfloat16):
            out = function(y, x, *rest)
        expected = function(y, x.to(stream), *rest)
    assert out.dtype is stream
    assert_same_bits(out.detach(), expected.detach())
    (gradient,) = torch.autograd.grad(out.float().sum(), x)
    assert gradient.dtype is x_dtype


def test_without_autocast_another_dtype_of_x_stays_an_error(backend):
    y, x, A, B = ResidualAdd().tensors(device_of(backend))[0].values()
    with use_backend(backend), pytest.raises(TypeError, match="x must have the dtype of y"):
        functional.residual_add(y, x.bfloat16(), A, B)


@pytest.mark.parametrize("routing", ["batch", "token"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_beside_sixteen_bit_activations_get_float32_gradients(backend, dtype, routing):
    problem = Routed((9,), 24, 40, 3, dtype, torch.float32, needs=frozenset("yxABR"), routing=routing)
    results = problem.ours(backend)
    assert {name: value.dtype for name, value in results.items()} == {
        "out": dtype,
        "dy": dtype,
        "dx": dtype,
        **dict.fromkeys(("dA", "dB", "dR"), torch.float32),
    }
