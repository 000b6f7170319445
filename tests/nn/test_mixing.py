"""The bank mixed by the batch mean of a router: values and gradients of the plain expression, in any layout."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import backends
from lowrank_fast.nn.mixing import mixed_bank
from tests.support.nodes import in_python, needs_cpp


@pytest.fixture(params=[pytest.param("C++", marks=needs_cpp), "Python"])
def node(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python":
        monkeypatch.setattr(backends, "eager", None)


of_both_nodes = pytest.mark.usefixtures("node")


def plain(t: torch.Tensor, R: torch.Tensor, B: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    p = torch.softmax(t @ R.mT, -1).reshape(-1, R.shape[0])
    keep = torch.ones(p.shape[0], dtype=p.dtype) if mask is None else mask.reshape(-1).to(p.dtype)
    w = (p * keep[:, None]).sum(0) / keep.sum().clamp(min=1.0)
    return torch.einsum("e,eor->or", w, B.to(t.dtype))


@of_both_nodes
@pytest.mark.parametrize("masked", [None, "some", "all"])
@pytest.mark.parametrize("layout", ["plain", "stacked", "strided"])
@pytest.mark.parametrize("experts", [2, 5])
def test_values_and_gradients_are_those_of_the_plain_expression(experts: int, layout: str, masked: str | None) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    t, R = random(2, 7, 3), random(experts, 3)
    if layout == "plain":
        bank = random(experts, 6, 3)
        view = bank
    elif layout == "stacked":
        bank = random(experts * 3, 6)
        view = bank.view(experts, 3, 6).transpose(1, 2)
    else:
        bank = random(experts, 6, 6)
        view = bank[..., ::2]
    mask = None if masked is None else torch.zeros(2, 7, dtype=torch.bool)
    if masked == "some":
        mask[0, 2:] = True
    up = mixed_bank(t, R, view, mask)
    assert torch.allclose(up, plain(t, R, view, mask), rtol=1e-12)
    g = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad(up, [t, R, bank], g)
    expected = torch.autograd.grad(plain(t, R, view, mask), [t, R, bank], g)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


@of_both_nodes
def test_a_stacked_bank_is_neither_copied_nor_are_its_gradients_permuted() -> None:
    """The gradient of the stacked bank has its layout, so that adding it up is one pass over dense memory."""
    t, R = torch.randn(9, 3), torch.randn(2, 3)
    stacked = torch.randn(6, 8, requires_grad=True)
    up = mixed_bank(t, R, stacked.view(2, 3, 8).transpose(1, 2))
    assert up.mT.is_contiguous()
    (gradient,) = torch.autograd.grad(up, stacked, torch.randn(8, 3).mT.contiguous().mT)
    assert gradient.is_contiguous()


@of_both_nodes
def test_frozen_parts_get_no_gradient() -> None:
    t, R, B = torch.randn(9, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2, 8, 3)
    mixed_bank(t, R, B).sum().backward()
    assert t.grad is not None
    bank = B.clone().requires_grad_()
    mixed_bank(t.detach(), R, bank).sum().backward()
    assert bank.grad is not None


@of_both_nodes
def test_a_bank_in_16_bits_gets_a_gradient_in_its_dtype() -> None:
    t, R = torch.randn(9, 3), torch.randn(2, 3)
    B = torch.randn(2, 8, 3).bfloat16().requires_grad_()
    up = mixed_bank(t, R, B)
    assert up.dtype is torch.float32
    assert torch.autograd.grad(up.sum(), B)[0].dtype is torch.bfloat16


@of_both_nodes
def test_forward_and_backward_inside_autocast_have_the_bits_of_those_outside() -> None:
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((9, 3), (2, 3), (2, 8, 3))]
    expected = torch.autograd.grad(mixed_bank(*tensors).square().sum(), tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(mixed_bank(*tensors).square().sum(), tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_nodes_give_the_same_bits(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    t, R = torch.randn(3, 41, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    bank = torch.randn(32, 24).to(dtype).requires_grad_()
    mask = torch.rand(3, 41) < 0.7 if masked else None

    def run() -> tuple[str, list[torch.Tensor]]:
        up = mixed_bank(t, R, bank.view(4, 8, 24).transpose(1, 2), mask)
        return up.grad_fn.name(), [up, *torch.autograd.grad(up.square().sum(), [t, R, bank])]

    (in_cpp, found), (other, expected) = run(), in_python(run)
    assert in_cpp != other, "both ran the same node"
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@of_both_nodes
def test_double_backward_is_a_clear_error() -> None:
    t, R, B = (torch.randn(*shape, requires_grad=True) for shape in ((9, 3), (2, 3), (2, 8, 3)))
    (dt,) = torch.autograd.grad(mixed_bank(t, R, B).square().sum(), t, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dt.sum().backward()


@of_both_nodes
def test_double_backward_is_refused_where_the_gradient_coming_in_does_not_require_grad() -> None:
    t, R, B = (torch.randn(*shape, requires_grad=True) for shape in ((9, 3), (2, 3), (2, 8, 3)))
    (dt,) = torch.autograd.grad(mixed_bank(t, R, B).sum(), t, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dt.square().sum().backward()


@of_both_nodes
@pytest.mark.parametrize("edited", ["t", "R", "B"])
def test_an_input_edited_before_the_backward_is_an_error(edited: str) -> None:
    leaves = {
        name: torch.randn(*shape, requires_grad=True)
        for name, shape in (("t", (9, 3)), ("R", (2, 3)), ("B", (2, 8, 3)))
    }
    inputs = {name: leaf * 1.0 for name, leaf in leaves.items()}
    up = mixed_bank(**inputs)
    inputs[edited].mul_(3.0)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        up.sum().backward()
