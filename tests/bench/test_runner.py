"""Alternating rounds, budgets, overhead and peak bytes."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from lowrank_fast.bench import environment, memory, overhead, plans, runner
from lowrank_fast.bench.cases import Case, Inputs, residual
from lowrank_fast.bench.records import validate
from lowrank_fast.bench.registry import Prepared, Provider

pytestmark = pytest.mark.usefixtures("one_thread")


def entry(name: str, log: list[str], estimate: float = 1e-3, stride: int = 1, calls: int = 1) -> runner.Entry:
    prepared = Prepared(lambda: log.append(name), lambda result: {})
    return runner.Entry(Provider(name, name, {}), prepared, estimate=estimate, stride=stride, calls=calls)


def test_rounds_alternate_and_their_order_changes():
    log: list[str] = []
    entries = [entry(name, log) for name in "abc"]
    runner.alternate(entries, 12, random.Random(0))
    rounds = ["".join(log[start : start + 3]) for start in range(0, 36, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 2
    assert all(len(e.seconds) == 12 for e in entries)


def test_a_slow_provider_joins_every_kth_round():
    log: list[str] = []
    entries = [entry("quick", log), entry("slow", log, stride=4)]
    runner.alternate(entries, 12, random.Random(0))
    assert (log.count("quick"), log.count("slow")) == (12, 3)


def test_short_calls_are_repeated_within_a_sample():
    log: list[str] = []
    short = entry("short", log, calls=50)
    runner.alternate([short], 2, random.Random(0))
    assert len(log) == 100
    assert len(short.seconds) == 2


def test_rounds_fill_the_budget_and_keep_their_bounds():
    entries = [entry("a", [], 0.010), entry("b", [], 0.030)]
    assert runner.rounds_for(entries, 0.4) == 10
    assert runner.rounds_for(entries, 0.001) == runner.MIN_ROUNDS
    assert runner.rounds_for(entries, 100.0) == runner.MAX_ROUNDS
    assert runner.rounds_for(entries, 0.0) == runner.MIN_SAMPLES


def test_the_slowest_provider_still_gets_its_samples():
    slow = entry("slow", [], 1.0, stride=100)
    rounds = runner.rounds_for([entry("quick", [], 0.001), slow], 0.05)
    assert len(range(0, rounds, slow.stride)) >= runner.MIN_SAMPLES


def test_calibration_makes_short_samples_long_enough_and_slow_ones_rare():
    log: list[str] = []
    quick = entry("quick", log)
    slow = runner.Entry(Provider("slow", "", {}), Prepared(lambda: sum(range(200_000)), lambda result: {}))
    runner.calibrate([quick, slow])
    assert quick.calls > 1
    assert quick.stride == 1
    assert slow.calls == 1
    assert slow.stride > 1


def test_garbage_collection_is_off_inside_and_on_again_after_an_error():
    seen = []

    def work():
        with runner.quiet_process():
            seen.append(gc.isenabled())
            raise RuntimeError("a provider failed")

    with pytest.raises(RuntimeError, match="a provider failed"):
        work()
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("direction", ["forward", "forward_out", "forward_inplace", "backward_out", "forward_backward"])
def test_a_case_gives_one_valid_record_per_provider(direction):
    case = Case(residual(torch.float32, 12, 32, 4), direction)
    only = frozenset({"ours", "addmm", "mm4", "floor"})
    found = runner.run_case(case, runner.Workspace(), 0.01, random.Random(0), only)
    assert {r["provider"] for r in found} == (
        {"ours", "mm4", "floor"} if direction == "backward_out" else {"ours", "addmm", "floor"}
    )
    for record in found:
        assert validate(record)["status"] == "ok"
        assert 0.0 < record["min_s"] <= record["p20_s"] <= record["median_s"] <= record["p80_s"]
        assert record["floor_min_s"] == next(r for r in found if r["provider"] == "floor")["min_s"]
        assert (record["T"], record["d_in"], record["r"], record["threads"]) == (12, 32, 4, 1)
        assert record["versions"]["torch"] == torch.__version__


def test_directions_of_one_problem_share_inputs_and_the_next_problem_does_not():
    workspace = runner.Workspace()
    first, second = residual(torch.float32, 8, 16, 4), residual(torch.float32, 8, 16, 5)
    inputs, expected = workspace.enter(first)
    assert workspace.enter(first) == (inputs, expected)
    assert workspace.enter(second)[0] is not inputs


def test_peak_bytes_counts_outputs_and_temporaries_but_not_inputs():
    x = torch.randn(1000, 256)
    size = x.nbytes

    def two_live_at_once():
        a = x * 2.0  # stays
        b = a.abs()  # goes
        del b
        return a.neg_()

    scalars = 64  # bytes: a Python scalar that meets a tensor is wrapped in one
    assert 2 * size <= memory.peak_bytes(two_live_at_once) <= 2 * size + scalars
    assert abs(memory.live_bytes(two_live_at_once) - size) <= scalars
    assert memory.peak_bytes(lambda: torch.add(x, x, out=x)) <= scalars


def test_profiler_output_does_not_reach_the_terminal(capfd):
    memory.peak_bytes(lambda: torch.ones(3))
    print("still here")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("still here\n", "")


def test_backward_keeps_t_and_nothing_else_beside_the_inputs():
    problem = residual(torch.float32, 64, 48, 8)
    elements, live = overhead.saved_beside_inputs(Inputs(problem))
    assert elements == 64 * 8
    assert abs(live - 4 * 64 * 8) <= 64


def test_overhead_records_name_both_sides():
    public, bare = overhead.measure_overhead(5, random.Random(0), d=16, rank=4)
    assert (public["provider"], bare["provider"]) == ("ours", "bare_op")
    assert public["direction"] == bare["direction"] == "call_overhead"
    assert public["min_s"] > 0.0
    assert bare["min_s"] > 0.0


def test_snapshot_names_the_machine():
    snapshot = environment.snapshot()
    assert snapshot["cpu"]
    assert snapshot["isa"]
    assert set(snapshot["versions"]) >= {"python", "torch", "lowrank_fast"}


def test_plans_cover_what_they_promise():
    both = [torch.float32, torch.bfloat16]
    default = plans.ops(both, plans.DEFAULT_SHAPES, quick=False)
    assert {(c.problem.tokens, c.problem.d_in) for c in default} == set(plans.DEFAULT_SHAPES)
    assert {c.problem.rank for c in default} == {8, 16, 32}
    assert {c.problem.family for c in default} == {"residual_add", "routed_batch", "routed_token"}
    assert len(set(default)) == len(default)
    assert len(plans.ops(both, plans.QUICK_SHAPES, quick=True)) < len(default) / 2
    assert {c.problem.tokens for c in plans.sweep(both, plans.SWEEP_FULL)} == {2**n for n in range(10, 17)}
