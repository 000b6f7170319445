"""`lowrank_fast.reference` is the truth for everything else, so it is checked against things it shares no code with:
loops over scalars, PEFT's Lily layer, HydraLoRA's loop, the published Philox vectors, and finite differences.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from lowrank_fast import functional, reference

from .support import expressions

D = torch.float64
TOKEN_MASK = torch.tensor([[True, True, False], [True, False, False]])


def _random(*shape: int, requires_grad: bool = False) -> torch.Tensor:
    return torch.randn(*shape, dtype=D, requires_grad=requires_grad)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ values


def test_residual_add_equals_a_loop_over_scalars():
    y, x, A, B = _random(3, 5), _random(3, 4), _random(2, 4), _random(5, 2)
    out = reference.residual_add(y, x, A, B, 0.7)
    for i, o in itertools.product(range(3), range(5)):
        total = y[i, o].item()
        for k in range(2):
            total += 0.7 * B[o, k].item() * sum(A[k, j].item() * x[i, j].item() for j in range(4))
        assert out[i, o].item() == pytest.approx(total, abs=1e-13)


def test_the_two_halves_make_the_whole():
    y, x, A, B = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(5, 2)
    halves = reference.expand_add(y, reference.shrink(x, A), B, 0.7)
    torch.testing.assert_close(halves, reference.residual_add(y, x, A, B, 0.7), rtol=0, atol=0)


def _peft_lily_layer(base: torch.nn.Linear, rank: int, experts: int, scaling: float):
    pytest.importorskip("peft.tuners.lily", reason="peft without Lily")
    from peft.tuners.lily.config import LilyConfig
    from peft.tuners.lily.layer import Linear

    config = LilyConfig(r=rank, num_B=experts, scaling=scaling, stride_A=1, init_weights=False)
    return Linear(base, "default", r=rank, config=config).double()


@pytest.mark.parametrize("lead", [(7,), (2, 5)], ids=str)
def test_batch_routing_equals_pefts_lily_layer(lead):
    base = torch.nn.Linear(6, 10, dtype=D)
    layer = _peft_lily_layer(base, rank=3, experts=4, scaling=0.7)
    x = _random(*lead, 6)
    # PEFT keeps the bank as one weight [E r, d_out]: ours is its transposed view.
    bank = layer.lily_B["default"].weight.view(4, 3, 10).transpose(1, 2)
    ours = reference.routed_projection(
        base(x), x, layer.lily_A["default"].weight, bank, layer.lily_router["default"].weight, 0.7, routing="batch"
    )
    torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)
    assert (ours - base(x)).norm() > 0.1, "the update must be seen in the comparison"


@pytest.mark.parametrize("router_input", ["t", "x"])
@pytest.mark.parametrize("lead", [(), (7,), (2, 5), (2, 3, 2)], ids=str)
def test_token_routing_equals_hydraloras_loop(lead, router_input):
    y, x, A, B = _random(*lead, 10), _random(*lead, 6), _random(3, 6), _random(4, 10, 3)
    R = _random(4, 3 if router_input == "t" else 6)
    t = x @ A.T
    p = torch.softmax((t if router_input == "t" else x) @ R.T, -1)
    expected = expressions.hydra_loop(y, t, B, p, 0.7)
    ours = reference.routed_projection(y, x, A, B, R, 0.7, routing="token", router_input=router_input)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router_input", ["t", "x"])
@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_means_leave_out_masked_tokens_as_if_they_were_not_there(routing, router_input):
    """The weights equal those of a call with the padding cut away, sample by sample."""
    y, x, A, B = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(3, 5, 2)
    R = _random(3, 2 if router_input == "t" else 4)
    out = reference.routed_projection(y, x, A, B, R, routing=routing, router_input=router_input, token_mask=TOKEN_MASK)
    if routing == "batch":
        cut = reference.routed_projection(y[TOKEN_MASK], x[TOKEN_MASK], A, B, R, router_input=router_input)
        torch.testing.assert_close(out[TOKEN_MASK], cut, rtol=1e-12, atol=1e-12)
        return
    for s in range(2):
        keep = TOKEN_MASK[s]
        cut = reference.routed_projection(y[s, keep], x[s, keep], A, B, R, router_input=router_input)
        torch.testing.assert_close(out[s, keep], cut, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_all_tokens_masked_means_no_update(routing):
    y, x, A, B, R = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(3, 5, 2), _random(3, 2)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    out = reference.routed_projection(y, x, A, B, R, routing=routing, token_mask=nothing)
    assert torch.equal(out, y)


def test_one_masked_sample_does_not_touch_the_other():
    y, x, A, B, R = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(3, 5, 2), _random(3, 2)
    mask = torch.tensor([[True, True, True], [False, False, False]])
    out = reference.routed_projection(y, x, A, B, R, routing="sample", token_mask=mask)
    assert torch.equal(out[1], y[1])
    alone = reference.routed_projection(y[:1], x[:1], A, B, R, routing="sample")
    torch.testing.assert_close(out[:1], alone, rtol=1e-12, atol=1e-12)


def test_a_uniform_router_makes_every_routing_the_static_one():
    y, x, A, B = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(3, 5, 2)
    static = reference.routed_projection(
        y, x, A, B, None, 0.7, routing="static", weights=torch.full((3,), 1 / 3, dtype=D)
    )
    for routing, router_input in itertools.product(("batch", "sample", "token"), ("t", "x")):
        R = torch.zeros(3, 2 if router_input == "t" else 4, dtype=D)
        out = reference.routed_projection(y, x, A, B, R, 0.7, routing=routing, router_input=router_input)
        torch.testing.assert_close(out, static, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_one_expert_is_a_residual_add(routing):
    y, x, A, B, R = _random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(1, 5, 2), _random(1, 2)
    out = reference.routed_projection(y, x, A, B, R, 0.7, routing=routing)
    torch.testing.assert_close(out, reference.residual_add(y, x, A, B[0], 0.7), rtol=1e-12, atol=1e-12)


def test_sample_routing_of_one_sample_is_batch_routing():
    y, x, A, B, R = _random(1, 6, 5), _random(1, 6, 4), _random(2, 4), _random(3, 5, 2), _random(3, 2)
    sample = reference.routed_projection(y, x, A, B, R, routing="sample")
    torch.testing.assert_close(sample, reference.routed_projection(y, x, A, B, R), rtol=1e-12, atol=1e-12)


def test_token_routing_of_one_token_is_batch_routing():
    y, x, A, B, R = _random(1, 5), _random(1, 4), _random(2, 4), _random(3, 5, 2), _random(3, 2)
    token = reference.routed_projection(y, x, A, B, R, routing="token")
    torch.testing.assert_close(token, reference.routed_projection(y, x, A, B, R), rtol=1e-12, atol=1e-12)


def test_sixteen_bit_tensors_are_multiplied_in_float32():
    y, x, A, B = (v.bfloat16() for v in (_random(3, 5), _random(3, 40), _random(4, 40), _random(5, 4)))
    assert reference.shrink(x, A).dtype is torch.float32
    exact = reference.residual_add(y.double(), x.double(), A.double(), B.double())
    rounded = exact.bfloat16()  # what one rounding at the very end gives
    assert torch.equal(reference.residual_add(y, x, A, B), rounded)


def test_an_inactive_expert_takes_part_and_gets_no_gradient():
    y, x, A, R = _random(3, 5), _random(3, 4), _random(2, 4), _random(3, 2)
    B = _random(3, 5, 2, requires_grad=True)
    active = torch.tensor([True, False, True])
    out = reference.routed_projection(y, x, A, B, R, active=active)
    assert torch.equal(out, reference.routed_projection(y, x, A, B, R))
    out.sum().backward()
    assert not B.grad[1].any() and B.grad[0].any() and B.grad[2].any()


# ------------------------------------------------------------------------------------------------ derivatives


def _differentiable(router_width: int | None = None):
    tensors = [_random(2, 3, 5), _random(2, 3, 4), _random(2, 4), _random(5, 2)]
    if router_width is not None:
        tensors[3] = _random(3, 5, 2)
        tensors.append(_random(3, router_width))
    return tuple(tensor.requires_grad_() for tensor in tensors)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_residual_add(dropout_p):
    def function(y, x, A, B):
        torch.manual_seed(3)
        return functional.residual_add(y, x, A, B, 0.7, dropout_p=dropout_p, training=True)

    assert gradcheck(function, _differentiable(), fast_mode=dropout_p > 0)


def test_gradcheck_of_residual_add_inplace():
    assert gradcheck(lambda y, x, A, B: functional.residual_add(y * 1.0, x, A, B, 0.7, inplace=True), _differentiable())


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_of_shrink(dropout_p):
    def function(x, A):
        torch.manual_seed(3)
        return functional.shrink(x, A, dropout_p=dropout_p, training=True)

    _, x, A, _ = _differentiable()
    assert gradcheck(function, (x, A), fast_mode=dropout_p > 0)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck_of_expand_add(inplace):
    y, _, _, B = _differentiable()
    t = _random(2, 3, 2, requires_grad=True)
    assert gradcheck(lambda y, t, B: functional.expand_add(y * 1.0, t, B, 0.7, inplace=inplace), (y, t, B))


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("router_input", ["t", "x"])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_gradcheck_of_routed_projection(routing, router_input, masked, dropout_p):
    def function(y, x, A, B, R):
        torch.manual_seed(3)
        return functional.routed_projection(
            y,
            x,
            A,
            B,
            R,
            0.7,
            routing=routing,
            router_input=router_input,
            token_mask=TOKEN_MASK if masked else None,
            dropout_p=dropout_p,
            training=True,
        )

    assert gradcheck(function, _differentiable(2 if router_input == "t" else 4), fast_mode=dropout_p > 0)


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_gradcheck_of_routed_projection_inplace(routing):
    def function(y, x, A, B, R):
        return functional.routed_projection(y * 1.0, x, A, B, R, 0.7, routing=routing, inplace=True)

    assert gradcheck(function, _differentiable(2))


def test_gradcheck_of_static_weights():
    y, x, A, B, _ = _differentiable(2)
    weights = _random(3, requires_grad=True)

    def function(y, x, A, B, weights):
        return functional.routed_projection(y, x, A, B, None, 0.7, routing="static", weights=weights)

    assert gradcheck(function, (y, x, A, B, weights))


# ------------------------------------------------------------------------------------------------ random numbers

# Known-answer vectors of Random123 (Salmon et al., SC'11), `philox4x32 10`: counter, key, result.
PHILOX_VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), PHILOX_VECTORS)
def test_philox_gives_the_published_answers(counter, key, expected):
    words = reference.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(word) for word in words) == expected


def test_the_dropout_mask_is_the_specified_words_of_philox():
    """Element (i, 64 q + 16 w + l) from word w of counter (16 q + l, i low, i high, stream), one scalar at a time."""
    seed = torch.tensor([-7_000_000_001, 5], dtype=torch.int64)
    key = (int(seed[0]) & 0xFFFFFFFF, (int(seed[0]) >> 32) & 0xFFFFFFFF)
    mask = reference.dropout_mask(seed, 3, 150, 0.3)
    for i, column in itertools.product(range(3), range(150)):
        q, w, lane = column // 64, column % 64 // 16, column % 16
        counter = tuple(torch.tensor(c) for c in (16 * q + lane, i, 0, 5))
        word = int(reference.philox(counter, tuple(torch.tensor(k) for k in key))[w])
        assert bool(mask[i, column]) == (word >= int(0.3 * 2**32))
