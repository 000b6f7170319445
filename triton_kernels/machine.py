"""What a kernel became: ahead-of-time compilation without a driver, and what its machine code says.

`compile_launch(launch, architecture)` compiles exactly what that launch would run (same constants, same knowledge of
alignment). NVIDIA's architectures share the first step, from Python to Triton's own representation. `inspect` reads
registers, spills, shared memory, load widths, asynchronous copies, matrix instructions and atomics from the machine
code, with the disassembler in Triton's wheel, and the streams (loads marked `evict_first`) from the compiler's last
representation. It takes many launches, because the disassembler takes half a second to start.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Per multiprocessor (compute unit): shared memory, of which NVIDIA's system takes 1 KB per CTA, registers, threads,
# CTAs.
LIMITS = {
    "sm_80": (164 << 10, 65536, 2048, 32),
    "sm_89": (100 << 10, 65536, 1536, 24),
    "sm_90": (228 << 10, 65536, 2048, 32),
    "sm_100": (228 << 10, 65536, 2048, 32),
    "gfx942": (64 << 10, 131072, 2048, 32),
}
LARGEST_BLOCK = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}  # shared memory of a CTA
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8",
}  # fmt: skip


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Types, constants and alignments of a launch's arguments, as Triton's own launcher specialises them."""
    types: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    fixed = set(launch.kernel.do_not_specialize or ())
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.args[index] if index < len(launch.args) else launch.constants[name]
        one = isinstance(value, int) and value == 1 and name not in fixed
        if index >= len(launch.args) or value is None or one:
            types[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[name], attributes[(index,)] = "*" + _TYPES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and name not in fixed:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


class _Source(ASTSource):
    """A kernel's Python source, walked once for all of NVIDIA's architectures: what comes of it differs from AMD's
    alone."""

    walked: ClassVar[dict[str, str]] = {}

    def make_ir(self, target: GPUTarget, options: Any, *others: Any) -> Any:
        """The kernel as Triton's unoptimised representation, parsed where it has been seen before."""
        context = others[-1]
        if target.backend != "cuda":
            return super().make_ir(target, options, *others)
        key = self.hash()
        if key not in self.walked:
            module = super().make_ir(target, options, *others)
            self.walked[key] = str(module)
            return module
        with tempfile.NamedTemporaryFile("w", suffix=".mlir", encoding="utf-8") as file:
            file.write(self.walked[key])
            file.flush()
            module = ir.parse_mlir_module(file.name, context)
        module.context = context
        return module


def compile_launch(launch: Launch, architecture: str) -> Any:
    """The compiled kernel of a launch; needs no device and no driver."""
    source = _Source(launch.kernel, *signature(launch))
    return triton.compile(source, target=TARGETS[architecture], options=launch.options(architecture))


def _tool(name: str, binary: bytes, *arguments: str) -> str:
    folder = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [os.path.join(folder, name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _streams(ttgir: str) -> tuple[int, int]:
    """Of the loads marked `evict_first`: bytes per access of the narrowest, and how many are not asynchronous."""
    layouts = {
        name: [int(n) for n in sizes.split(",")]
        for name, sizes in re.findall(r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[([\d, ]+)\]", ttgir, re.MULTILINE)
    }
    narrowest, synchronous = 1 << 10, 0
    for line in ttgir.splitlines():
        if not re.search(r"tt\.load|async_copy_global_to_local|buffer_load", line):
            continue
        if not re.search(r"evict_first|evictionPolicy = 2", line):
            continue
        found = re.search(r"tensor<(?:\d+x)+!?(?:tt\.ptr<)?(\w+?)(\d+)>?, (#\w+)>", line)
        if found is None:
            continue
        contiguity = re.search(r"contiguity = (\d+)", line)
        elements = int(contiguity.group(1)) if contiguity else max(layouts.get(found.group(3), [1]))
        narrowest = min(narrowest, elements * int(found.group(2)) // 8, 16)
        synchronous += "async_copy" not in line
    return (0 if narrowest == 1 << 10 else narrowest), synchronous


def _code(cubin: bytes) -> bytes:
    """The machine code of a cubin with one kernel: its ELF section `.text.<name>`."""
    (headers,), (size, count, names) = struct.unpack_from("<Q", cubin, 40), struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + index * size) for index in range(count)]
    strings = sections[names][4]
    (code,) = [
        cubin[offset : offset + length]
        for name, _, _, _, offset, length in sections
        if cubin.startswith(b".text.", strings + name)
    ]
    return code


def disassemble(cubins: Sequence[bytes], architecture: str) -> list[str]:
    """The instructions of each cubin, one a line, from one run of the disassembler over all of their code."""
    codes = [_code(cubin) for cubin in cubins]
    suffix = "" if architecture in ("sm_80", "sm_89") else "a"
    listing = _tool("nvdisasm", b"".join(codes), "--binary", f"SM{architecture.removeprefix('sm_')}{suffix}")
    found: list[list[str]] = [[] for _ in codes]
    index, end = 0, len(codes[0])
    for line in listing.splitlines():
        address = re.match(r"\s+/\*([0-9a-f]+)\*/", line)
        if address is None:
            continue
        while int(address.group(1), 16) >= end:
            index += 1
            end += len(codes[index])
        found[index].append(line)
    return ["\n".join(lines) for lines in found]


def _nvidia(kernel: Any, sass: str) -> dict[str, Any]:
    usage = _tool("cuobjdump", kernel.asm["cubin"], "-res-usage")
    # Without Blackwell's allocation of tensor memory: bits of a shared-memory word, set and cleared.
    code = re.findall(
        r"^\s+(?:/\*\w+\*/)?\s*(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_]+)\b(?!\.(?:OR|AND) )", sass, re.MULTILINE
    )
    operations: Counter[str] = Counter(code)

    def total(*names: str) -> int:
        return sum(count for name, count in operations.items() if name in names)

    resources = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "registers": resources["REG"],
        "spills": resources["STACK"] + resources.get("LOCAL", 0),
        "local_accesses": total("LDL", "STL"),
        "async_copies": total("LDGSTS", "UBLKCP", "UTMALDG"),
        "tensor_ops": total("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "IMMA", "DMMA"),
        "atomics": total("ATOM", "ATOMG", "ATOMS", "RED", "REDG"),
    }


def _amd(kernel: Any) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found.group(1)) if found else 0

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.private_segment_fixed_size:\s+(\d+)") + 4 * number(r"\.vgpr_spill_count:\s+(\d+)"),
        "local_accesses": len(re.findall(r"\bscratch_(?:load|store)", text)),
        "async_copies": len(re.findall(r"\b(?:global|buffer)_load\w*.*\blds\b", text)),
        "tensor_ops": len(re.findall(r"\bv_mfma_", text)),
        "atomics": len(re.findall(r"\b(?:global|buffer|flat|ds)_(?:atomic|add_f|pk_add)", text)),
    }


def inspect(launches: Sequence[Launch], architecture: str) -> list[dict[str, Any]]:
    """Compile launches and read their machine code: see the keys below; sizes in bytes."""
    kernels = [compile_launch(launch, architecture) for launch in launches]
    if architecture == "gfx942":
        read = [_amd(kernel) for kernel in kernels]
    else:
        listings = disassemble([kernel.asm["cubin"] for kernel in kernels], architecture)
        read = [_nvidia(kernel, sass) for kernel, sass in zip(kernels, listings, strict=True)]
    return [_facts(*one, architecture) for one in zip(launches, kernels, read, strict=True)]


def _facts(launch: Launch, kernel: Any, facts: dict[str, Any], architecture: str) -> dict[str, Any]:
    shared = int(kernel.metadata.shared)
    memory, registers, threads, most = LIMITS[architecture]
    per_cta = launch.warps * TARGETS[architecture].warp_size
    by_registers = registers // (-(-max(facts["registers"], 1) // 8) * 8 * per_cta)
    narrowest, synchronous = _streams(kernel.asm["ttgir"])
    reserved = 0 if architecture == "gfx942" else 1 << 10
    facts.update(
        shared_bytes=shared,
        ctas_per_sm=max(0, min(memory // max(shared + reserved, 1), by_registers, threads // per_cta, most)),
        load_bytes=narrowest,
        synchronous_streams=synchronous,
        dots=len(
            re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma|tt\.dot_scaled) ", kernel.asm["ttgir"])
        ),
    )
    return facts
