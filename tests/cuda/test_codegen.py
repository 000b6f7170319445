"""The machine code of the CUDA kernels: what nvcc made of them, asserted without a GPU.

The default part compiles bfloat16 and rank <= 16 for sm_80 (half a minute); the slow part compiles every architecture.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lowrank_fast import cuda_build
from lowrank_fast.cuda_build import KernelFacts

ROOT = Path(__file__).parent.parent.parent
TENSOR_CORE_KERNELS = ("row_kernel", "column_kernel", "cluster_backward_kernel")

needs_tools = pytest.mark.skipif(
    cuda_build.find_nvcc() is None or cuda_build.find_binary_tool("cuobjdump") is None,
    reason="needs nvcc and cuobjdump",
)


def compiled(folder: Path, arch: str, *flags: str) -> list[KernelFacts]:
    nvcc = cuda_build.find_nvcc()
    assert nvcc is not None
    target = folder / f"{arch}.o"
    command = cuda_build.compile_command(nvcc, arch, ROOT / "csrc" / "cuda" / "kernels.cu", target)
    subprocess.run([*command, *flags], check=True, capture_output=True)
    return cuda_build.kernel_facts(target, arch)


def assert_good(facts: list[KernelFacts]) -> None:
    assert facts
    for kernel in facts:
        where = f"{kernel.name} on sm_{kernel.arch}"
        assert kernel.stack == 0, f"{where}: {kernel.stack} bytes of stack (spills or indexed arrays)"
        assert kernel.count("ATOM") == kernel.count("RED.") == 0, f"{where}: atomics"
        assert kernel.registers <= 255
        if not kernel.name.startswith(TENSOR_CORE_KERNELS):
            continue
        wide_copies = sum(
            n for opcode, n in kernel.instructions.items() if opcode.startswith("LDGSTS") and ".128" in opcode
        )
        assert wide_copies > 0, f"{where}: no 16-byte asynchronous loads"
        assert kernel.count("LDGSTS") == wide_copies, f"{where}: narrow asynchronous loads"
        if "<float" not in kernel.name:
            assert kernel.count("HMMA") > 0 and kernel.count("LDSM") > 0, f"{where}: no tensor cores"
        if kernel.name.startswith("row_kernel"):
            assert any(opcode.startswith("STG.E.128") for opcode in kernel.instructions), f"{where}: no 16-byte stores"


@needs_tools
def test_bfloat16_kernels_for_sm80(tmp_path):
    facts = compiled(tmp_path, "80", "-DLOWRANK_SMALL_BUILD")
    assert_good(facts)
    assert {kernel.name.split("<")[0] for kernel in facts} >= {
        "row_kernel",
        "column_kernel",
        "sum_kernel",
        "softmax_kernel",
    }


@needs_tools
def test_the_primitives_compile_to_the_instructions_they_stand_for(tmp_path):
    """The PTX bodies never run here, so their machine code is pinned."""
    source = tmp_path / "primitives.cu"
    source.write_text(
        '#define LOWRANK_ARCH sm_90\n#include "simt.cuh"\nusing namespace lowrank::LOWRANK_ARCH;\n'
        "__global__ void probe(char* p, float* f) {\n"
        "  char* s = shared_memory(); uint32_t r[4], q[4]; float c[4] = {f[0], f[1], f[2], f[3]};\n"
        "  cp_async_16(s + 16 * thread_id(), p + 16 * thread_id(), static_cast<int>(f[4]));\n"
        "  cp_async_commit(); cp_async_wait<0>(); sync_block();\n"
        "  ldmatrix_x4(r, s + 16 * lane_id()); ldmatrix_x4_trans(q, s + 16 * lane_id());\n"
        "  mma_bf16(c, r, q[0], q[1]); mma_f16(c, r, q[2], q[3]);\n"
        "  sync_cluster(); Vec16 v = load16_cluster(s + 16 * lane_id(), 1 - cluster_rank()); sync_cluster();\n"
        "  f[thread_id()] = shuffle_xor(c[0] + c[1] + c[2] + c[3], 1); store16(p + 16 * thread_id(), v);\n"
        "  f[thread_id() + 99] = to_float(rounded<Bf16>(c[0])) + to_float(rounded<F16>(c[1]));\n}\n"
    )
    nvcc = cuda_build.find_nvcc()
    target = tmp_path / "primitives.o"
    include = f"-I{ROOT / 'csrc' / 'cuda'}"
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-gencode",
        "arch=compute_90,code=sm_90",
        include,
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (probe,) = cuda_build.kernel_facts(target, "90")
    expected = {
        "LDGSTS": 1, "LDGDEPBAR": 1, "DEPBAR": 1, "LDSM.16.M88.4": 1, "LDSM.16.MT88.4": 1, "HMMA.16816.F32.BF16": 1,
        "HMMA.16816.F32": 2, "UCGABAR_ARV": 2, "UCGABAR_WAIT": 2, "LD.E.128": 1, "SHFL.BFLY": 1, "STG.E.128": 1,
        "F2F.BF16.F32": 1, "F2FP.F16.F32": 1,
    }  # fmt: skip
    assert {opcode: probe.count(opcode) for opcode in expected} == expected


@needs_tools
@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", cuda_build.ARCHITECTURES)
def test_every_kernel_on_every_architecture(tmp_path, arch):
    facts = compiled(tmp_path, arch)
    assert_good(facts)
    clusters = [kernel for kernel in facts if kernel.name.startswith("cluster_backward_kernel")]
    assert len(clusters) == (6 if int(arch.removesuffix("a")) >= 90 else 0)
