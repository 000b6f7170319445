"""What nvcc made of the CUDA kernels: the rows of `lowrank-fast codegen` for them. No GPU needed.

Machine code comes from the objects that the build compiles (`cuda_build.compile_kernels`), read with cuobjdump; grids,
shared memory and bytes from `csrc/cuda/record_plan.cpp`, the launch plans compiled for the host with a launch that
prints. Both need the sources, which a checkout has and a wheel has not.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from . import cuda_build

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "cuda"
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
STREAMING = ("row_kernel", "column_kernel", "cluster_backward_kernel")  # those that read or write [T, d]


class Processor(NamedTuple):
    """What bounds a kernel on one architecture, per streaming multiprocessor unless said otherwise."""

    shared: int  # bytes, of which the system takes 1 KB per block
    block_shared: int  # bytes that one block may have
    threads: int
    blocks: int
    processors: int  # of the part that most users have
    bandwidth: float  # bytes per second of a copy on that part


# A100, RTX 3090, RTX 4090, H100, B200. Bandwidth: nine tenths of the data sheet, as in triton_kernels/model.py.
PROCESSORS = {
    "80": Processor(164 << 10, 163 << 10, 2048, 32, 108, 1.8e12),
    "86": Processor(100 << 10, 99 << 10, 1536, 16, 82, 0.84e12),
    "89": Processor(100 << 10, 99 << 10, 1536, 24, 128, 0.9e12),
    "90a": Processor(228 << 10, 227 << 10, 2048, 32, 132, 3.0e12),
    "100a": Processor(228 << 10, 227 << 10, 2048, 32, 148, 7.2e12),
}
REGISTERS = 65536
ARCHITECTURES = tuple(f"sm_{cuda_build.number(name)}" for name in PROCESSORS)


# ------------------------------------------------------------------------------------------------ machine code


@dataclass
class KernelFacts:
    """What the compiler made of one kernel."""

    name: str  # such as row_kernel<Bf16, 16, 64>
    arch: str
    registers: int
    stack: int  # bytes per thread; 0: nothing spilled, nothing indexed in memory
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, *prefixes: str) -> int:
        """How many instructions have an opcode that begins with one of `prefixes`."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefixes))


def find_binary_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from the PATH, beside nvcc, or from the Triton wheel."""
    candidates = [shutil.which(name)]
    nvcc = cuda_build.find_nvcc()
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent / name))
    candidates += [str(Path(folder) / "triton" / "backends" / "nvidia" / "bin" / name) for folder in sys.path]
    return next((path for path in candidates if path and Path(path).exists()), None)


def demangled(names: Sequence[str]) -> list[str]:
    """The names of kernels without namespaces and parameters, the same for machine code and for the host build."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    return [re.sub(r"void |lowrank::\w+::|\(int\)|(?<=>)\(.*", "", name) for name in done.stdout.splitlines()]


def kernel_facts(object_file: Path, arch: str) -> list[KernelFacts]:
    """Registers, stack and the histogram of machine instructions of every kernel in an object file, by name."""
    tool = find_binary_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton")
    usage, listing = (
        subprocess.run([tool, option, str(object_file)], capture_output=True, text=True).stdout
        for option in ("-res-usage", "-sass")
    )
    facts: dict[str, KernelFacts] = {}
    for match in re.finditer(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+)", usage):
        facts[match.group(1)] = KernelFacts(match.group(1), arch, int(match.group(2)), int(match.group(3)))
    current: KernelFacts | None = None
    for line in listing.splitlines():
        if "Function :" in line:
            current = facts.get(line.split(":")[1].strip())
        elif current is not None:
            opcode = re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)
            if opcode:
                current.instructions[opcode.group(1)] += 1
    for fact, name in zip(facts.values(), demangled(list(facts)), strict=True):
        fact.name = name
    return sorted(facts.values(), key=lambda fact: fact.name)


def compiled_facts(jobs: int) -> dict[str, dict[str, KernelFacts]]:
    """Every shipped kernel by architecture and name. Compiles what has changed: minutes the first time."""
    objects = cuda_build.compile_kernels(ROOT, BUILD, jobs)
    names = [re.match(r"sm_(\w+)-", path.name)[1] for path in objects]  # type: ignore[index]
    with ThreadPoolExecutor(jobs) as pool:
        found = list(pool.map(kernel_facts, objects, names))
    return {arch: {fact.name: fact for fact in facts} for arch, facts in zip(names, found, strict=True)}


# ------------------------------------------------------------------------------------------------ launches


class Launch(NamedTuple):
    """One launch of a plan, as `record_plan` prints it."""

    kernel: str
    name: str
    grid: tuple[int, int, int]
    threads: int
    cluster: int
    shared_bytes: int
    block_in_flight: int
    dram_bytes: float
    read_again: float


