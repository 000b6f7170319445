"""`routed_projection` on every backend: the four routings against float64, banks of any layout, masked gradients."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_accurate, assert_all_accurate, assert_same_bits
from ..support.memory import ACTIVATION_LAYOUTS, guarded, poisoned_memory
from ..support.problems import ResidualAdd, Routed, evaluate
from ..support.process import run_python
from ..support.strategies import routed
from ..support.targets import KERNEL_DTYPES, device_of, interpreted

ROUTINGS = ("batch", "sample", "token", "static")
ROUTED = [(routing, router_input) for routing in ROUTINGS[:3] for router_input in "tx"] + [("static", "t")]
ALL = frozenset(("y", "x", "A", "B", "R", "weights"))
dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
routings = pytest.mark.parametrize(("routing", "router_input"), ROUTED)


@pytest.mark.parametrize("routing", ROUTINGS)
@given(data=st.data())
def test_any_shape_layout_and_gradient_mask_is_as_accurate_as_pytorch(backend, routing, data):
    data.draw(routed(backend, routing)).assert_solved_by(backend)


@routings
@dtypes
@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "token mask"])
def test_every_routing_with_every_gradient(backend, dtype, routing, router_input, masked):
    problem = Routed(
        (3, 23), 70, 53, 8, dtype, torch.float32, needs=ALL, experts=5, routing=routing, router_input=router_input,
        masked=masked,
    )  # fmt: skip
    problem.assert_solved_by(backend)


@routings
def test_every_mask_of_needed_gradients(backend, routing, router_input):
    mixing = "weights" if routing == "static" else "R"
    for wanted in product((False, True), repeat=5):
        if interpreted(backend) and sum(wanted) not in (0, 1, 5):
            continue
        needs = frozenset(name for name, need in zip(("y", "x", "A", "B", mixing), wanted, strict=True) if need)
        problem = Routed((2, 9), 34, 21, 4, needs=needs, routing=routing, router_input=router_input, masked=True)
        problem.assert_solved_by(backend)


@routings
@pytest.mark.parametrize(("experts", "rank"), [(1, 8), (2, 1), (3, 3), (4, 8), (5, 17), (8, 4)])
def test_every_number_of_experts(backend, routing, router_input, experts, rank):
    for dtype in (torch.float32, torch.bfloat16):
        problem = Routed(
            (2, 19), 45, 66, rank, dtype, dtype, needs=ALL, experts=experts, routing=routing,
            router_input=router_input, seed=rank,
        )  # fmt: skip
        problem.assert_solved_by(backend)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "transposed", "inner_stride"])
@dtypes
def test_a_bank_of_any_layout(backend, dtype, layout, routing):
    problem = Routed((3, 11), 40, 56, 8, dtype, dtype, needs=ALL, experts=4, routing=routing, layouts={"B": layout})
    problem.assert_solved_by(backend)


@pytest.mark.parametrize("routing", ["batch", "token"])
@dtypes
def test_gradients_reach_pefts_weight_through_the_view_of_its_bank(backend, dtype, routing):
    """PEFT's Lily keeps `[E r, d_out]`: the transposed view of it trains the weight itself."""
    problem = Routed((3, 11), 40, 56, 8, dtype, dtype, needs=frozenset("B"), experts=4, routing=routing)
    inputs, g = problem.tensors(device_of(backend))
    bank = inputs.pop("B")
    weight = bank.transpose(1, 2).reshape(4 * 8, 56).contiguous().requires_grad_()
    with use_backend(backend), poisoned_memory():
        out = problem.call(**inputs, B=weight.view(4, 8, 56).transpose(1, 2))
        (gradient,) = torch.autograd.grad(out, weight, g)
    through_weight = {"dB": gradient.view(4, 8, 56).transpose(1, 2)}
    eager, truth = problem.eager(), problem.truth()
    assert_all_accurate(through_weight, {"dB": eager["dB"]}, {"dB": truth["dB"]}, dtype)


