"""The machine code of the CUDA kernels: what nvcc made of them, asserted without a GPU.

The fast part compiles bfloat16 and rank <= 16 for sm_80; the slow part compiles and checks all that ships.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import product
from pathlib import Path

import pytest

from lowrank_fast import codegen, cuda_build, cuda_codegen

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "csrc" / "cuda"

needs_tools = pytest.mark.skipif(
    cuda_codegen.unavailable_reason() is not None, reason=str(cuda_codegen.unavailable_reason())
)


def assert_good(kernel: cuda_codegen.KernelFacts) -> None:
    where = f"{kernel.name} on sm_{kernel.arch}"
    assert kernel.stack == 0 and kernel.count("LDL", "STL") == 0, f"{where}: spills or indexed arrays"
    assert kernel.count("ATOM", "RED.") == 0, f"{where}: atomics"
    if not kernel.name.startswith(cuda_codegen.STREAMING):
        return
    copies = {opcode: n for opcode, n in kernel.instructions.items() if opcode.startswith("LDGSTS")}
    assert copies and all(".128" in opcode for opcode in copies), f"{where}: asynchronous loads {copies}"
    if "<float" not in kernel.name:
        assert kernel.count("HMMA") > 0 and kernel.count("LDSM") > 0, f"{where}: no tensor cores"
    if kernel.name.startswith("row_kernel"):
        assert kernel.count("STG.E.128") > 0, f"{where}: no 16-byte stores"


@needs_tools
def test_bfloat16_kernels_for_sm80(tmp_path):
    target = tmp_path / "small.o"
    command = cuda_build.compile_command(cuda_build.find_nvcc(), "80", SOURCE / "kernels.cu", target)
    subprocess.run([*command, "-DLOWRANK_SMALL_BUILD"], check=True, capture_output=True)
    facts = cuda_codegen.kernel_facts(target, "80")
    for kernel in facts:
        assert_good(kernel)
    names = {kernel.name.split("<")[0] for kernel in facts}
    assert names >= {"row_kernel", "column_kernel", "sum_kernel", "softmax_kernel"}


PROBE = """
#include "simt.cuh"
using namespace lowrank::LOWRANK_ARCH;
__global__ void probe(char* p, float* f) {
  char* s = shared_memory();
  const int i = thread_id();
  uint32_t r[4], q[4];
  float c[4] = {f[0], f[1], f[2], f[3]};
  cp_async_16(s + 16 * i, p + 16 * i, static_cast<int>(f[4]));
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  ldmatrix_x4(r, s + 16 * lane_id());
  ldmatrix_x4_trans(q, s + 16 * lane_id());
  mma_bf16(c, r, q[0], q[1]);
  mma_f16(c, r, q[2], q[3]);
  f[i] = shuffle_xor(c[0] + c[1] + c[2] + c[3], 1);
  f[i + 99] = to_float(rounded<Bf16>(c[0])) + to_float(rounded<F16>(c[1])) + exponential(c[2]);
  store16(p + 16 * i, load16(p + 4096 + 16 * i));
#ifdef LOWRANK_CLUSTERS
  sync_cluster();
  store16(p + 8192 + 16 * i, load16_cluster(s + 16 * lane_id(), 1 - cluster_rank()));
  sync_cluster();
#endif
}
"""
INSTRUCTIONS = {
    "LDGSTS.E.BYPASS.128.ZFILL": 1, "LDGDEPBAR": 1, "DEPBAR": 1, "LDSM.16.M88.4": 1, "LDSM.16.MT88.4": 1,
    "HMMA.16816.F32.BF16": 1, "HMMA.16816.F32": 2, "SHFL.BFLY": 1, "LDG.E.128": 1, "STG.E.128": 1, "F2F.BF16.F32": 1,
    "F2FP": 1, "HADD2.F32": 1, "MUFU.EX2": 1, "UCGABAR_ARV": 0, "UCGABAR_WAIT": 0, "LD.E.128": 0, "MEMBAR": 0,
    "ATOM": 0, "RED": 0,
}  # fmt: skip
# A cluster's barrier releases and acquires: a fence on either side of the wait. Its memory is reached by a plain load.
CLUSTER_INSTRUCTIONS = INSTRUCTIONS | {
    "STG.E.128": 2, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2, "LD.E.128": 1, "MEMBAR": 2,
}  # fmt: skip


@needs_tools
@pytest.mark.parametrize("arch", cuda_build.ARCHITECTURES)
def test_the_primitives_compile_to_the_instructions_they_stand_for(tmp_path, arch):
    """The PTX bodies never run here, so their machine code is pinned, for every architecture that ships."""
    source, target = tmp_path / "primitives.cu", tmp_path / "primitives.o"
    source.write_text(PROBE)
    command = cuda_build.compile_command(cuda_build.find_nvcc(), arch, source, target)
    subprocess.run([*command, f"-I{SOURCE}"], check=True, capture_output=True)
    (probe,) = cuda_codegen.kernel_facts(target, arch)
    expected = CLUSTER_INSTRUCTIONS if cuda_build.number(arch) >= 90 else INSTRUCTIONS
    assert {opcode: probe.count(opcode) for opcode in expected} == expected


@pytest.fixture(scope="module")
def every_kernel() -> dict[str, dict[str, cuda_codegen.KernelFacts]]:
    return cuda_codegen.compiled_facts(jobs=os.cpu_count() or 1)


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("arch", cuda_build.ARCHITECTURES)
def test_every_kernel_on_every_architecture(every_kernel, arch):
    kernels = every_kernel[arch].values()
    for kernel in kernels:
        assert_good(kernel)
    has_clusters = cuda_build.number(arch) >= 90
    for pattern, count in ((r"cluster_backward_kernel<", 6), (r"column_kernel<\w+, \d+, 3>", 12)):
        found = [kernel for kernel in kernels if re.match(pattern, kernel.name)]
        assert len(found) == count * has_clusters
        assert all(kernel.count("UCGABAR_WAIT") >= 2 for kernel in found)


@needs_tools
@pytest.mark.slow
def test_the_rows_of_the_table_are_sound_and_have_the_columns_of_triton(every_kernel):
    rows = cuda_codegen.rows(every_kernel, [*codegen.configurations(), *cuda_codegen.configurations()])
    for arch, kernels in every_kernel.items():
        listed = {row["kernel"] for row in rows if row["arch"] == f"sm_{cuda_build.number(arch)}"}
        assert listed == kernels.keys(), arch
    for row in rows:
        assert set(codegen.COLUMNS) <= row.keys()
        assert cuda_codegen.faults(row) == [], row
        assert row["bytes_in_flight"] > 0 or not row["kernel"].startswith(cuda_codegen.STREAMING)


@needs_tools
@pytest.mark.slow
def test_the_tuning_comments_say_what_the_compiler_made(every_kernel):
    """Shared memory of the plans and registers of the machine code; register counts are those of nvcc 13.0."""
    nvcc = subprocess.run([cuda_build.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    if "release 13.0" not in nvcc:
        pytest.skip("the comments are about nvcc 13.0")
    number = r"(\d+|-)"
    line = re.compile(rf"^//   (\w+<Bf16[\d, ]+>)\s+(\d+)\s+{number}, {number}, {number}$", re.MULTILINE)
    said = {}
    for path in SOURCE.glob("*.cuh"):
        for kernel, shared, *registers in line.findall(path.read_text()):
            for arch, count in zip(("sm_80", "sm_90", "sm_100"), registers, strict=True):
                if count != "-":
                    said[kernel, arch] = int(shared), int(count)
    rows = cuda_codegen.rows(every_kernel, [*codegen.configurations(), *cuda_codegen.configurations()])
    made = {(row["kernel"], row["arch"]): (row["shared_bytes"], row["registers"]) for row in rows}
    streaming = {key for key in made if key[0].startswith(cuda_codegen.STREAMING) and "<Bf16" in key[0]}
    assert said == {key: made[key] for key in streaming if key[1] in ("sm_80", "sm_90", "sm_100")}


def plan(config: str, arch: str) -> list[cuda_codegen.Launch]:
    (found,) = {c for c in [*codegen.configurations(), *cuda_codegen.configurations()] if str(c) == config}
    return cuda_codegen.launches(found, arch)


@needs_tools
def test_a_plan_for_sm90_takes_one_cluster_launch_and_one_for_sm80_two_passes():
    config = "residual backward T=8192 d=4096 r=16 bfloat16"
    assert [launch.name for launch in plan(config, "80")] == ["gradient pass", "sum", "sum", "input pass", "sum"]
    assert [launch.name for launch in plan(config, "90a")] == ["cluster backward", "sum", "sum"]


@needs_tools
@pytest.mark.parametrize("arch", ["90a", "100a"])
@pytest.mark.parametrize(
    ("op", "rank"), [*product(("residual", "batch", "static"), (16, 32, 64, 128)), ("token", 16)], ids=str
)
def test_a_backward_in_clusters_moves_less_than_one_on_sm80(arch, op, rank):
    """By the model, in passes over [T, d]: g, x and dx, and what grows with the rank: factors, t, u and partials."""
    config = f"{op} backward T=8192 d=4096 r={rank} bfloat16" + ("" if op == "residual" else " E=4 on t")
    passes, without = (sum(launch.dram_bytes for launch in plan(config, a)) / (8192 * 4096 * 2) for a in (arch, "80"))
    assert 3.0 < passes < without - 0.05
    assert rank > 16 or passes < (4.0 if op == "token" else 3.5)  # its bank has rank 64


# ------------------------------------------------------------------------------------------------ what is compiled


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """A compiler that knows sm_80, sm_86 and sm_90, and "compiles" its command line."""
    path = tmp_path / "nvcc"
    path.write_text(
        '#!/bin/sh\ncase "$1" in --list-gpu-code) printf "sm_80\\nsm_86\\nsm_90\\n" ;; --version) echo 1 ;;\n'
        '*) while [ "$1" != -o ]; do shift; done; echo "object" > "$2" ;; esac\n'
    )
    path.chmod(0o755)
    monkeypatch.setenv("LOWRANK_FAST_NVCC", str(path))
    monkeypatch.delenv("LOWRANK_FAST_CUDA_ARCHS", raising=False)
    return str(path)


def test_the_default_architectures_are_those_that_the_compiler_knows(fake_nvcc):
    assert cuda_build.architectures(fake_nvcc) == ["80", "86", "90a"]


def test_architectures_can_be_chosen_and_unknown_ones_are_errors(fake_nvcc, monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_CUDA_ARCHS", "90a, 80")
    assert cuda_build.architectures(fake_nvcc) == ["80", "90a"]
    for wrong in ("80;120", "sm_80", "80+PTX"):
        monkeypatch.setenv("LOWRANK_FAST_CUDA_ARCHS", wrong)
        with pytest.raises(
            RuntimeError, match=r"LOWRANK_FAST_CUDA_ARCHS: .* does not compile for .*; it knows 80, 86, 90"
        ):
            cuda_build.architectures(fake_nvcc)


def test_only_the_newest_architecture_carries_ptx(fake_nvcc, tmp_path, monkeypatch):
    commands = []
    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: commands.append(command) or real(command, **kw))
    cuda_build.compile_kernels(ROOT, tmp_path / "build", jobs=1)
    ptx = [command for command in commands if "code=compute_90" in " ".join(command)]
    assert len(ptx) == 1 and "arch=compute_90a,code=sm_90a" in ptx[0]
    header = (tmp_path / "build" / "architectures.h").read_text()
    assert "LOWRANK_TABLE(86, sm_86) LOWRANK_TABLE(90, sm_90a)" in header


def test_objects_are_kept_until_sources_or_command_change(fake_nvcc, tmp_path, monkeypatch):
    build = tmp_path / "build"
    first = cuda_build.compile_kernels(ROOT, build, jobs=1)
    first[0].write_text("kept")
    assert cuda_build.compile_kernels(ROOT, build, jobs=1) == first and first[0].read_text() == "kept"
    shutil.copytree(ROOT / "csrc" / "cuda", tmp_path / "tree" / "csrc" / "cuda")
    shutil.copy(fake_nvcc, tmp_path / "tree" / "nvcc")  # the same compiler and sources in another place
    monkeypatch.setenv("LOWRANK_FAST_NVCC", str(tmp_path / "tree" / "nvcc"))
    assert cuda_build.compile_kernels(tmp_path / "tree", build, jobs=1) == first and first[0].read_text() == "kept"
    monkeypatch.setenv("LOWRANK_FAST_CUDA_ARCHS", "80")  # the newest now: with PTX
    (other,) = cuda_build.compile_kernels(ROOT, build, jobs=1)
    assert other != first[0] and not first[0].exists()


def test_a_compiler_that_is_named_and_missing_is_not_replaced_by_another(monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_NVCC", "/nonexistent/nvcc")
    assert cuda_build.find_nvcc() is None
