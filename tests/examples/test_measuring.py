"""The examples that measure: they run at a small size and print a line for each thing they compare."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

Run = Callable[..., list[str]]
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    threads = torch.get_num_threads()

    def run(name: str, *options: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *options])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_overhead_prints_every_variant_it_was_asked_for(run: Run, clock: str) -> None:
    variants = ["lora-ours", "lily-ours", "lor2c"]
    size = ["--layers", "1", "--rows", "1", "--tokens", "8", "--rounds", "2", "--threads", "1", "--no-memory"]
    lines = run("overhead.py", *size, "--dtype", "float32", "--clock", clock, "--variants", *variants)
    assert [line.split()[0] for line in lines[-4:]] == ["frozen", *variants]
    assert all(line.count("%") == 4 for line in lines[-4:])


def test_shared_inputs_prints_time_and_memory_apart_and_together(run: Run) -> None:
    size = ["--rows", "1", "--tokens", "8", "--width", "32", "--inner", "48", "--rounds", "2", "--threads", "1"]
    lines = run("shared_inputs.py", *size, "--adapter", "lora", "--rank", "4", "--clock", "cpu")
    shown = [line.split()[0] for line in lines if "ms above" in line]
    assert shown == ["peft", "apart", "together"] * 2
