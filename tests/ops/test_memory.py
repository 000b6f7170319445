"""What is kept for backward, what is never computed, what is really in place, and what an optimizer leaves alone."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_same_bits
from ..support.memory import kept_for_backward, poisoned_memory
from ..support.problems import Halves, ResidualAdd, Routed
from ..support.targets import KERNEL_DTYPES, device_of

TOKENS, D, RANK, EXPERTS = 60, 48, 4, 3
dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


def _kept(problem, backend: str, needs: str, besides: str = "xABR") -> list[torch.Tensor]:
    """What autograd keeps beyond the tensors named in `besides`, with gradients for `needs`."""
    inputs, _ = problem.tensors(device_of(backend))
    leaves = {name: value.requires_grad_(name in needs) for name, value in inputs.items()}
    known = tuple(value for name, value in leaves.items() if name in besides)
    with use_backend(backend), kept_for_backward(known) as kept:
        problem.call(**leaves)
    return kept


def test_poison_reaches_every_kind_of_allocation():
    """The fixture of the accuracy tests: without it an element that no kernel writes could be right by chance."""
    like = torch.ones(64, 64)
    for dtype in KERNEL_DTYPES:
        values = like.to(dtype)
        with poisoned_memory():
            made = [
                torch.empty(64, 64, dtype=dtype),
                torch.empty_like(values),
                values.new_empty(64, 64),
                torch.empty_strided((64, 64), (1, 64), dtype=dtype),
                torch.ops.aten.empty_like.default(values),
            ]
        for tensor in made:
            assert tensor.isnan().all()


@dtypes
def test_residual_add_keeps_t_beyond_x(backend, dtype):
    problem = ResidualAdd((TOKENS,), D, 96, RANK, dtype, dtype)
    kept = _kept(problem, backend, "yxAB")
    assert sum(tensor.numel() for tensor in kept) == TOKENS * RANK


@pytest.mark.parametrize(
    ("needs", "elements"),
    [("y", 0), ("x", 0), ("yx", 0), ("A", TOKENS * D), ("xA", TOKENS * D), ("B", TOKENS * RANK), ("xB", TOKENS * RANK)],
)
def test_residual_add_keeps_only_what_the_needed_gradients_read(backend, needs, elements):
    """`x` only for A's gradient, `t` only for B's: a frozen A lets the layer's input be freed."""
    kept = _kept(ResidualAdd((TOKENS,), D, 96, RANK), backend, needs, besides="AB")
    assert sum(tensor.numel() for tensor in kept) == elements


def test_halves_keep_x_and_t(backend):
    kept = _kept(Halves((TOKENS,), D, 96, RANK), backend, "yxAB")
    assert sum(tensor.numel() for tensor in kept) == TOKENS * RANK


