"""The table of targets: its arithmetic, on records whose times are given."""

from __future__ import annotations

import pytest
from lowrank_fast.bench import plans, targets
from lowrank_fast.bench.report import targets_table

from .samples import case, record


def row(records, quantity):
    """The one row whose quantity is `quantity`."""
    (found,) = [r for r in targets.rows(records) if r.target.quantity == quantity]
    return found


def test_speed_up_is_the_baselines_time_over_ours_and_the_worst_case_counts():
    records = [
        *case({"ours": 1.0, "addmm": 2.5, "floor": 0.9}, T=4096, d_in=768),
        *case({"ours": 2.0, "addmm": 3.8, "mm_add": 3.0, "floor": 1.9}, T=2048, d_in=4096),
    ]
    found = row(records, "fp32 forward out=, r=8, vs addmm(out=)")
    assert found.measured.value == pytest.approx(1.9)
    assert targets.any_of(found.measured.group)["T"] == 2048
    assert (found.ok, found.reaches_aim) == (True, False)  # must 1.8, aim 2.4
    assert targets.fastest_other(found.measured.group) == ("mm_add", pytest.approx(1.5))


def test_fraction_of_the_floor():
    found = row(case({"ours": 1.0, "floor": 0.79}), "fp32 forward out=, r=8")
    assert found.measured.value == pytest.approx(0.79)
    assert found.ok is False  # must 0.80
    assert row(case({"ours": 1.0, "floor": 0.96}), "fp32 forward out=, r=8").reaches_aim


def test_the_limit_is_the_slower_of_traffic_and_arithmetic():
    times = {"ours": 2.0, "addmm": 3.0, "floor": 1.0, "arithmetic": 1.5}
    assert row(case(times), "fp32 forward out=, r=8, vs addmm(out=)").measured.limit == 2.0
    assert row(case(times), "fp32 forward out=, r=8").measured.limit == pytest.approx(1 / 1.5)
    assert row(case(times | {"arithmetic": None}), "fp32 forward out=, r=8").measured.limit is None


def test_medians_stand_beside_and_do_not_decide():
    records = [record("ours", 1.0, median=4.0), record("addmm", 2.0, median=4.0)]
    found = row(records, "fp32 forward out=, r=8, vs addmm(out=)")
    assert found.measured.value == pytest.approx(2.0)
    assert found.measured.median == pytest.approx(1.0)
    assert found.ok


def test_a_small_case_does_not_count_as_large():
    records = case({"ours": 1.0, "addmm": 9.0, "floor": 1.0}, T=2048, d_in=768)
    assert row(records, "fp32 forward out=, r=8, vs addmm(out=)").measured is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_read_their_own_dtype_only(dtype):
    found = {r.target.quantity: r.measured for r in targets.rows(case({"ours": 1.0, "addmm": 2.0}, dtype=dtype))}
    assert (found["fp32 forward out=, r=8, vs addmm(out=)"] is not None) == (dtype == "float32")
    assert (found["bf16 forward out=, r=8, vs addmm(out=)"] is not None) == (dtype == "bfloat16")


def test_a_refused_result_of_ours_is_not_passed_over():
    records = [
        *case({"ours": 1.0, "addmm": 5.0}, T=4096, d_in=768),
        *case({"ours": None, "addmm": 5.0}, T=2048, d_in=4096),
    ]
    found = row(records, "fp32 forward out=, r=8, vs addmm(out=)")
    assert found.measured is None
    assert found.ok is None


def test_a_missing_baseline_leaves_the_row_unmeasured():
    records = case({"ours": 1.0, "naive": 3.0, "compile": None}, direction="forward_backward")
    assert row(records, "fp32 forward+backward, autograd, vs torch.compile").measured is None
    assert row(records, "fp32 forward+backward, autograd, vs naive").measured.value == pytest.approx(3.0)


def test_overhead_is_a_difference_in_microseconds_and_smaller_is_better():
    records = [
        record("ours", 12e-6, median=14e-6, direction="call_overhead", T=1),
        record("bare_op", 5e-6, median=6e-6, direction="call_overhead", T=1),
    ]
    found = row(records, "public function above the bare op, requires_grad")
    assert found.measured.value == pytest.approx(7.0)
    assert found.measured.median == pytest.approx(8.0)
    assert (found.ok, found.reaches_aim) == (True, False)  # must 10, aim 6
    slow = [record("ours", 16e-6, direction="call_overhead"), record("bare_op", 5e-6, direction="call_overhead")]
    assert row(slow, "public function above the bare op, requires_grad").ok is False


