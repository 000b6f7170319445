"""Dropout: every backend regenerates the specified mask, in forward and backward, from the seed alone."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import backends, functional, reference, use_backend

from ..support.accuracy import assert_same_bits
from ..support.memory import kept_for_backward, poisoned_memory
from ..support.problems import Halves, ResidualAdd, Routed
from ..support.targets import KERNEL_DTYPES, device_of

ALL = frozenset(("y", "x", "A", "B", "R", "weights"))
dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def _seed(backend: str, key: int, stream: int) -> torch.Tensor:
    return torch.tensor([key, stream], dtype=torch.int64, device=device_of(backend))


@dtypes
@pytest.mark.parametrize(("key", "stream"), [(0, 0), (-1, -1), (2**40 + 17, 3), (-(2**63), 2**33 + 5)])
@pytest.mark.parametrize("d", [1, 15, 16, 63, 64, 65, 130, 400])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_every_element_of_the_mask_is_the_specified_one(backend, dtype, d, key, stream, p):
    """With A = 1 and dt = 1 the gradient of x is the mask itself, over 1 - p."""
    seed, tokens = _seed(backend, key, stream), 19
    A, dt = torch.ones(1, d, dtype=dtype, device=seed.device), torch.ones(tokens, 1, device=seed.device)
    with poisoned_memory():
        dx, _ = backends.namespace(backend).shrink_backward(dt, None, A, p, seed, dtype, True, False)
    expected = reference.dropout_mask(seed, tokens, d, p).float() * (1.0 / (1.0 - p))
    torch.testing.assert_close(dx, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=0)


@dtypes
def test_the_forward_drops_what_the_backward_drops(backend, dtype):
    """Column by column: with A = identity, `t` shows the mask of the forward."""
    seed, d, p = _seed(backend, 99, 1), 48, 0.3
    x, A = torch.ones(33, d, dtype=dtype, device=seed.device), torch.eye(d, dtype=dtype, device=seed.device)
    ops = backends.namespace(backend)
    with poisoned_memory():
        t = ops.shrink(x, A, p, seed)
        dx, _ = ops.shrink_backward(torch.ones_like(t), None, A, p, seed, dtype, True, False)
        _, t_whole = ops.residual_add(x, x, A, A, 1.0, p, seed, True)
        t_routed = ops.routed_projection(x, x, A, A[None], A[:1], None, None, 1.0, "batch", "t", p, seed)[1]
    kept = reference.dropout_mask(seed, 33, d, p)
    for name, value in (("shrink", t), ("backward", dx), ("residual_add", t_whole), ("routed_projection", t_routed)):
        assert torch.equal(value != 0, kept), name


@dtypes
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_values_and_gradients_follow_the_mask(backend, dtype, p):
    for kind in (ResidualAdd, Halves):
        problem = kind((5, 13), 150, 51, 8, dtype, torch.float32, needs=ALL & frozenset("yxAB"), dropout_p=p)
        problem.assert_solved_by(backend)


@pytest.mark.parametrize("routing", ["batch", "sample", "token", "static"])
@pytest.mark.parametrize("router_input", ["t", "x"])
def test_a_router_on_x_sees_it_without_dropout_and_one_on_t_with(backend, routing, router_input):
    for dtype in (torch.float32, torch.bfloat16):
        problem = Routed(
            (3, 13), 150, 51, 4, dtype, dtype, needs=ALL, routing=routing, router_input=router_input, dropout_p=0.4
        )
        problem.assert_solved_by(backend)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.7])
def test_the_share_of_dropped_elements_is_p(p):
    """Within five standard deviations over a million elements, in total and for every column position of a block."""
    mask = reference.dropout_mask(torch.tensor([42, 0]), 4096, 256, p)
    for kept, count in ((mask.double().mean(), mask.numel()), (mask.double().mean(0), 4096)):
        assert ((kept - (1 - p)).abs() < 5 * (p * (1 - p) / count) ** 0.5).all()


def test_neighbouring_elements_rows_seeds_and_streams_are_independent():
    p, n = 0.5, 512 * 256

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return abs((2 * (a == b).double().mean() - 1).item())

    mask = reference.dropout_mask(torch.tensor([42, 0]), 512, 257, p)
    others = [reference.dropout_mask(torch.tensor(seed), 512, 257, p) for seed in ([43, 0], [42, 1], [42 + 2**32, 0])]
    pairs = [(mask[:, 1:], mask[:, :-1]), (mask[1:], mask[:-1]), (mask[:, 64:], mask[:, :-64])]
    for a, b in [*pairs, *((mask, other) for other in others)]:
        assert correlation(a, b) < 5 / n**0.5 * 1.5


def test_the_expectation_of_the_update_is_the_update(backend):
    problem = ResidualAdd((2000,), 64, 1, 1, dropout_p=0.3)
    device = device_of(backend)
    y = torch.zeros(2000, 1, device=device)
    x, A, B = (torch.ones(shape, device=device) for shape in ((2000, 64), (1, 64), (1, 1)))
    torch.manual_seed(0)
    with use_backend(backend):
        mean = problem.call(y=y, x=x, A=A, B=B).mean().item() / problem.scale
    deviation = (64 * 0.3 / 0.7 / 2000) ** 0.5
    assert abs(mean - 64) < 5 * deviation


@pytest.mark.parametrize("op", ["residual_add", "shrink", "routed_projection"])
@pytest.mark.parametrize(("dropout_p", "training"), [(0.5, False), (0.0, True)])
def test_evaluation_and_p_zero_drop_nothing_and_draw_no_random_number(backend, op, dropout_p, training):
    inputs, _ = Routed().tensors(device_of(backend))
    arguments = {
        "residual_add": (inputs["y"], inputs["x"], inputs["A"], inputs["B"][0]),
        "shrink": (inputs["x"], inputs["A"]),
        "routed_projection": tuple(inputs.values()),
    }[op]
    function = getattr(functional, op)
    state = torch.get_rng_state()
    with use_backend(backend):
        assert_same_bits(function(*arguments, dropout_p=dropout_p, training=training), function(*arguments))
    assert torch.equal(torch.get_rng_state(), state)


def test_manual_seed_repeats_a_training_step_and_two_calls_differ(backend):
    problem = ResidualAdd(needs=frozenset("yxAB"), dropout_p=0.5)
    first, second = problem.ours(backend), problem.ours(backend)
    for name, value in first.items():
        assert_same_bits(second[name], value, name)
    inputs, _ = problem.tensors(device_of(backend))
    with use_backend(backend):
        assert not torch.equal(problem.call(**inputs), problem.call(**inputs))


def test_no_mask_is_kept_for_backward(backend):
    problem = ResidualAdd((40,), 64, 32, 4, dropout_p=0.5)
    inputs, _ = problem.tensors(device_of(backend))
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with use_backend(backend), kept_for_backward(tuple(leaves.values())) as kept:
        problem.call(**leaves)
    assert sorted(tensor.numel() for tensor in kept) == [2, 40 * 4], "the seed and t"