@routings
@pytest.mark.parametrize("lead", [(0, 3), (3, 0), (1, 1), (2, 3, 2, 5)], ids=str)
@dtypes
def test_any_leading_dimensions(backend, dtype, lead, routing, router_input):
    Routed(
        lead, 17, 33, 3, dtype, dtype, needs=ALL, routing=routing, router_input=router_input, masked=True
    ).assert_solved_by(backend)


@pytest.mark.parametrize("routing", ["batch", "token", "static"])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (50,)], ids=str)
def test_leading_dimensions_without_samples(backend, lead, routing):
    Routed(lead, 17, 33, 3, needs=ALL, routing=routing).assert_solved_by(backend)


@routings
def test_wide_rows_and_many_tokens(backend, routing, router_input):
    """More elements than one block of any kernel holds, with tails in every dimension."""
    Routed((3, 307), 1029, 771, 8, needs=ALL, experts=4, routing=routing, router_input=router_input).assert_solved_by(
        backend
    )


@pytest.mark.parametrize("routing", ["batch", "sample"])
@pytest.mark.parametrize("router_input", ["t", "x"])
@dtypes
def test_all_tokens_masked_leave_the_stream_and_give_no_gradients(backend, dtype, routing, router_input):
    problem = Routed((2, 7), 17, 33, 3, dtype, dtype, needs=ALL, routing=routing, router_input=router_input)
    inputs, g = problem.tensors(device_of(backend))
    nothing = torch.zeros(2, 7, dtype=torch.bool, device=g.device)

    def call(y, x, A, B, R):
        return functional.routed_projection(
            y, x, A, B, R, routing=routing, router_input=router_input, token_mask=nothing
        )

    with use_backend(backend), poisoned_memory():
        results = evaluate(call, inputs, problem.needs, g)
    assert_same_bits(results["out"], inputs["y"], "out")
    assert_same_bits(results["dy"], g, "dy")
    for name in ("dx", "dA", "dB", "dR"):
        assert not results[name].any(), f"{name} must be zero"


@dtypes
def test_one_fully_masked_sample_keeps_its_stream(backend, dtype):
    problem = Routed((2, 7), 17, 33, 3, dtype, dtype, routing="sample")
    inputs, _ = problem.tensors(device_of(backend))
    mask = torch.tensor([[True] * 7, [False] * 7], device=inputs["y"].device)
    with use_backend(backend), poisoned_memory():
        out = functional.routed_projection(*inputs.values(), routing="sample", token_mask=mask)
    assert_same_bits(out[1], inputs["y"][1])
    assert not torch.equal(out[0], inputs["y"][0])


@pytest.mark.parametrize("routing", ["token", "static"])
def test_a_token_mask_is_without_effect_where_nothing_is_averaged(backend, routing):
    plain = Routed((2, 9), 34, 21, 4, needs=ALL, routing=routing).ours(backend)
    masked = Routed((2, 9), 34, 21, 4, needs=ALL, routing=routing, masked=True).ours(backend)
    for name, value in plain.items():
        assert_same_bits(masked[name], value, name)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", list(product((False, True), repeat=3)), ids=str)
def test_an_inactive_expert_takes_part_and_its_gradient_is_zero(backend, dtype, routing, active):
    problem = Routed((2, 9), 34, 21, 4, dtype, dtype, needs=ALL, routing=routing, active=active)
    problem.assert_solved_by(backend)
    bank_gradient = problem.ours(backend)["dB"]
    for e, trains in enumerate(active):
        assert bank_gradient[e].any() == trains