@pytest.mark.parametrize(("elements", "ok"), [(4096 * 8, True), (4096 * 8 + 1, False)])
def test_activation_memory_is_counted_in_tokens_times_rank(elements, ok):
    records = [record(direction="saved_for_backward", saved_elements=elements, saved_bytes=4 * elements)]
    assert row(records, "kept for backward beyond x").ok is ok


def test_sweep_compares_each_size_with_4k():
    def at(tokens, floor):
        return case({"ours": 1.0, "floor": floor}, suite="sweep", T=tokens, d_in=1024)

    quantity = "fp32 T=1k..64k at d=1024, fraction of floor"
    flat = [*at(1024, 0.85), *at(4096, 0.80), *at(65536, 0.70)]
    found = row(flat, quantity)
    assert found.measured.value == pytest.approx(0.875)
    assert targets.any_of(found.measured.group)["T"] == 65536
    assert found.ok
    assert row([*flat, *at(16384, 0.67)], quantity).ok is False
    assert row(at(1024, 0.9), quantity).measured is None  # nothing to compare with


def test_a_sweep_is_not_mistaken_for_an_op_case():
    records = case({"ours": 1.0, "addmm": 9.0, "floor": 0.99}, suite="sweep", T=65536, d_in=1024)
    assert row(records, "fp32 forward out=, r=8, vs addmm(out=)").measured is None


def test_token_and_batch_routing_have_rows_of_their_own():
    token = case(
        {"ours": 1.0, "concat": 2.0, "hydra": 8.0}, op="routed_projection", routing="token", direction="forward", E=4
    )
    lily = case({"ours": 1.0, "peft": 3.0}, op="routed_projection", routing="batch", direction="forward_backward", E=4)
    assert row(token + lily, "fp32 token-routed forward, vs concatenated").measured.value == pytest.approx(2.0)
    assert row(token + lily, "fp32 token-routed forward, vs HydraLoRA loop").measured.value == pytest.approx(8.0)
    assert row(token + lily, "fp32 batch-routed forward+backward, vs PEFT's Lily").measured.value == pytest.approx(3.0)


def test_every_target_row_has_a_case_in_the_plan():
    """Records of every planned case, as the runner would name them, leave no row of the table unmeasured."""
    import torch

    planned = plans.targets([torch.float32, torch.bfloat16])
    providers = ("ours", "addmm", "mm4", "naive", "compile", "concat", "hydra", "peft", "floor")
    records = [
        record(provider, 1.0, suite=one.suite, direction=one.direction, **one.problem.fields())
        for one in planned
        for provider in providers
    ]
    records += [record(name, 1e-6, direction="call_overhead") for name in ("ours", "bare_op")]
    records += [record(direction="saved_for_backward", saved_elements=1, saved_bytes=4, T=8)]
    assert [r.target.quantity for r in targets.rows(records) if r.measured is None] == []


def test_table_shows_misses_and_what_was_not_measured():
    records = case({"ours": 1.0, "addmm": 1.0, "floor": 0.9})
    cells = {cells[0]: cells for cells in targets_table(targets.rows(records)).rows}
    assert cells["fp32 forward out=, r=8"][1:6] == (
        "0.80 of floor",
        "0.95 of floor",
        "0.90 of floor",
        "0.90 of floor",
        "yes",
    )
    assert cells["fp32 forward out=, r=8, vs addmm(out=)"][5] == "NO"
    assert cells["fp32 forward out=, r=16"][3] == "not measured"


def test_later_measurements_of_a_case_replace_earlier_ones():
    (group,) = targets.groups([*case({"ours": 1.0}), *case({"ours": 2.0})])
    assert group["ours"]["min_s"] == 2.0


def test_a_case_measured_on_a_busy_machine_is_marked():
    calm = case({"ours": 1.0, "addmm": 2.0, "floor": 0.9})
    busy = [*calm[:1], record("addmm", 2.0, median=3.2), *calm[2:]]
    quantity = "fp32 forward out=, r=8, vs addmm(out=)"
    verdicts = [
        {cells[0]: cells[5] for cells in targets_table(targets.rows(records)).rows}[quantity]
        for records in (calm, busy)
    ]
    assert verdicts == ["yes", "yes (noisy)"]
