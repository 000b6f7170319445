"""A second training run from a saved adapter, its steps counted from the start again, beside an exact resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from lowrank_fast.methods import LoR2CController
from lowrank_fast.methods.lor2c_controller import find_topology
from lowrank_fast.peft import effilora_reducer, lor2c_controller

from . import tiny
from .test_effilora import adamw, effilora, step
from .test_lor2c import lor2c


def reloaded(model: Any, folder: Path, **changes: Any) -> Any:
    model.save_pretrained(folder)
    found = PeftModel.from_pretrained(tiny.model("llama"), folder, is_trainable=True)
    for name, value in changes.items():
        setattr(found.peft_config["default"], name, value)
    return found


@pytest.mark.parametrize("importance", ["gradient", "suppression"])
def test_the_reducer_scores_again_in_a_second_run(tmp_path: Path, importance: str) -> None:
    validation = [tiny.batch("llama", seed=50)]
    model = effilora(importance=importance, interval=3, num_B=2)
    reducer, optimizer = effilora_reducer(model, validation=validation), adamw(model)
    for n in range(10):
        step(model, reducer, optimizer, n)
    again = reloaded(model, tmp_path)
    second, optimizer = effilora_reducer(again, validation=validation), adamw(again)
    before = dict(second.scores)
    assert before == reducer.scores
    for n in range(7):
        step(again, second, optimizer, n)
    assert second.scores != before
    assert second.state.last_step == 6


@pytest.mark.parametrize("told", [False, True], ids=["the same run", "a new run"])
def test_steps_that_come_again_are_scored_once_but_for_a_new_run(told: bool) -> None:
    model = effilora(interval=3, num_B=2)
    reducer, optimizer = effilora_reducer(model), adamw(model)
    for n in range(7):
        step(model, reducer, optimizer, n)
    before = dict(reducer.scores)
    if told:
        reducer.begin(4, optimizer)  # what the Trainer's callback does in a second call of `train`
    for n in (0, 3):
        step(model, reducer, optimizer, n)
    assert (reducer.scores != before) is told


def test_lor2c_merges_in_a_second_run(tmp_path: Path) -> None:
    model = lor2c(max_merges=1, merge_interval=10)
    first = lor2c_controller(model, 100)
    assert not [event for n in range(1, 9) for event in first.step(n)]
    second = lor2c_controller(reloaded(model, tmp_path, merge_interval=2), 8)
    assert [event["step"] for n in range(1, 9) for event in second.step(n)] == [2]


def test_a_fade_goes_on_in_a_second_run_from_where_it_was_saved(tmp_path: Path) -> None:
    model = lor2c(max_merges=1, merge_interval=3, fade_steps=6)
    first = lor2c_controller(model, 100)
    for n in range(1, 7):
        first.step(n)
    assert max(span.gate for span in first.topology.spans if span.fade > 0) == 0.5
    again = reloaded(model, tmp_path)
    second = lor2c_controller(again, 100)
    gates = []
    for n in range(1, 4):
        second.step(n)
        gates.append(next(span.gate for span in find_topology(again).spans if span.start != span.end))
    assert gates == pytest.approx([4 / 6, 5 / 6, 1.0])
    assert all(span.fade == 0 for span in find_topology(again).spans)


def test_a_step_that_comes_twice_or_late_changes_nothing() -> None:
    model = lor2c(max_merges=2, merge_interval=2)
    controller = lor2c_controller(model, 100)
    for n in range(1, 5):
        controller.step(n)
    manifest = find_topology(model).manifest()
    assert controller.step(4) == controller.step(2) == []
    assert lor2c_controller(model, 100).step(4) == [], "nor with a new controller at the same step"
    assert find_topology(model).manifest() == manifest


def test_a_controller_that_is_told_of_a_new_run_counts_from_its_start() -> None:
    controller = LoR2CController(lor2c(max_merges=2), max_merges=2, merge_interval=4)
    assert [event["step"] for n in range(1, 7) for event in controller.step(n)] == [4]
    controller.begin(6, None)
    assert [event["step"] for n in range(1, 7) for event in controller.step(n)] == [4]
