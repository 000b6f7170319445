"""A frozen linear layer with its update as one autograd step: same numbers as apart, fewer passes, nothing shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_fast.nn.frozen import frozen_linear, frozen_linear_of, shrink_rows
from tests.support.nodes import in_python, needs_cpp

Branches = list[tuple[nn.Linear, torch.Tensor, torch.Tensor]]


def branches(widths: tuple[int, ...], bias: bool = False, dtype: torch.dtype = torch.float64, r: int = 3) -> Branches:
    """Frozen layers of 10 inputs with factors A [r, 10] and B [width, r]."""
    torch.manual_seed(0)
    made = []
    for width in widths:
        base = nn.Linear(10, width, bias, dtype=dtype).requires_grad_(False)
        made.append((base, torch.randn(r, 10, dtype=dtype), torch.randn(width, r, dtype=dtype)))
    for _, A, B in made:
        A.requires_grad_()
        B.requires_grad_()
    return made


def x_of(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def fused(x: torch.Tensor, members: Branches, dropout_p: float = 0.0) -> list[torch.Tensor]:
    source = shrink_rows(x, [A for _, A, _ in members], dropout_p)
    return [frozen_linear(base, source, t, B, 0.5) for (base, _, B), t in zip(members, source.parts, strict=True)]


def apart(x: torch.Tensor, members: Branches) -> list[torch.Tensor]:
    return [base(x) + 0.5 * x @ A.mT @ B.mT for base, A, B in members]


def loss(outputs: list[torch.Tensor]) -> torch.Tensor:
    return sum((i + 1) * y.square().sum() for i, y in enumerate(outputs))  # type: ignore[return-value]


def gradients(run: Callable[..., list[torch.Tensor]], x: torch.Tensor, members: Branches) -> list[torch.Tensor]:
    tensors = [x, *(t for _, A, B in members for t in (A, B))]
    return list(torch.autograd.grad(loss(run(x, members)), tensors))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10,), (7, 10), (2, 5, 10), (2, 3, 4, 10)])
@pytest.mark.parametrize("widths", [(6,), (6, 4), (10, 4, 10)])
def test_values_and_gradients_are_those_of_the_plain_expression(
    widths: tuple[int, ...], shape: tuple[int, ...], bias: bool
) -> None:
    members, x = branches(widths, bias), x_of(*shape)
    for a, b in zip(fused(x, members), apart(x, members), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    for a, b in zip(gradients(fused, x, members), gradients(apart, x, members), strict=True):
        assert torch.allclose(a, b, rtol=1e-11)


def test_members_that_the_loss_does_not_use_and_other_readers_of_x() -> None:
    members, x = branches((6, 4, 10)), x_of(7, 10)
    for used in ((0,), (1,), (2,), (0, 2), (1, 2)):

        def some(
            run: Callable[..., list[torch.Tensor]], chosen: tuple[int, ...] = used
        ) -> Callable[..., list[torch.Tensor]]:
            return lambda x, m: [run(x, m)[i] for i in chosen] + [x.tanh()]

        tensors = [x, *(t for i in used for t in members[i][1:])]
        found = torch.autograd.grad(loss(some(fused)(x, members)), tensors)
        expected = torch.autograd.grad(loss(some(apart)(x, members)), tensors)
        assert all(torch.allclose(a, b, rtol=1e-11) for a, b in zip(found, expected, strict=True))


def test_a_graph_that_is_kept_gives_the_same_gradients_again_and_the_callers_tensors_keep_their_bits() -> None:
    members, x = branches((10, 10)), x_of(7, 10)
    before = x.detach().clone()
    outputs = fused(x, members)
    incoming = [torch.ones_like(y) for y in outputs]
    first = torch.autograd.grad(outputs, x, incoming, retain_graph=True)[0].clone()
    second = torch.autograd.grad(outputs, x, incoming)[0]
    assert torch.equal(first, second)
    assert torch.equal(x, before)
    assert all(torch.equal(g, torch.ones_like(g)) for g in incoming)


def test_dropout_masks_the_input_of_the_update_only() -> None:
    members, x = branches((6,)), x_of(40, 10)
    base, A, B = members[0]
    torch.manual_seed(3)
    (y,) = fused(x, members, dropout_p=0.5)
    torch.manual_seed(3)
    t = shrink_rows(x, [A], 0.5).parts[0]
    assert torch.allclose(y, base(x) + 0.5 * t @ B.mT)
    assert not torch.allclose(t, x @ A.mT)
    torch.manual_seed(3)
    (dx,) = torch.autograd.grad(fused(x, members, 0.5)[0].sum(), x)
    torch.manual_seed(3)
    (expected,) = torch.autograd.grad((base(x) + 0.5 * shrink_rows(x, [A], 0.5).parts[0] @ B.mT).sum(), x)
    assert torch.allclose(dx, expected)


class Counts(TorchDispatchMode):
    """How often each operation ran, and how many additions of tensors of one size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.ops, self.additions = size, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("lowrank_fast::")
        self.ops[name] = self.ops.get(name, 0) + 1
        if name in ("aten::add", "aten::add_") and isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.additions += 1
        return out


