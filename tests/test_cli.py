"""The command `lowrank-fast`: what it prints, what it returns, and what it says when it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
import types

import pytest
import torch

import lowrank_fast
from lowrank_fast import _native, backends, cli, fallback, info, verify

from .support.process import run_python


@pytest.fixture
def few_problems(monkeypatch):
    """A verification of two problems instead of hundreds."""
    shape = verify.Shape((2, 9), 21, 13, 3, 4)
    chosen = [
        verify.Problem("residual_add", torch.float32, torch.float32, shape),
        verify.Problem("routed_projection", torch.bfloat16, torch.float32, shape, "token", "x"),
    ]
    monkeypatch.setattr(verify, "problems", lambda quick: iter(chosen))


@pytest.fixture
def broken(monkeypatch):
    """A "reference" backend whose residual add is off by one."""
    original = fallback.residual_add
    monkeypatch.setattr(fallback, "residual_add", lambda *a: (original(*a)[0] + 1.0, original(*a)[1]))


# ------------------------------------------------------------------------------------------------ the command


@pytest.mark.parametrize("command", [["--help"], ["info", "--help"], ["verify", "--help"]])
def test_help_ends_with_status_zero(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(command)
    assert ended.value.code == 0
    assert "usage: lowrank-fast" in capsys.readouterr().out


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_fast", "--version"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.strip() == f"lowrank-fast {lowrank_fast.__version__}"


def test_help_imports_neither_the_benchmark_nor_rich():
    code = """
import sys
from lowrank_fast import cli
try:
    cli.main(["--help"])
except SystemExit:
    pass
print(sorted({"rich", "matplotlib", "transformers", "lowrank_fast.bench", "lowrank_fast.verify"} & set(sys.modules)))
"""
    assert run_python(code).stdout.splitlines()[-1] == "[]"


def test_an_unknown_command_or_no_command_has_status_two(capsys):
    for arguments in ([], ["frobnicate"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 2


# ------------------------------------------------------------------------------------------------ info


def test_info_json_states_versions_backends_and_isa(capsys):
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["lowrank_fast"] == lowrank_fast.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == {name: backends.unavailable_reason(name) for name in backends.NAMES}
    assert facts["cpu"]["model"]
    if _native.module() is None:
        assert facts["cpu"]["isa"] is None
        assert facts["extension"]["missing"]
    else:
        assert facts["cpu"]["isa"] in facts["cpu"]["isas"]
        assert "baseline" in facts["cpu"]["isas"]
        assert facts["extension"]["build"]["compiler"]


def test_info_prints_the_reason_for_each_missing_backend(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    for name in backends.NAMES:
        assert name in printed
        assert (backends.unavailable_reason(name) or "available") in printed


def test_info_without_the_extension_says_why(monkeypatch, capsys):
    monkeypatch.setattr(_native, "_module", None)
    monkeypatch.setattr(_native, "_reason", "the C++ extension is not built")
    facts = info.collect()
    assert facts["cpu"]["isa"] is None
    assert facts["cpu"]["isas"] == []
    assert facts["backends"]["cpu"] == "the C++ extension is not built"
    assert cli.main(["info"]) == 0
    assert "the C++ extension is not built" in capsys.readouterr().out


def test_info_shows_the_variables_that_are_set(monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_CPU_ISA", "baseline")
    assert info.collect()["environment"]["LOWRANK_FAST_CPU_ISA"] == "baseline"


UNKNOWN = "LOWRANK_FAST_BACKEND=nonsense: backend must be one of 'cuda', 'triton', 'cpu', 'reference'; got 'nonsense'"
WRONG = [
    ("LOWRANK_FAST_BACKEND", "nonsense", UNKNOWN),
    ("LOWRANK_FAST_BACKEND", "cuda", "LOWRANK_FAST_BACKEND=cuda: backend 'cuda' is not available: "),
    ("LOWRANK_FAST_CPU_ISA", "avx1024", "LOWRANK_FAST_CPU_ISA must be one of those this CPU runs (baseline"),
]


EVERY_COMMAND = """
from lowrank_fast import cli
for command in ("info", "verify --quick", "bench --suite ops"):
    print("status", cli.main(command.split()))
