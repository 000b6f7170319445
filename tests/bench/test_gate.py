"""The gate: every provider of the registry is right, and one that is not gets no timings."""

from __future__ import annotations

import random

import pytest
import torch
from lowrank_fast.bench import runner
from lowrank_fast.bench.cases import Case, Inputs, Problem, residual, routed
from lowrank_fast.bench.gate import Expected, Wrong, check, relative_error
from lowrank_fast.bench.registry import LIMITS, PROVIDERS, Prepared, Provider, multiply_adds

pytestmark = pytest.mark.usefixtures("one_thread")


def problem_of(family: str, dtype: torch.dtype) -> Problem:
    """A small problem whose sizes are all different, d_in from d_out too."""
    if family == "residual_add":
        return Problem("residual_add", dtype, 37, 48, 56, 5)
    return Problem("routed_projection", dtype, 37, 48, 56, 5, 3, family.removeprefix("routed_"))


EAGER = [
    pytest.param(provider, family, direction, id=f"{provider.name}-{family}-{direction}")
    for provider in PROVIDERS
    for family, direction in provider.builders
    if provider.name not in ("compile", *LIMITS)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("provider", "family", "direction"), EAGER)
def test_every_provider_computes_the_reference(provider, family, direction, dtype):
    problem = problem_of(family, dtype)
    inputs = Inputs(problem)
    with torch.set_grad_enabled(direction == "forward_backward"):
        entry = runner.admit(
            provider, provider.builders[family, direction], Case(problem, direction), inputs, Expected(inputs)
        )
    assert (entry.status, entry.reason) == ("ok", None)
    assert entry.error > 0.0


def test_compiled_providers_stand_beside_every_naive_one():
    by_name = {provider.name: provider.builders for provider in PROVIDERS}
    assert set(by_name["compile"]) == set(by_name["naive"])


def test_every_direction_of_ours_has_both_limits_and_a_rival():
    by_name = {provider.name: set(provider.builders) for provider in PROVIDERS}
    for limit in LIMITS:
        assert by_name[limit] == by_name["ours"]
    for key in by_name["ours"]:
        assert any(key in builders for name, builders in by_name.items() if name not in (*LIMITS, "ours")), key


def test_multiply_adds_are_those_of_the_matrix_products():
    T, d, r, E = 10, 6, 2, 3
    one, token = residual(torch.float32, T, d, r), routed("token", torch.float32, T, d, r, E)
    assert multiply_adds(one, "forward_out") == 2 * T * d * r  # x A^T, t B^T
    assert multiply_adds(one, "backward_out") == 4 * T * d * r  # g B, u A, u^T x, g^T t
    assert multiply_adds(one, "forward_backward") == 6 * T * d * r
    assert multiply_adds(token, "forward") == T * d * (r + E) + T * d * E * r
    assert multiply_adds(routed("batch", torch.float32, T, d, r, E), "forward") == 2 * T * d * r


def wrong_provider(change) -> Provider:
    """Our residual add with `change` applied to its output."""

    def build(i: Inputs) -> Prepared:
        def call() -> torch.Tensor:
            return change(i.y + i.scale * ((i.x @ i.A.T) @ i.B.T))

        return Prepared(call, lambda result: {"out": result})

    return Provider("wrong", "wrong on purpose", {("residual_add", "forward"): build})


def with_one_nan(out):
    out[3, 4] = float("nan")
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda out: out * (1 + 1e-4), "off by", id="scaled by 1.0001"),
        pytest.param(lambda out: out[:-1], "shape", id="a row is missing"),
        pytest.param(with_one_nan, "off by nan", id="one NaN"),
        pytest.param(torch.zeros_like, "off by", id="zeros"),
    ],
)
def test_a_wrong_provider_is_not_timed(change, reason, monkeypatch):
    provider = wrong_provider(change)
    monkeypatch.setattr(runner, "providers_for", lambda *_: [(provider, provider.builders["residual_add", "forward"])])
    (record,) = runner.run_case(
        Case(residual(torch.float32, 16, 32, 4), "forward"), runner.Workspace(), 0.0, random.Random(0)
    )
    assert record["status"] == "refused"
    assert reason in record["reason"]
    assert record["min_s"] is record["median_s"] is None
    assert record["rounds"] == 0


def test_a_provider_that_raises_does_not_end_the_run(monkeypatch):
    def raises(inputs):
        raise RuntimeError("no such kernel\nsecond line")

    broken = Provider("broken", "", {})
    fine = next(provider for provider in PROVIDERS if provider.name == "naive")
    pairs = [(broken, raises), (fine, fine.builders["residual_add", "forward"])]
    monkeypatch.setattr(runner, "providers_for", lambda *_: pairs)
    case = Case(residual(torch.float32, 16, 32, 4), "forward")
    failed, timed = runner.run_case(case, runner.Workspace(), 0.0, random.Random(0))
    assert (failed["status"], failed["reason"]) == ("failed", "RuntimeError: no such kernel")
    assert timed["status"] == "ok"


def test_a_missing_gradient_is_wrong():
    inputs = Inputs(routed("batch", torch.float32, 9, 16, 4, 3))
    expected = Expected(inputs)
    complete = {name: expected[name].float() for name in ("dy", "dx", "dA", "dB", "dR")} | {
        "out": expected["out"].float()
    }
    assert check(complete, expected, "forward_backward", torch.float32) < 1e-6
    del complete["dR"]
    with pytest.raises(Wrong, match="dR is missing"):
        check(complete, expected, "forward_backward", torch.float32)


def test_an_unwritten_output_is_wrong():
    """The buffer is poisoned before the gate's call: a provider that writes nothing cannot pass on an old result."""
    inputs = Inputs(residual(torch.float32, 8, 16, 4))
    naive = next(provider for provider in PROVIDERS if provider.name == "naive")
    prepared = naive.builders["residual_add", "forward_out"](inputs)
    prepared.call()
    prepared.reset()
    with pytest.raises(Wrong, match="off by nan"):
        check(prepared.outputs(None), Expected(inputs), "forward_out", torch.float32)


def test_relative_error_is_the_frobenius_ratio_over_all_chunks():
    torch.manual_seed(0)
    expected = torch.randn(20_000, 3, dtype=torch.float64)
    got = expected + 1e-3 * torch.randn_like(expected)
    direct = ((got - expected).norm() / expected.norm()).item()
    assert relative_error(got, expected) == pytest.approx(direct, rel=1e-12)
    assert relative_error(torch.full((2, 2), 0.5), torch.zeros(2, 2)) == 1.0


def test_inputs_are_seeded_and_never_zero():
    problem = routed("token", torch.bfloat16, 33, 24, 4, 3)
    first, second = Inputs(problem), Inputs(problem)
    for name in ("x", "y", "A", "B", "R", "g"):
        tensor = getattr(first, name)
        assert torch.equal(tensor, getattr(second, name))
        assert tensor.float().abs().min() >= 0
        assert tensor.float().std() > 0.05
    update = Expected(first)["out"] - first.y.double()
    assert update.norm() > 0.2 * first.y.double().norm()