def test_one_dx_is_written_and_none_is_added() -> None:
    members, x = branches((16, 12, 20), dtype=torch.float32), x_of(9, 10, dtype=torch.float32)
    outputs = fused(x, members)
    grads = [torch.randn_like(y) for y in outputs]
    with Counts(x.numel()) as counts:
        torch.autograd.backward(outputs, grads)
    assert counts.additions == 0
    assert counts.ops["aten::mm"] == 1
    assert counts.ops["aten::addmm_"] == 2
    assert counts.ops["shrink_backward"] == counts.ops["expand_add_"] == 1
    outputs = apart(x, members)
    with Counts(x.numel()) as counts:
        torch.autograd.backward(outputs, grads)
    assert counts.additions >= 5, "apart: six gradients of x are added up"


def test_an_input_without_gradient_costs_no_gradient_of_x() -> None:
    members, x = branches((16, 12), dtype=torch.float32), x_of(9, 10, dtype=torch.float32).detach()
    outputs = fused(x, members)
    with Counts(x.numel()) as counts:
        loss(outputs).backward()
    assert "aten::mm" not in counts.ops
    assert "aten::addmm_" not in counts.ops
    assert all(A.grad is not None and B.grad is not None for _, A, B in members)


def test_frozen_factors_get_no_gradient_and_x_is_not_kept_for_them() -> None:
    members, x = branches((16,), dtype=torch.float32), x_of(9, 10, dtype=torch.float32)
    base, A, B = members[0]
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        (y,) = fused(x, [(base, A.detach(), B.detach())])
    assert not any(t.data_ptr() == x.data_ptr() for t in kept)
    (dx,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(apart(x, members)[0].sum(), x)
    assert torch.allclose(dx, expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_backward_is_a_clear_error(dtype: torch.dtype) -> None:
    members, x = branches((6,), dtype=dtype), x_of(7, 10, dtype=dtype)
    (dx,) = torch.autograd.grad(loss(fused(x, members)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.sum().backward()
    (dx,) = torch.autograd.grad(fused(x, members)[0].sum(), x, create_graph=True)  # of a gradient without a graph
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dx.square().sum().backward()


@needs_cpp
@pytest.mark.parametrize(
    ("x_trained", "trained"),
    [(True, "all"), (True, "A"), (True, "B"), (True, "none"), (False, "all"), (False, "A"), (False, "B")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(10,), (7, 10), (2, 5, 10)])
def test_the_nodes_in_cpp_give_the_bits_of_those_in_python(
    shape: tuple[int, ...], bias: bool, dtype: torch.dtype, x_trained: bool, trained: str
) -> None:
    members, x = branches((10, 4, 12), bias, dtype), x_of(*shape, dtype=dtype).detach().requires_grad_(x_trained)
    for _, A, B in members:
        A.requires_grad_(trained in ("all", "A"))
        B.requires_grad_(trained in ("all", "B"))
    wanted = [t for t in (x, *(t for _, A, B in members for t in (A, B))) if t.requires_grad]

    def run(used: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        outputs = fused(x, members)
        total = loss([outputs[i] for i in used])
        found = torch.autograd.grad(total, wanted, allow_unused=True) if total.requires_grad else ()
        return outputs, list(found)

    for used in ((0, 1, 2), (0,), (2,), (0, 2)):
        (outputs, found), (others, expected) = run(used), in_python(lambda u=used: run(u))
        assert [y.grad_fn.name() for y in outputs] != [y.grad_fn.name() for y in others], "both ran the same node"
        assert all(torch.equal(a, b) for a, b in zip(outputs, others, strict=True))
        for a, b in zip(found, expected, strict=True):
            assert a is b is None or torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize("wrong", [lambda A: A[:, :9], lambda A: A[:0], lambda A: A[0]], ids=["width", "rank 0", "1-D"])
def test_what_is_wrong_has_the_same_error_with_cpp_nodes(wrong: Callable[[torch.Tensor], torch.Tensor]) -> None:
    x, A = x_of(7, 10, dtype=torch.float32), wrong(torch.randn(3, 10))

    def error() -> str:
        with pytest.raises(ValueError, match="shrink: A must") as raised:
            shrink_rows(x, [A])
        return str(raised.value)

    assert error() == in_python(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_take_fp32_factors(dtype: torch.dtype) -> None:
    members, x = branches((64,), dtype=torch.float32), x_of(33, 10, dtype=torch.float32)
    base, A, B = members[0]
    exact = gradients(apart, x, members)
    half = nn.Linear(10, 64, False, dtype=dtype).requires_grad_(False)
    half.weight.data.copy_(base.weight)
    found = gradients(fused, x.detach().to(dtype).requires_grad_(), [(half, A, B)])
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    for a, b in zip(found, exact, strict=True):
        assert float((a.float() - b).norm() / b.norm()) < 2e-2


class Loud(nn.Linear):
    """A linear layer of another kind."""


def hooked(base: nn.Linear) -> nn.Linear:
    base.register_forward_hook(lambda m, a, o: o + 1)
    return base


def wrapped(base: nn.Linear) -> nn.Linear:
    base.forward = lambda x: x  # type: ignore[method-assign]
    return base


@pytest.mark.parametrize(
    "base",
    [
        nn.Linear(10, 4),
        nn.Linear(10, 4).requires_grad_(False).half(),
        Loud(10, 4).requires_grad_(False),
        nn.LayerNorm(10).requires_grad_(False),
        hooked(nn.Linear(10, 4).requires_grad_(False)),
        wrapped(nn.Linear(10, 4).requires_grad_(False)),
    ],
    ids=["trainable", "another dtype", "subclass", "no linear layer", "hooked", "forward replaced"],
)
def test_layers_that_must_be_called_are_called(base: nn.Module) -> None:
    assert frozen_linear_of(base, x_of(7, 10, dtype=torch.float32)) is None


def test_autocast_and_inference_call_the_layer() -> None:
    base, x = nn.Linear(10, 4).requires_grad_(False), x_of(7, 10, dtype=torch.float32)
    assert frozen_linear_of(base, x) is base
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen_linear_of(base, x) is None
    with torch.no_grad():
        assert frozen_linear_of(base, x) is None


def test_a_backward_inside_autocast_has_the_bits_of_one_outside() -> None:
    members, x = branches((16, 12), dtype=torch.float32), x_of(9, 10, dtype=torch.float32)
    tensors = [x, *(t for _, A, B in members for t in (A, B))]
    expected = torch.autograd.grad(loss(fused(x, members)), tensors)
    total = loss(fused(x, members))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(total, tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