"""


@pytest.mark.parametrize(("variable", "value", "says"), WRONG, ids=lambda text: text[:24])
def test_a_wrong_environment_is_one_line_and_status_two(variable, value, says):
    if variable == "LOWRANK_FAST_CPU_ISA" and _native.module() is None:
        pytest.skip("without the C++ extension the variable means nothing")
    if value in backends.available():
        pytest.skip(f"{value} runs here")
    result = run_python(EVERY_COMMAND, **{variable: value})
    shown, *others = result.stdout.split("status 2\n")
    assert "available" in shown and others == ["", "", ""], "info still says what there is, the others say nothing"
    errors = result.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith(f"lowrank-fast: {says}") for line in errors), errors


def test_an_interrupted_command_has_status_130_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(info, "collect", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "lowrank-fast: interrupted\n"


# ------------------------------------------------------------------------------------------------ verify


def test_verify_passes_and_prints_a_row_for_each_op_and_backend(few_problems, capsys):
    assert cli.main(["verify"]) == 0
    printed = capsys.readouterr().out
    for name in backends.available():
        assert any("residual_add" in line and f" {name} " in line for line in printed.splitlines())
        assert any("routed_projection token on x" in line and f" {name} " in line for line in printed.splitlines())
    assert " 0 failed in " in printed


def test_verify_of_a_broken_backend_has_status_one_and_names_the_case(few_problems, broken, capsys):
    assert cli.main(["verify", "--backend", "reference"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED residual_add, reference, fp32, parameters fp32, forward, plain" in printed
    assert "out: relative error" in printed


def test_verify_json_prints_nothing_but_json_and_the_same_verdict(few_problems, broken, capsys):
    assert cli.main(["verify", "--json", "--backend", "reference"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["verified_backends"] == ["reference"]
    assert report["failed"] == sum(not case["passed"] for case in report["cases"]) > 0
    assert report["passed"] + report["failed"] == len(report["cases"])
    assert {case["op"] for case in report["cases"] if not case["passed"]} == {"residual_add"}


def test_verify_json_to_a_file_also_prints_the_table(few_problems, tmp_path, capsys):
    target = tmp_path / "new" / "verify.json"
    assert cli.main(["verify", "--backend", "reference", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["failed"] == 0
    assert [path.name for path in target.parent.iterdir()] == ["verify.json"]
    assert "residual_add" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [("{tmp}", "Is a directory: '{tmp}'"), ("{tmp}/file/x.json", "'{tmp}/file"), ("", "Is a directory: ''")],
    ids=["folder", "below a file", "empty"],
)
def test_verify_of_an_unwritable_file_has_status_two_before_any_work(name, says, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(verify, "run", lambda *_: pytest.fail("must not run"))
    (tmp_path / "file").write_text("a file where a folder must be")
    assert cli.main(["verify", "--json", name.format(tmp=tmp_path)]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("lowrank-fast: [Errno ") and said.err.count("\n") == 1
    assert says.format(tmp=tmp_path) in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_verification_that_breaks_off_leaves_the_old_file_and_no_other(monkeypatch, tmp_path):
    target = tmp_path / "verify.json"
    target.write_text("old")
    monkeypatch.setattr(verify, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["verify", "--json", str(target)]) == 130
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("verify.json", "old")]


def test_verify_of_a_missing_backend_has_status_two_and_says_why(monkeypatch, capsys):
    monkeypatch.setitem(backends._REASONS, "triton", lambda: "no GPU is visible")
    assert cli.main(["verify", "--backend", "triton"]) == 2
    assert capsys.readouterr().err == "lowrank-fast: backend 'triton' is not available: no GPU is visible\n"


# ------------------------------------------------------------------------------------------------ bench


@pytest.mark.parametrize("when", ["imported", "run"])
def test_bench_without_an_optional_package_says_what_to_install(when, monkeypatch, capsys):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    suite = types.SimpleNamespace(add_arguments=lambda parser: None, run=missing)
    monkeypatch.setattr(cli.importlib, "import_module", missing if when == "imported" else lambda name: suite)
    assert cli.main(["bench"]) == 2
    said = capsys.readouterr().err
    assert said == "lowrank-fast: bench needs the package 'matplotlib': pip install 'lowrank-fast[bench]'\n"


def test_bench_passes_its_options_to_the_suite_and_returns_its_status(monkeypatch):
    seen = []

    def run(options):
        seen.append(options.minutes)
        return 1

    suite = types.SimpleNamespace(add_arguments=lambda parser: parser.add_argument("--minutes", type=int), run=run)
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: suite)
    assert cli.main(["bench", "--minutes", "7"]) == 1
    assert seen == [7]


@pytest.mark.parametrize(("command", "option"), [("bench", "--suite"), ("codegen", "--arch")])
def test_a_delegated_command_has_the_options_of_its_module(command, option, capsys):
    pytest.importorskip(cli.DELEGATED[command][0], exc_type=ModuleNotFoundError)
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert option in capsys.readouterr().out
