"""Machine code of the shipped kernels, and the command that shows it. Compiled in a subprocess: this one interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from lowrank_fast import codegen
from lowrank_fast import triton_backend as backend

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    "kernel", "config", "arch", "registers", "spills", "shared_bytes", "ctas_per_sm", "bytes_in_flight", "load_bytes",
    "async_copies", "tensor_ops", "atomics", "dram_bytes", "model_seconds",
}  # fmt: skip
COMMAND = (
    "import argparse, sys; from lowrank_fast import codegen; parser = argparse.ArgumentParser(); "
    "codegen.add_arguments(parser); sys.exit(codegen.run(parser.parse_args()))"
)


def run_codegen(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables |= {"TRITON_DEFAULT_FP_FUSION": "1"} | environment
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--kernels", "triton", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )


def check(file: Path, architectures: set[str]) -> list[dict[str, object]]:
    rows = json.loads(file.read_text())["kernels"]
    assert {row["arch"] for row in rows} == architectures
    for row in rows:
        where = f"{row['kernel']} {row['config']} {row['arch']}"
        assert row.keys() >= KEYS, where
        assert row["spills"] == 0 and row["local_accesses"] == 0, where
        assert row["atomics"] == 0, where
        assert row["load_bytes"] in (0, 16), where
        assert row["synchronous_streams"] == 0 or row["arch"] == "gfx942", where
        assert row["tensor_ops"] > 0 or row["dots"] == 0, where
        assert row["ctas_per_sm"] >= 1, where
        long = any(f" T={T} " in row["config"] for T in (4096, 8192))
        thin = any(f" r={r} " in row["config"] for r in (8, 16, 32))
        if row["arch"] == "sm_90" and long and thin and row["load_bytes"]:
            assert row["bytes_in_flight"] >= 32 << 10, where
    return rows


def test_residual_add_on_one_architecture(tmp_path: Path) -> None:
    done = run_codegen("--quick", "--kernels", "triton", "--arch", "sm_90", "--json", str(tmp_path / "k.json"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check(tmp_path / "k.json", {"sm_90"})


@pytest.mark.slow
def test_every_kernel_on_every_architecture(tmp_path: Path) -> None:
    """All at once, because NVIDIA's architectures share the walk through the source; sm_89 is that of GeForce cards."""
    architectures = {"sm_80", "sm_89", "sm_90", "sm_100", "gfx942"}
    assert architectures == {*codegen.ARCHITECTURES, *codegen.ON_REQUEST}
    chosen = [f"--arch={name}" for name in (*codegen.ARCHITECTURES, *codegen.ON_REQUEST)]
    left_alone = ["--quick"]  # again, from the cache
    for arguments, expected in ((chosen, architectures), (left_alone, set(codegen.ARCHITECTURES))):
        done = run_codegen(*arguments, "--json", str(tmp_path / "k.json"), TRITON_CACHE_DIR=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        check(tmp_path / "k.json", expected)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_row_of_the_launch_table_is_compiled(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table = backend.kernels("table")
    chosen, plain = set(), table._row

    def noted(kernel: str, arch: str, size: int, width: int, bucket: int) -> object:
        tile = plain(kernel, arch, size, width, bucket)
        chosen.add((kernel, size, tile))
        return tile

    monkeypatch.setattr(table, "_row", noted)
    for config in codegen.configurations():
        codegen.launches(config, architecture)
    special = table._ARCHITECTURE_ROWS.get(architecture, {})
    half = architecture == "gfx942"
    for kernel, sizes in table._ROWS.items():
        for size, rows in sizes.items():
            first = special.get(kernel, {}).get(size, [])
            for widest, longest, tile in [*first, *rows]:
                if half:
                    tile = tile._replace(warps=tile.warps // 2, stages=2)
                hidden = any(widest <= w and longest <= n and tile is not one for w, n, one in first)
                assert hidden or (kernel, size, tile) in chosen, (kernel, size, widest, longest)


def test_the_interpreter_is_refused() -> None:
    done = run_codegen("--quick", TRITON_INTERPRET="1")
    assert done.returncode == 2
    reason = "TRITON_INTERPRET must not be 1: interpreted kernels cannot be compiled"
    assert done.stderr.strip() == f"lowrank-fast codegen: no triton kernels: {reason}"


def evaluated(code: str, **environment: str) -> str:
    """What `code` prints, in a process that does not interpret."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-c", "from lowrank_fast import codegen, triton_backend as b; " + code]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True).stdout


def fraction(config_text: str, launches: str, need: float) -> None:
    """The modelled fraction of the copy bandwidth, from formulas alone, is at least `need`."""
    found = evaluated(
        f"m = b.kernels('model'); c = {config_text}; found = codegen.launches(c, 'sm_90'); assert {launches}; "
        "total = sum(m.seconds(one, 'sm_90')[0] for one in found); print(3 * c.T * c.d * 2 / 3.0e12 / total)"
    )
    assert float(found) >= need, found


def test_kernels_that_are_disassembled_together_have_the_facts_of_each_alone() -> None:
    evaluated(
        "m = b.kernels('machine'); "
        "found = codegen.launches(codegen._config('residual', 'backward', 8192, 16), 'sm_90'); "
        "together = m.inspect(found, 'sm_90'); apart = [m.inspect([one], 'sm_90')[0] for one in found]; "
        "assert together == apart and len({str(facts) for facts in apart}) == len(found) == 3, (together, apart)"
    )


def test_a_source_walked_for_another_architecture_gives_the_same_machine_code() -> None:
    evaluated(
        "from triton import knobs; knobs.compilation.always_compile = True; m = b.kernels('machine'); "
        "found = codegen.launches(codegen._config('token', 'forward', 8192, 64, 'float32'), 'sm_90'); "
        "code = lambda one: m._code(m.compile_launch(one, 'sm_90').asm['cubin']); "
        "first = [code(one) for one in found]; walked = dict(m._Source.walked); m._Source.walked.clear(); "
        "[m.compile_launch(one, 'sm_80') for one in found]; assert m._Source.walked.keys() == walked.keys(); "
        "assert [code(one) for one in found] == first"
    )


FLOAT32_FACTS = """
m, found = b.kernels("machine"), []
for a in {architectures}:
    named = [(str(c), one) for c in codegen.configurations() if {chosen} for one in codegen.launches(c, a)]
    found += zip([name for name, _ in named], m.inspect([one for _, one in named], a), strict=True)
assert found
bad = [(c, one) for c, one in found if one["spills"] or one["local_accesses"] or one["tensor_ops"]]
assert not bad, bad
"""


def test_ieee_float32_is_no_matrix_instruction_and_not_taken_from_the_cache_of_the_other() -> None:
    chosen = "c.dtype == 'float32' and c.op == 'residual' and c.rank == 16 and c.T == 1024"
    evaluated(FLOAT32_FACTS.format(chosen=chosen, architectures=["sm_90"]), LOWRANK_FAST_TRITON_PRECISION="ieee")
    with pytest.raises(subprocess.CalledProcessError):
        evaluated(FLOAT32_FACTS.format(chosen=chosen, architectures=["sm_90"]))


@pytest.mark.slow
def test_no_ieee_float32_kernel_spills() -> None:
    chosen, architectures = "c.dtype == 'float32'", ["sm_80", "sm_90", "sm_100"]
    evaluated(FLOAT32_FACTS.format(chosen=chosen, architectures=architectures), LOWRANK_FAST_TRITON_PRECISION="ieee")


def test_an_unknown_way_to_multiply_float32_is_one_line() -> None:
    done = run_codegen("--quick", LOWRANK_FAST_TRITON_PRECISION="tf32")
    assert done.returncode == 2
    assert done.stderr.strip().endswith("LOWRANK_FAST_TRITON_PRECISION must be one of bf16x6, ieee; got 'tf32'")
    assert "Traceback" not in done.stderr


def test_a_crash_of_the_compiler_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = codegen._config("residual", "forward", 128, 16)
    monkeypatch.setattr(codegen, "ProcessPoolExecutor", Crashing)
    monkeypatch.setattr(codegen, "_shares", lambda *_: [[codegen.Task("sm_90", [0], [(config, 0)])]])
    with pytest.raises(RuntimeError, match="crashed at or soon after residual_add_kernel, residual forward T=128"):
        codegen.compile_all([config], ["sm_90"], 1)


class Crashing:
    """A pool whose worker died."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Crashing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *_: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_exception(BrokenProcessPool())
        return future


def test_modelled_forward_reaches_85_percent_of_the_copy_bandwidth() -> None:
    fraction("codegen._config('residual', 'forward', 8192, 16)", "len(found) == 1", 0.85)


def test_modelled_backward_reaches_75_percent_of_the_copy_bandwidth() -> None:
    fraction("codegen._config('residual', 'backward', 8192, 16)", "len(found) == 3", 0.75)
