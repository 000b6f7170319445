"""`shrink` and `expand_add` on every backend: together they are `residual_add`, apart they take a travelled `t`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_accurate, assert_all_accurate, assert_same_bits
from ..support.memory import ACTIVATION_LAYOUTS, guarded, laid_out, poisoned_memory
from ..support.problems import Halves, ResidualAdd, evaluate
from ..support.strategies import halves
from ..support.targets import KERNEL_DTYPES, device_of

dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


@given(data=st.data())
def test_any_shape_layout_and_gradient_mask_is_as_accurate_as_pytorch(backend, data):
    data.draw(halves(backend)).assert_solved_by(backend)


@dtypes
def test_every_mask_of_needed_gradients(backend, dtype):
    for wanted in product((False, True), repeat=4):
        needs = frozenset(name for name, need in zip("yxAB", wanted, strict=True) if need)
        Halves((5, 13), 70, 51, 8, dtype, torch.float32, needs=needs).assert_solved_by(backend)


@dtypes
@pytest.mark.parametrize("lead", [(), (0,), (1,), (0, 3), (2, 3, 2, 5)], ids=str)
def test_any_leading_dimensions(backend, dtype, lead):
    Halves(lead, 17, 33, 3, dtype, dtype, needs=frozenset("yxAB")).assert_solved_by(backend)


@dtypes
def test_t_is_kept_in_the_accumulators_float32(backend, dtype):
    torch.manual_seed(0)
    x, A = (torch.randn(shape, device=device_of(backend)).to(dtype) for shape in ((67, 40), (8, 40)))
    with use_backend(backend), poisoned_memory():
        t = functional.shrink(x, A)
    assert t.dtype is torch.float32
    assert_accurate("t", t, (x.float() @ A.float().T), x.double() @ A.double().T, dtype)


@dtypes
def test_the_halves_compute_what_the_whole_computes(backend, dtype):
    whole = ResidualAdd((61,), 96, 75, 8, dtype, dtype)
    inputs, _ = whole.tensors(device_of(backend))
    y, x, A, B = inputs.values()
    with use_backend(backend), poisoned_memory():
        together = functional.residual_add(y, x, A, B, 0.7)
        apart = functional.expand_add(y, functional.shrink(x, A), B, 0.7)
    exact = whole.truth()["out"]
    assert_accurate("apart", apart, together, exact, dtype)
    assert_accurate("together", together, apart, exact, dtype)


@dtypes
@pytest.mark.parametrize("t_dtype", [torch.float32, None], ids=["float32 t", "t like y"])
@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "transposed_leading", "inner_stride", "expanded"])
def test_expand_add_takes_a_t_of_either_dtype_and_any_layout(backend, dtype, t_dtype, layout):
    torch.manual_seed(0)
    device = device_of(backend)
    y, B, g = (torch.randn(shape, device=device).to(dtype) for shape in ((4, 9, 50), (50, 6), (4, 9, 50)))
    t = laid_out(torch.randn(4, 9, 6, device=device).to(t_dtype or dtype), layout)
    tensors, needs = {"y": y, "t": t, "B": B}, frozenset("ytB")

    def expression(y, t, B):
        return y + 0.7 * torch.nn.functional.linear(t.to(y.dtype), B)

    with use_backend(backend), poisoned_memory():
        ours = evaluate(lambda y, t, B: functional.expand_add(y, t, B, 0.7), tensors, needs, g)
    eager = evaluate(expression, tensors, needs, g)
    truth = evaluate(expression, {n: v.double() for n, v in tensors.items()}, needs, g.double())
    assert_all_accurate(ours, eager, truth, dtype)


@dtypes
@pytest.mark.parametrize("layout", ACTIVATION_LAYOUTS)
def test_expand_add_inplace_writes_y_and_nothing_around_it(backend, dtype, layout):
    problem = Halves((3, 7), 70, 53, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(backend))
    y = guarded(inputs["y"], layout)
    with use_backend(backend), poisoned_memory():
        t = functional.shrink(inputs["x"], inputs["A"])
        fresh = functional.expand_add(y.view, t, inputs["B"], problem.scale)
        result = functional.expand_add(y.view, t, inputs["B"], problem.scale, inplace=True)
    assert result is y.view
    y.assert_only_the_view_changed()
    assert_same_bits(y.view, fresh)
    assert_accurate("y", y.view, problem.eager()["out"], problem.truth()["out"], dtype)


def test_one_t_serves_several_layers_and_collects_their_gradients(backend):
    """LoR2C's spans: shrink at one layer, expand at later ones; the gradient of `t` is the sum over its uses."""
    torch.manual_seed(0)
    device = device_of(backend)
    x, A = torch.randn(11, 24, device=device), torch.randn(4, 24, device=device)
    ys = [torch.randn(11, 30, device=device) for _ in range(3)]
    Bs = [torch.randn(30, 4, device=device) for _ in range(3)]

    def spans(shrink, expand_add):
        a = A.clone().requires_grad_() if shrink is functional.shrink else A.double().requires_grad_()
        t = shrink(x.to(a.dtype), a)
        out = sum(expand_add(y.to(a.dtype), t, B.to(a.dtype), 0.5) for y, B in zip(ys, Bs, strict=True))
        return torch.autograd.grad(out.square().sum(), a)[0]

    with use_backend(backend), poisoned_memory():
        ours = spans(functional.shrink, functional.expand_add)
    exact = spans(lambda x, A: x @ A.T, lambda y, t, B, s: y + s * t @ B.T)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)
