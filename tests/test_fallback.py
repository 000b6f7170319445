"""The closed-form backwards of `lowrank_fast.fallback` against autograd of `lowrank_fast.reference`, in float64, for
every combination of needed gradients, masks, routing, router input and dropout.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from lowrank_fast import fallback, reference

D = torch.float64
SEED = torch.tensor([123, 7])
TOKEN_MASK = torch.tensor([[True, True, False], [True, False, False]])
LEAD, D_IN, D_OUT, RANK, EXPERTS = (2, 3), 4, 5, 2, 3
BOOLS = (False, True)


def _leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=True)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _dropout(p: float) -> tuple[Tensor | None, Tensor | None]:
    """The seed, and the explicit mask that it stands for."""
    if p == 0.0:
        return None, None
    return SEED, reference.dropout_mask(SEED, LEAD[0] * LEAD[1], D_IN, p).view(*LEAD, D_IN)


def _assert_gradients(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], needs: tuple[bool, ...]) -> None:
    assert len(got) == len(expected) == len(needs)
    for gradient, truth, needed in zip(got, expected, needs, strict=True):
        if needed:
            torch.testing.assert_close(gradient, truth, rtol=1e-11, atol=1e-12)
        else:
            assert gradient.shape == (0,), "a gradient that is not needed is an empty tensor"


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", list(product(BOOLS, repeat=3)), ids=str)
def test_residual_add_backward(needs, p):
    y, x, A, B, g = _leaf(*LEAD, D_OUT), _leaf(*LEAD, D_IN), _leaf(RANK, D_IN), _leaf(D_OUT, RANK), _leaf(*LEAD, D_OUT)
    seed, keep = _dropout(p)
    out = reference.residual_add(y, x, A, B, 0.7, keep, p)
    expected = torch.autograd.grad(out, (x, A, B), g)
    got_out, t = fallback.residual_add(y, x, A, B, 0.7, p, seed, True)
    torch.testing.assert_close(got_out, out, rtol=1e-12, atol=1e-12)
    got = fallback.residual_add_backward(g, x if needs[1] else None, t, A, B, 0.7, p, seed, *needs)
    _assert_gradients(got, expected, needs)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("needs", list(product(BOOLS, repeat=2)), ids=str)
def test_shrink_backward(needs, p):
    x, A, dt = _leaf(*LEAD, D_IN), _leaf(RANK, D_IN), _leaf(*LEAD, RANK)
    seed, keep = _dropout(p)
    expected = torch.autograd.grad(reference.shrink(x, A, keep, p), (x, A), dt)
    got = fallback.shrink_backward(dt, x if needs[1] else None, A, p, seed, D, *needs)
    _assert_gradients(got, expected, needs)


@pytest.mark.parametrize("needs", list(product(BOOLS, repeat=2)), ids=str)
def test_expand_add_backward(needs):
    y, t, B, g = _leaf(*LEAD, D_OUT), _leaf(*LEAD, RANK), _leaf(D_OUT, RANK), _leaf(*LEAD, D_OUT)
    expected = torch.autograd.grad(reference.expand_add(y, t, B, 0.7), (t, B), g)
    _assert_gradients(fallback.expand_add_backward(g, t, B, 0.7, *needs), expected, needs)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("masked", BOOLS, ids=["all tokens", "token mask"])
@pytest.mark.parametrize("active", [None, (True, False, True), (False, False, False)], ids=str)
@pytest.mark.parametrize("router_input", ["t", "x"])
@pytest.mark.parametrize("routing", ["batch", "sample", "token", "static"])
def test_routed_projection_backward(routing, router_input, active, masked, p):
    y, x, A, B = _leaf(*LEAD, D_OUT), _leaf(*LEAD, D_IN), _leaf(RANK, D_IN), _leaf(EXPERTS, D_OUT, RANK)
    g = _leaf(*LEAD, D_OUT)
    R = None if routing == "static" else _leaf(EXPERTS, RANK if router_input == "t" else D_IN)
    weights = _leaf(EXPERTS) if routing == "static" else None
    token_mask = TOKEN_MASK if masked else None
    trained = None if active is None else torch.tensor(active)
    seed, keep = _dropout(p)

    out = reference.routed_projection(
        y, x, A, B, R, 0.7, routing=routing, router_input=router_input, weights=weights, token_mask=token_mask,
        active=trained, mask=keep, dropout_p=p,
    )  # fmt: skip
    mixing = weights if R is None else R
    dx, dA, dB, d_mixing = torch.autograd.grad(out, (x, A, B, mixing), g)
    expected = (dx, dA, dB, d_mixing, d_mixing)

    got_out, t, probabilities, w = fallback.routed_projection(
        y, x, A, B, R, weights, token_mask, 0.7, routing, router_input, p, seed
    )
    torch.testing.assert_close(got_out, out, rtol=1e-12, atol=1e-12)
    for need_dx, need_dA, need_dB, need_mixing in product(BOOLS, repeat=4):
        needs = (need_dx, need_dA, need_dB, need_mixing and R is not None, need_mixing and R is None)
        need_x = need_dA or (needs[3] and router_input == "x")
        got = fallback.routed_projection_backward(
            g, x if need_x else None, t, probabilities, w, A, B, R, token_mask, trained, 0.7, routing, router_input,
            p, seed, needs,
        )  # fmt: skip
        _assert_gradients(got, expected, needs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_results_have_the_dtypes_of_the_contract(dtype):
    """Activations in their dtype, `t`, `p`, `w` in float32, gradients in the dtype of the parameter."""
    y, x, g = (torch.randn(3, d).to(dtype) for d in (D_OUT, D_IN, D_OUT))
    A, B, R = torch.randn(RANK, D_IN), torch.randn(EXPERTS, D_OUT, RANK), torch.randn(EXPERTS, RANK)
    out, t, p, w = fallback.routed_projection(y, x, A, B, R, None, None, 1.0, "batch", "t", 0.0, None)
    assert out.dtype is dtype and {t.dtype, p.dtype, w.dtype} == {torch.float32}
    gradients = fallback.routed_projection_backward(
        g, x, t, p, w, A, B, R, None, None, 1.0, "batch", "t", 0.0, None, [True, True, True, True, False]
    )
    assert [gradient.dtype for gradient in gradients[:4]] == [dtype, *[torch.float32] * 3]