@pytest.mark.parametrize("routing", ROUTINGS)
def test_masked_gradients_change_no_other_bit(backend, routing):
    """The forward and the gradients of everything but the frozen experts are those of a call without a mask."""
    plain = Routed((2, 9), 34, 21, 4, needs=ALL, routing=routing)
    everything = plain.ours(backend)
    for active in ((True, True, True), (False, True, False), True):
        results = plain.but(active=active).ours(backend)
        for name, value in results.items():
            kept = slice(None) if name != "dB" or active is True else [e for e in range(3) if active[e]]
            assert_same_bits(value[kept], everything[name][kept], name)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_wholly_frozen_bank_gets_none(backend, routing):
    results = Routed((2, 9), 34, 21, 4, needs=ALL, routing=routing, active=False).ours(backend)
    assert results["dB"] is None
    assert all(value is not None for name, value in results.items() if name != "dB")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_token_routing_equals_its_concatenated_form(backend, dtype):
    """One rank `E r` update with `z = w (x) t`, computed by the residual add itself through an identity."""
    problem = Routed((31,), 24, 40, 3, dtype, dtype, experts=4, routing="token")
    inputs, _ = problem.tensors(device_of(backend))
    y, x, A, B, R = inputs.values()
    t = x.float() @ A.float().T
    z = (torch.softmax(t @ R.float().T, -1)[:, :, None] * t[:, None, :]).flatten(1)
    with use_backend(backend), poisoned_memory():
        concatenated = functional.expand_add(y, z, B.transpose(0, 1).flatten(1), problem.scale)
        ours = problem.call(**inputs)
    assert_accurate("out", ours, problem.eager()["out"], problem.truth()["out"], dtype)
    assert_accurate("concatenated", concatenated, problem.eager()["out"], problem.truth()["out"], dtype)


@pytest.mark.parametrize("experts", [1, 2])
def test_the_gradient_of_a_weight_is_a_long_sum_that_keeps_its_digits(backend, experts):
    problem = Routed((64,), 47, 4097, 16, needs=frozenset(("weights",)), experts=experts, routing="static")
    problem.assert_solved_by(backend)


@pytest.mark.parametrize(("lead", "rank", "experts"), [((48,), 64, 8), ((), 63, 7), ((5,), 50, 3)], ids=str)
def test_hundreds_of_ranks_add_up_as_accurately_as_the_experts_one_by_one(backend, lead, rank, experts):
    """The update as one of rank `E r`, against the loop: one chain of so many sums would have twice its error."""
    needs = frozenset(("y", "x", "R"))
    Routed(
        lead, 17, 96, rank, scale=16.0, needs=needs, experts=experts, routing="token", router_input="x"
    ).assert_solved_by(backend)


@dtypes
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_a_uniform_router_equals_static_weights(backend, dtype, routing):
    problem = Routed((2, 15), 24, 40, 3, dtype, dtype, experts=4, routing=routing)
    inputs, _ = problem.tensors(device_of(backend))
    static = problem.but(routing="static")
    quarter = torch.full((4,), 0.25, device=inputs["y"].device)
    y, x, A, B, R = inputs.values()
    with use_backend(backend), poisoned_memory():
        routed_out = functional.routed_projection(y, x, A, B, torch.zeros_like(R), routing=routing)
        static_out = functional.routed_projection(y, x, A, B, routing="static", weights=quarter)
    exact = ResidualAdd.reference(static, None, y=y.double(), x=x.double(), A=A.double(), B=B.double().mean(0))
    exact = (exact - y.double()) / static.scale + y.double()  # `reference` scales by 0.7, these calls by 1
    eager = y + torch.nn.functional.linear(torch.nn.functional.linear(x, A), B.mean(0))
    assert_accurate(routing, routed_out, eager, exact, dtype)
    assert_accurate("static", static_out, eager, exact, dtype)