@pytest.mark.parametrize(("routing", "weights"), [("batch", EXPERTS), ("sample", 5 * EXPERTS), ("token", 0)])
@pytest.mark.parametrize("router_input", ["t", "x"])
def test_routed_projection_keeps_t_and_probabilities_beyond_x(backend, routing, weights, router_input):
    problem = Routed((5, TOKENS // 5), D, 96, RANK, experts=EXPERTS, routing=routing, router_input=router_input)
    kept = _kept(problem, backend, "yxABR")
    assert sum(tensor.numel() for tensor in kept) == TOKENS * RANK + TOKENS * EXPERTS + weights


@pytest.mark.parametrize(
    ("router_input", "needs", "keeps_x"), [("t", "xBR", False), ("x", "xB", False), ("x", "R", True)]
)
def test_routed_projection_keeps_x_only_for_a_and_a_router_on_x(backend, router_input, needs, keeps_x):
    problem = Routed((5, TOKENS // 5), D, 96, RANK, router_input=router_input)
    kept = _kept(problem, backend, needs, besides="ABR")
    assert any(tensor.shape[-1] == D for tensor in kept) == keeps_x


@pytest.mark.parametrize("wanted", list(product((False, True), repeat=4)), ids=str)
def test_a_gradient_that_is_not_needed_is_none(backend, wanted):
    inputs, g = ResidualAdd().tensors(device_of(backend))
    leaves = [value.requires_grad_(need) for value, need in zip(inputs.values(), wanted, strict=True)]
    with use_backend(backend):
        out = functional.residual_add(*leaves)
        if any(wanted):
            out.backward(g)
    assert out.requires_grad == any(wanted)
    for leaf, need in zip(leaves, wanted, strict=True):
        assert (leaf.grad is not None) == need


def _inplace_calls(backend: str):
    """The in-place form of each operation, with what it needs besides y."""
    y, x, A, B, R = Routed((7,), D, 33, RANK).tensors(device_of(backend))[0].values()
    with use_backend(backend):
        t = functional.shrink(x, A)
    return y, {
        "residual_add": lambda y: functional.residual_add(y, x, A, B[0], inplace=True),
        "residual_add out=": lambda y: functional.residual_add(y, x, A, B[0], out=y),
        "expand_add": lambda y: functional.expand_add(y, t, B[0], inplace=True),
        "routed_projection": lambda y: functional.routed_projection(y, x, A, B, R, inplace=True),
    }


@pytest.mark.parametrize("op", ["residual_add", "residual_add out=", "expand_add", "routed_projection"])
def test_inplace_is_in_place_and_counts_as_a_modification(backend, op):
    y, calls = _inplace_calls(backend)
    before, pointer, version = y.clone(), y.data_ptr(), y._version
    with use_backend(backend), torch.no_grad():
        result = calls[op](y)
    assert result is y and y.data_ptr() == pointer and not torch.equal(y, before)
    assert y._version > version


@pytest.mark.parametrize("op", ["residual_add", "residual_add out=", "expand_add", "routed_projection"])
def test_overwriting_what_autograd_saved_is_caught_by_its_backward(backend, op):
    """Without the version counter the gradient would silently be that of the overwritten values."""
    y, calls = _inplace_calls(backend)
    weight = torch.ones_like(y, requires_grad=True)
    loss = (weight * y).sum()
    with use_backend(backend), torch.no_grad():
        calls[op](y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("op", ["residual_add", "expand_add", "routed_projection"])
def test_inplace_where_autograd_records_gives_the_gradients_of_the_fresh_call(backend, op):
    y, x, A, B, R = Routed((7,), D, 33, RANK).tensors(device_of(backend))[0].values()
    gradients = []
    for inplace in (False, True):
        leaves = [value.clone().requires_grad_() for value in (y, x, A, B, R)]
        stream, x_, A_, B_, R_ = leaves
        stream = stream * 1.0
        with use_backend(backend), poisoned_memory():
            if op == "residual_add":
                out = functional.residual_add(stream, x_, A_, B_[0], inplace=inplace)
            elif op == "expand_add":
                out = functional.expand_add(stream, functional.shrink(x_, A_), B_[0], inplace=inplace)
            else:
                out = functional.routed_projection(stream, x_, A_, B_, R_, inplace=inplace)
            assert (out is stream) == inplace
            out.square().sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for fresh, own in zip(*gradients, strict=True):
        assert (fresh is None) == (own is None)
        if fresh is not None:
            assert_same_bits(own, fresh)


def test_inputs_keep_their_bits_in_forward_and_backward(backend):
    for problem in (
        ResidualAdd(needs=frozenset("yxAB")),
        Routed(needs=frozenset("yxABR")),
        Halves(needs=frozenset("yxAB")),
    ):
        inputs, g = problem.tensors(device_of(backend))
        before = {name: value.clone() for name, value in inputs.items()}
        leaves = {name: value.requires_grad_() for name, value in inputs.items()}
        with use_backend(backend):
            problem.call(**leaves).backward(g.expand_as(g))
        for name, value in leaves.items():
            assert_same_bits(value.detach(), before[name], name)
        assert_same_bits(g, problem.tensors(device_of(backend))[1], "g")


@pytest.mark.parametrize("foreach", [False, True])
def test_frozen_expert_keeps_its_bits_through_adam_and_weight_decay(backend, foreach):
    """`active=False` leaves None, which optimizers skip; zeros would let momentum and weight decay move the bank."""
    inputs, _ = Routed().tensors(device_of(backend))
    y, x, A, B, R = inputs.values()
    parameters = [torch.nn.Parameter(value) for value in (A, B, R)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5, foreach=foreach)

    def step(active: bool) -> None:
        optimizer.zero_grad()
        with use_backend(backend):
            functional.routed_projection(y, x, *parameters, active=active).square().sum().backward()
        optimizer.step()

    step(active=True)
    before = [parameter.detach().clone() for parameter in parameters]
    step(active=False)
    assert parameters[1].grad is None
    assert_same_bits(parameters[1].detach(), before[1], "frozen bank")
    assert not torch.equal(parameters[0].detach(), before[0]), "A goes on learning"
    assert not torch.equal(parameters[2].detach(), before[2]), "so does the router"
    step(active=True)
    assert not torch.equal(parameters[1].detach(), before[1]), "and the bank, once it is active again"
