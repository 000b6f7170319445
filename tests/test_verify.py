"""`lowrank_fast.verify` passes right backends and names what is wrong with wrong ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from lowrank_fast import backends, fallback, verify

SMALL = verify.Shape((2, 9), 21, 13, 3, 4)


def residual_problem(dtype: torch.dtype = torch.float32, **settings: str) -> verify.Problem:
    return verify.Problem("residual_add", dtype, dtype, SMALL, **settings)


def routed_problem(**settings: str) -> verify.Problem:
    settings = {"routing": "token", "router_input": "t"} | settings
    return verify.Problem("routed_projection", torch.float32, torch.float32, SMALL, **settings)


def checked(problem: verify.Problem, backend: str = "reference", draws: int = verify.DRAWS) -> list[verify.Case]:
    data = [verify.draw(problem, seed, "cpu") for seed in range(draws)]
    return [verify.check(case, data, "cpu") for case in verify.cases(problem, backend, quick=False)]


def failures(cases: list[verify.Case]) -> list[str]:
    return [failure for case in cases for failure in case.failures]


@pytest.fixture
def mutate(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Wrap one function of the "reference" backend, which `verify` compares with `reference.py` and not with itself."""

    def replace(name: str, change):
        original = getattr(fallback, name)
        monkeypatch.setattr(fallback, name, lambda *a, **k: change(original(*a, **k)))

    return replace


# ------------------------------------------------------------------------------------------------ the matrix


def test_the_matrix_covers_every_op_dtype_routing_router_input_and_gradient_mask():
    cases = verify.plan(["reference"], quick=False)
    problems = {case.problem for case in cases}
    assert {problem.op for problem in problems} == {"residual_add", "shrink", "expand_add", "routed_projection"}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        routed = {(p.routing, p.router_input) for p in problems if p.dtype is dtype and p.op == "routed_projection"}
        dynamic = set(itertools.product(("batch", "sample", "token"), ("t", "x")))
        assert routed == dynamic | {("static", "t")}
        assert torch.float32 in {p.parameter_dtype for p in problems if p.dtype is dtype}
    for problem in problems:
        if problem.variant == "plain":
            masks = {case.needs for case in cases if case.problem == problem and case.mode == "gradients"}
            assert len(masks) == 2 ** len(problem.inputs) - 1


def test_quick_keeps_every_op_and_dtype():
    quick, full = ({(c.problem.label, c.problem.dtype) for c in verify.plan(["reference"], q)} for q in (True, False))
    assert quick == full


# ------------------------------------------------------------------------------------------------ what passes


@pytest.mark.parametrize("variant", ["plain", "dropout"])
@pytest.mark.parametrize("dtype", list(verify.DTYPE_NAMES), ids=verify.DTYPE_NAMES.values())
def test_residual_add_passes_on_every_backend(backend, dtype, variant):
    cases = checked(residual_problem(dtype, variant=variant), backend)
    assert failures(cases) == []
    assert all(set(case.tensors) == {"out", *(f"d{name}" for name in case.needs)} for case in cases)


@pytest.mark.parametrize("variant", ["plain", "token_mask", "active", "dropout"])
def test_batch_routing_passes_on_every_backend(backend, variant):
    problem = routed_problem(routing="batch", router_input="t", variant=variant)
    assert failures(checked(problem, backend)) == []


def test_the_expression_is_the_reference_in_float64():
    """Only rounding may tell the two apart, or the factor of two would measure something else."""
    for problem in verify.problems(quick=True):
        wide = verify.Problem(
            problem.op, torch.float64, torch.float64, SMALL, problem.routing, problem.router_input, problem.variant
        )
        data = verify.draw(wide, 0, "cpu")
        for name, truth in data.truth.items():
            torch.testing.assert_close(data.expression[name], truth, rtol=1e-10, atol=1e-12, msg=f"{problem} {name}")


# ------------------------------------------------------------------------------------------------ what fails