def recorder() -> Path:
    """The program `record_plan`, compiled when its sources have changed."""
    folder, interface = ROOT / "csrc" / "cuda", ROOT / "tests" / "simt"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.cuh"), folder / "types.h", folder / "record_plan.cpp"]):
        digest.update(path.read_bytes())
    target = BUILD / f"record_plan-{digest.hexdigest()[:16]}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob("record_plan-*"):
            old.unlink()
        command = [os.environ.get("CXX", "c++"), "-std=c++17", "-O0", "-rdynamic", f"-I{interface}", f"-I{folder}"]
        command += [str(folder / "record_plan.cpp"), "-o", str(target.with_suffix(".partial")), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        os.replace(target.with_suffix(".partial"), target)
    return target


def launches(config: Any, arch: str) -> list[Launch]:
    """What a `codegen.Config` launches on the part of PROCESSORS with the architecture `arch`."""
    part = PROCESSORS[arch]
    numbers = [config.T, config.d, config.rank, config.experts, DTYPES[config.dtype]]
    numbers += [int(config.parameter == "float32"), int(config.router_input == "x"), int(config.dropout)]
    numbers += [part.processors, part.block_shared, int(cuda_build.number(arch) >= 90)]
    command = [str(recorder()), config.op, config.direction, *map(str, numbers)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = [line.split("\t") for line in lines]
    kernels = demangled([row[0] for row in rows])
    return [
        Launch(kernel, row[1], (int(row[2]), int(row[3]), int(row[4])), *map(int, row[5:9]), *map(float, row[9:]))
        for kernel, row in zip(kernels, rows, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ the table


def configurations() -> list[Any]:
    """Calls that launch every kernel that ships: each dtype, each rank of the templates, few rows and many."""
    from .codegen import Config  # which imports this module

    def call(op: str, direction: str, T: int, rank: int, dtype: str) -> Config:
        return Config(op, direction, T, 4096, rank, 4, dtype, dtype, "t", False)

    found = []
    for dtype in DTYPES:
        for rank in (16, 32, 64, 128):
            found += [call("residual", "forward", T, rank, dtype) for T in (128, 16384)]
            found += [call(op, "backward", 8192, rank, dtype) for op in ("residual", "batch", "static", "dB")]
            found.append(call("residual", "backward", 8192, rank, dtype)._replace(d=1024))
        found += [call("batch", "forward", 8192, 16, dtype), call("token", "backward", 8192, 16, dtype)]
    return found


def unavailable_reason() -> str | None:
    """Why there are no CUDA rows here, in one line; None when there are."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "the CUDA sources are not installed with the package; run it in a checkout"
    if cuda_build.find_nvcc() is None:
        return cuda_build.NO_NVCC
    if find_binary_tool("cuobjdump") is None:
        return "no cuobjdump: install the CUDA toolkit or triton"
    missing = [tool for tool in ("c++", "c++filt") if shutil.which(tool) is None]
    return f"no {missing[0]}: install a C++ compiler and binutils" if missing else None


def row(fact: KernelFacts, launch: Launch, config: Any) -> dict[str, Any]:
    """One line of the table; sizes in bytes, `bytes_in_flight` per multiprocessor. Keys as for a Triton kernel."""
    part = PROCESSORS[fact.arch]
    by_registers = REGISTERS // (-(-fact.registers // 8) * 8 * launch.threads)
    by_shared = part.shared // (launch.shared_bytes + 1024)
    ctas = max(0, min(by_shared, by_registers, part.threads // launch.threads, part.blocks))
    blocks = launch.grid[0] * launch.grid[1] * launch.grid[2]
    resident = min(ctas, -(-blocks // part.processors))
    asynchronous = fact.count("LDGSTS")
    wide = sum(n for opcode, n in fact.instructions.items() if opcode.startswith("LDGSTS") and ".128" in opcode)
    all_bytes = launch.dram_bytes + launch.read_again
    return {
        "kernel": fact.name,
        "config": str(config),
        "arch": f"sm_{cuda_build.number(fact.arch)}",
        "registers": fact.registers,
        "spills": fact.stack,
        "local_accesses": fact.count("LDL", "STL"),
        "shared_bytes": launch.shared_bytes,
        "ctas_per_sm": ctas,
        "bytes_in_flight": resident * launch.block_in_flight,
        "load_bytes": 0 if not asynchronous else 16 if wide == asynchronous else 4,
        "async_copies": asynchronous,
        "tensor_ops": fact.count("HMMA"),
        "atomics": fact.count("ATOM", "RED."),
        "dram_bytes": launch.dram_bytes,
        "l2_bytes": all_bytes,
        "model_seconds": max(launch.dram_bytes / part.bandwidth, all_bytes / (2 * part.bandwidth)),
        "grid": list(launch.grid),
        "threads": launch.threads,
        "cluster": launch.cluster,
    }


def rows(
    compiled: dict[str, dict[str, KernelFacts]], configs: Sequence[Any], architectures: Sequence[str] = ARCHITECTURES
) -> list[dict[str, Any]]:
    """Each distinct kernel of `compiled_facts` once per architecture, with the first configuration that launches it."""
    found = []
    for arch, facts in compiled.items():
        if arch not in PROCESSORS or f"sm_{cuda_build.number(arch)}" not in architectures:
            continue
        seen: set[str] = set()
        for config in configs:
            for launch in launches(config, arch):
                if launch.kernel not in seen:
                    seen.add(launch.kernel)
                    found.append(row(facts[launch.kernel], launch, config))
    return found


def faults(row: dict[str, Any]) -> list[str]:
    """What a shipped kernel must not do, and this one does; empty when it is sound."""
    found = []
    limit = next(part for name, part in PROCESSORS.items() if f"sm_{cuda_build.number(name)}" == row["arch"])
    streams = row["kernel"].startswith(STREAMING)
    if row["spills"] or row["local_accesses"]:
        found.append(f"spills {row['spills']} bytes")
    if row["atomics"]:
        found.append(f"{row['atomics']} atomics")
    if row["shared_bytes"] > limit.block_shared:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory")
    if row["ctas_per_sm"] == 0:
        found.append("does not fit a multiprocessor")
    if streams and row["load_bytes"] != 16:
        found.append("does not stream in asynchronous accesses of 16 bytes")
    if streams and "<float" not in row["kernel"] and not row["tensor_ops"]:
        found.append("no matrix instructions")
    return found
