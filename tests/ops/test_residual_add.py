"""`residual_add` on every backend: values and gradients against float64, memory layouts, `inplace` and `out=`."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_accurate, assert_same_bits
from ..support.memory import ACTIVATION_LAYOUTS, PARAMETER_LAYOUTS, guarded, poisoned_memory
from ..support.problems import ResidualAdd
from ..support.strategies import residual_adds
from ..support.targets import KERNEL_DTYPES, device_of

NEEDS = [frozenset(n for n, wanted in zip("yxAB", mask, strict=True) if wanted) for mask in product((0, 1), repeat=4)]
MIXED = [(dtype, parameter) for dtype in KERNEL_DTYPES for parameter in dict.fromkeys((dtype, torch.float32))]


@given(data=st.data())
def test_any_shape_layout_and_gradient_mask_is_as_accurate_as_pytorch(backend, data):
    data.draw(residual_adds(backend)).assert_solved_by(backend)


@pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: "".join(sorted(needs)) or "none")
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_mask_of_needed_gradients(backend, dtype, needs):
    ResidualAdd((5, 13), 70, 51, 8, dtype, dtype, needs=needs).assert_solved_by(backend)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 17, 32, 33, 48, 64])
def test_every_rank_and_parameter_dtype(backend, dtype, parameter_dtype, rank):
    problem = ResidualAdd((67,), 130, 97, rank, dtype, parameter_dtype, needs=frozenset("yxAB"), seed=rank)
    problem.assert_solved_by(backend)


@pytest.mark.parametrize("rows", [70, 300])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_rows_that_lie_whole_pages_apart(backend, dtype, rows):
    ResidualAdd((rows,), 1024, 2048, 32, dtype, dtype, needs=frozenset("yxAB")).assert_solved_by(backend)


@pytest.mark.parametrize("layout", [*ACTIVATION_LAYOUTS, "expanded"])
@pytest.mark.parametrize("name", ["y", "x", "g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_activation_layout(backend, dtype, name, layout):
    problem = ResidualAdd((4, 9), 64, 80, 8, dtype, dtype, needs=frozenset("yxAB"), layouts={name: layout})
    problem.assert_solved_by(backend)


@pytest.mark.parametrize("layout", [*PARAMETER_LAYOUTS, "inner_stride"])
@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_parameter_layout(backend, dtype, name, layout):
    problem = ResidualAdd((33,), 64, 80, 8, dtype, torch.float32, needs=frozenset("yxAB"), layouts={name: layout})
    problem.assert_solved_by(backend)


@pytest.mark.parametrize("lead", [(), (0,), (1,), (0, 3), (3, 0), (1, 1, 1, 1), (2, 3, 2, 5)], ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_any_leading_dimensions(backend, dtype, lead):
    ResidualAdd(lead, 17, 33, 3, dtype, dtype, needs=frozenset("yxAB")).assert_solved_by(backend)


def test_no_tokens_give_zero_parameter_gradients(backend):
    results = ResidualAdd((0,), 17, 33, 3, needs=frozenset("yxAB")).ours(backend)
    assert results["out"].shape == (0, 33) and results["dx"].shape == (0, 17)
    assert not results["dA"].any() and not results["dB"].any()


def test_wide_rows_and_many_tokens(backend):
    """More elements than one block of any kernel holds, with tails in every dimension."""
    ResidualAdd((1031,), 1029, 771, 16, needs=frozenset("yxAB")).assert_solved_by(backend)


def test_gradient_of_the_stream_is_the_incoming_gradient_itself(backend):
    y = torch.randn(5, 8, device=device_of(backend), requires_grad=True)
    x, A, B = (torch.randn(shape, device=y.device) for shape in ((5, 6), (2, 6), (8, 2)))
    with use_backend(backend):
        out = functional.residual_add(y, x, A, B)
    g = torch.randn_like(out)
    (dy,) = torch.autograd.grad(out, y, g)
    assert dy.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_zero_up_projection_leaves_every_bit_of_the_stream(backend, dtype):
    """The usual initialisation, B = 0: a model with fresh adapters computes what it computed without them."""
    problem = ResidualAdd((37,), 90, 70, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(backend))
    inputs["B"].zero_()
    with use_backend(backend), poisoned_memory():
        assert_same_bits(problem.call(**inputs), inputs["y"])


@pytest.mark.parametrize("layout", [*ACTIVATION_LAYOUTS])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(29,), (3, 7), (1,), ()], ids=str)
def test_inplace_writes_y_and_nothing_around_it(backend, dtype, lead, layout):
    problem = ResidualAdd(lead, 70, 53, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(backend))
    _, x, A, B = inputs.values()
    y = guarded(inputs["y"], layout)
    with use_backend(backend), poisoned_memory():
        result = functional.residual_add(y.view, x, A, B, problem.scale, inplace=True)
    assert result is y.view
    y.assert_only_the_view_changed()
    assert_accurate("y", y.view, problem.eager()["out"], problem.truth()["out"], dtype)


@pytest.mark.parametrize("layout", [*ACTIVATION_LAYOUTS])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("lead", [(29,), (3, 7), (1,), ()], ids=str)
def test_out_takes_the_result_and_nothing_around_it_changes(backend, dtype, lead, layout):
    problem = ResidualAdd(lead, 70, 53, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(backend))
    before = {name: value.clone() for name, value in inputs.items()}
    out = guarded(torch.full_like(inputs["y"], float("nan")), layout)
    with use_backend(backend), poisoned_memory():
        result = functional.residual_add(*inputs.values(), problem.scale, out=out.view)
    assert result is out.view
    out.assert_only_the_view_changed()
    assert_accurate("out", out.view, problem.eager()["out"], problem.truth()["out"], dtype)
    for name, value in inputs.items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_inplace_out_and_fresh_results_have_the_same_bits(backend, dtype):
    problem = ResidualAdd((41,), 96, 75, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(backend))
    y, *rest = inputs.values()
    with use_backend(backend), poisoned_memory():
        fresh = functional.residual_add(y, *rest, 0.7)
        into = functional.residual_add(y, *rest, 0.7, out=torch.empty_like(y))
        own = y.clone()
        functional.residual_add(own, *rest, 0.7, out=own)
        functional.residual_add(y, *rest, 0.7, inplace=True)
    for name, other in (("out=", into), ("out=y", own), ("inplace", y)):
        assert_same_bits(other, fresh, name)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_of_the_row_that_they_went_into(backend, poison):
    problem = ResidualAdd((9,), 40, 30, 4)
    inputs, _ = problem.tensors(device_of(backend))
    inputs["x"][4, 7] = poison
    with use_backend(backend):
        out = problem.call(**inputs)
    assert not out[4].isfinite().any()
    assert out[[0, 1, 2, 3, 5, 6, 7, 8]].isfinite().all()


def test_integer_scale_is_a_scale(backend):
    inputs, _ = ResidualAdd().tensors(device_of(backend))
    with use_backend(backend):
        as_int = functional.residual_add(*inputs.values(), 2)
        assert_same_bits(as_int, functional.residual_add(*inputs.values(), 2.0))


@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "offset"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
def test_preallocated_backward_fills_its_buffers_and_nothing_around_them(dtype, parameter_dtype, layout):
    problem = ResidualAdd((41,), 70, 53, 8, dtype, parameter_dtype, needs=frozenset("xAB"))
    inputs, g = problem.tensors()
    y, x, A, B = inputs.values()
    ops = torch.ops.lowrank_fast
    _, t = ops.residual_add(y, x, A, B, problem.scale, 0.0, None, True)
    buffers = {
        f"d{name}": guarded(torch.full_like(inputs[name], float("nan")), layout if name == "x" else "contiguous")
        for name in "xAB"
    }
    with poisoned_memory():
        views = {name: buffer.view for name, buffer in buffers.items()}
        ops.residual_add_backward_out(g, x, t, A, B, problem.scale, 0.0, None, **views)
    eager, truth = problem.eager(), problem.truth()
    for name, buffer in buffers.items():
        buffer.assert_only_the_view_changed()
        assert_accurate(name, buffer.view, eager[name], truth[name], dtype)