@dtypes
@pytest.mark.parametrize("value", [80.0, -80.0, 1e4])
def test_extreme_logits_do_not_overflow_the_softmax(backend, dtype, value):
    """One expert takes everything: the update is that of its residual add."""
    y, x, A, B = ResidualAdd((13,), 24, 40, 3, dtype, dtype).tensors(device_of(backend))[0].values()
    bank = torch.stack([B, torch.randn_like(B)])
    x = x.abs() + 0.5
    R = torch.zeros(2, 24, dtype=dtype, device=x.device)
    R[0] = value
    chosen = bank[0 if value > 0 else 1]
    for routing in ("token", "batch"):
        with use_backend(backend), poisoned_memory():
            out = functional.routed_projection(y, x, A, bank, R, routing=routing, router_input="x")
        problem = ResidualAdd((13,), 24, 40, 3, dtype, dtype, scale=1.0)
        tensors = {"y": y, "x": x, "A": A, "B": chosen}
        eager = problem.expression(None, **tensors)
        exact = problem.reference(None, **{name: tensor.double() for name, tensor in tensors.items()})
        assert_accurate(routing, out, eager, exact, dtype)


@pytest.mark.parametrize("layout", ACTIVATION_LAYOUTS)
@pytest.mark.parametrize("routing", ROUTINGS)
@dtypes
def test_inplace_writes_y_and_nothing_around_it(backend, dtype, routing, layout):
    problem = Routed((3, 13), 70, 53, 8, dtype, dtype, routing=routing)
    inputs, _ = problem.tensors(device_of(backend))
    before = {name: value.clone() for name, value in inputs.items()}
    y = guarded(inputs.pop("y"), layout)
    weights = inputs.pop("weights", None)
    with use_backend(backend), poisoned_memory():
        result = functional.routed_projection(
            y.view, **inputs, scale=problem.scale, routing=routing, weights=weights, inplace=True
        )
    assert result is y.view
    y.assert_only_the_view_changed()
    assert_accurate("y", y.view, problem.eager()["out"], problem.truth()["out"], dtype)
    for name, value in inputs.items():
        assert_same_bits(value, before[name], name)


@pytest.mark.parametrize("routing", ROUTINGS)
@dtypes
def test_inplace_and_fresh_results_have_the_same_bits(backend, dtype, routing):
    problem = Routed((2, 21), 96, 75, 8, dtype, dtype, routing=routing)
    inputs, _ = problem.tensors(device_of(backend))
    weights = inputs.pop("weights", None)
    with use_backend(backend), poisoned_memory():
        fresh = functional.routed_projection(**inputs, routing=routing, weights=weights)
        own = functional.routed_projection(**inputs, routing=routing, weights=weights, inplace=True)
    assert_same_bits(own, fresh)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_static_weights_of_any_floating_dtype_get_gradients_of_it(backend, weights_dtype):
    inputs, _ = Routed((9,), 24, 40, 3, routing="static").tensors(device_of(backend))
    y, x, A, B = (inputs[name] for name in ("y", "x", "A", "B"))
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=weights_dtype, device=x.device, requires_grad=True)
    with use_backend(backend), poisoned_memory():
        out = functional.routed_projection(y, x, A, B, routing="static", weights=weights)
        (gradient,) = torch.autograd.grad(out.sum(), weights)
    assert gradient.dtype is weights_dtype
    t = x.double() @ A.double().T
    expected = torch.stack([(t @ B[e].double().T).sum() for e in range(3)])
    tolerance = 1e-2 if weights_dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(gradient.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_gradient_of_a_alone_stays_within_a():
    """A router on x shares the pass over x with A: its rows are summed beside those of A and must not be written."""
    code = """if True:
        import torch
        from lowrank_fast import routed_projection
        y, x, bank, R = torch.ones(5, 48), torch.randn(5, 64), torch.randn(4, 48, 4), torch.randn(4, 64)
        for _ in range(300):
            A = torch.randn(4, 64, requires_grad=True)
            torch.autograd.grad(routed_projection(y, x, A, bank, R, routing="token", router_input="x").sum(), A)
    """
    result = run_python(code)  # a process of its own: what is written past the end of dA is the allocator's
    assert result.returncode == 0, result.stderr
