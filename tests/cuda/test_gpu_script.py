"""`make gpu` as far as a machine without a GPU can tell: each step runs, whatever the others do, and reports."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from lowrank_fast.bench.gpu import measure
from lowrank_fast.bench.records import read_jsonl

ROOT = Path(__file__).parent.parent.parent
STEPS = ["setup", "machine", "build-cpu", "build-cuda", "info", "tests", "sanitizer", "verify", "codegen", "bench"]


def stub(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def script(tmp_path):
    """Runs the script with stubs for all programs; one whose command line contains `word` does `then`."""
    tools = tmp_path / "tools"
    tools.mkdir()

    def run(word: str = "no such", then: str = "exit 3", **environment: str) -> tuple[int, dict[str, int], Path]:
        for name in ("python", "make", "nvidia-smi", "compute-sanitizer"):
            stub(tools / name, f'echo "{name} $*"\ncase "{name} $*" in *"{word}"*) {then} ;; esac')
        folder = tmp_path / "results"
        variables = {
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "PYTHON": str(tools / "python"),
            **environment,
        }
        done = subprocess.run(
            ["bash", str(ROOT / "bench" / "gpu" / "run.sh"), str(folder)], env=variables, capture_output=True, text=True
        )
        lines = [line.split() for line in (folder / "summary.txt").read_text().splitlines()]
        return done.returncode, {name: int(status) for name, _, status, *_ in lines}, folder

    return run


def test_all_steps_run_and_each_leaves_its_output(script):
    code, ended, folder = script()
    assert code == 0 and ended == dict.fromkeys(STEPS, 0)
    assert {path.stem for path in folder.glob("*.log")} == set(STEPS)
    assert "pytest tests" in (folder / "tests.log").read_text()
    assert (folder / "sanitizer.log").read_text().count("== ") == 3


@pytest.mark.parametrize(
    ("word", "failed"),
    [
        ("make setup", {"setup"}),
        ("nvidia-smi", {"machine"}),
        ("build_ext", {"build-cpu", "build-cuda"}),
        ("pytest tests", {"tests", "sanitizer"}),
        ("verify", {"verify"}),
        ("python", set(STEPS) - {"setup"} - {"sanitizer"}),
    ],
)
def test_a_failing_step_stops_no_other(script, word, failed):
    code, ended, _ = script(word)
    assert code == 1 and list(ended) == STEPS
    assert {name for name, status in ended.items() if status} >= failed
    assert ended["setup"] == 0 or word == "make setup"


def test_steps_can_be_chosen(script):
    code, ended, _ = script(LOWRANK_FAST_GPU_STEPS="info bench")
    assert code == 0 and list(ended) == ["info", "bench"]


def test_a_step_that_hangs_is_ended_and_the_next_one_runs(script):
    _, ended, _ = script(
        "lowrank_fast info", "sleep 60", LOWRANK_FAST_GPU_STEPS="info verify", LOWRANK_FAST_GPU_MINUTES="0.02"
    )
    assert ended == {"info": 124, "verify": 0}


def test_the_benchmark_runs_every_case_on_a_cpu_too(tmp_path, capsys):
    """The program that measures on a GPU, with a wall clock in the place of its events."""
    arguments = ["--device", "cpu", "--quick", "--samples", "2", "--only", "ours,addmm,naive", "--out", str(tmp_path)]
    assert measure.main(arguments) == 0
    records = read_jsonl(tmp_path / "cpu.jsonl")
    assert {(r["op"], r["routing"], r["direction"]) for r in records} == {
        (case.problem.op, case.problem.routing, case.direction) for case in measure.plan(quick=True)
    }
    assert all(r["status"] == "ok" and r["rounds"] == 2 and r["host_s"] > 0 for r in records)
    assert {"ours", "addmm", "naive"} == {r["provider"] for r in records}
    assert (tmp_path / "cpu.md").read_text() == capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_benchmark_says_what_is_missing_without_a_gpu(tmp_path, capsys):
    assert measure.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "measure: torch sees no CUDA GPU; --device cpu rehearses\n"
    assert not list(tmp_path.iterdir())