def test_a_wrong_factor_in_one_gradient_fails_exactly_the_masks_that_need_it(mutate):
    mutate("expand_add_backward", lambda result: (result[0] * 1.001, result[1]))
    for case in checked(residual_problem()):
        assert case.passed == (not {"x", "A"} & set(case.needs)), case.needs


def test_an_error_below_the_bound_but_above_twice_the_expression_fails(mutate):
    mutate("residual_add", lambda result: (result[0] * (1.0 + 4e-6), result[1]))
    found = failures(checked(residual_problem()))
    assert found
    assert all("twice that of the expression" in failure for failure in found)


def test_two_steps_of_float16_towards_zero_fail_though_they_are_below_the_bound(mutate):
    mutate("residual_add", lambda result: ((result[0].view(torch.int16) - 2).view(torch.float16), result[1]))
    out_of_a_forward = checked(residual_problem(torch.float16))[0].failures
    assert len(out_of_a_forward) == 1
    assert "twice that of the expression" in out_of_a_forward[0]


def test_nan_in_the_output_fails(mutate):
    mutate("residual_add", lambda result: (result[0].index_fill(-1, torch.tensor([0]), float("nan")), result[1]))
    found = failures(checked(residual_problem()))
    assert any(failure.startswith("out: relative error nan") for failure in found)


def test_results_that_differ_from_call_to_call_fail(mutate):
    noise = itertools.count(1)
    mutate("residual_add", lambda result: (result[0] * (1.0 + 2.0**-23 * (next(noise) % 3)), result[1]))
    assert "two calls with the same inputs gave different bits" in failures(checked(residual_problem()))


def test_a_gradient_of_the_wrong_dtype_or_shape_fails():
    case = verify.Case(residual_problem(torch.bfloat16), "reference", "gradients", ("A",))
    data = [verify.draw(case.problem, 0, "cpu")]
    verify.compare(case, "dA", [data[0].truth["dA"].float()], data)
    verify.compare(case, "out", [data[0].expression["out"][..., :-1]], data)
    assert case.failures == [
        "dA must be [3, 21] torch.bfloat16; got [3, 21] torch.float32",
        "out must be [2, 9, 13] torch.bfloat16; got [2, 9, 12] torch.bfloat16",
    ]


def test_a_gradient_for_an_inactive_expert_fails(mutate):
    mutate("routed_projection_backward", lambda result: (*result[:2], result[2] + 1e-30, *result[3:]))
    found = failures(checked(routed_problem(variant="active")))
    assert "dB of an inactive expert must be zero" in found


def test_a_backend_that_raises_fails_with_its_message(mutate):
    def explode(result):
        raise RuntimeError("illegal instruction")

    mutate("residual_add_backward", explode)
    by_mode = {case.mode: case.failures for case in checked(residual_problem(), draws=1)}
    assert by_mode["forward"] == []
    assert by_mode["gradients"] == ["raised RuntimeError: illegal instruction"]


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setitem(backends._REASONS, "triton", lambda: "no GPU")
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: no GPU"):
        next(verify.run(["triton"]))
    with pytest.raises(ValueError, match="backend must be one of"):
        next(verify.run(["eager"]))


# ------------------------------------------------------------------------------------------------ determinism, JSON


def test_a_second_run_reports_the_same_figures(backend):
    problem = routed_problem()
    first, second = ([case.to_dict() for case in checked(problem, backend, draws=2)] for _ in range(2))
    assert first == second


def test_a_case_names_in_json_everything_that_identifies_it():
    case = checked(residual_problem(torch.bfloat16), draws=1)[-1]
    found = case.to_dict()
    assert found["tensors"].keys() == {"out", "dy", "dx", "dA", "dB"}
    assert found["shape"] == {"lead": (2, 9), "d_in": 21, "d_out": 13, "rank": 3, "experts": 4}
    identity = {key: found[key] for key in ("op", "backend", "dtype", "parameter_dtype", "mode", "needs", "passed")}
    assert identity == {
        "op": "residual_add",
        "backend": "reference",
        "dtype": "bf16",
        "parameter_dtype": "bf16",
        "mode": "gradients",
        "needs": ["y", "x", "A", "B"],
        "passed": True,
    }
