"""Compiles the CUDA kernels: one object per GPU architecture, and what their machine code looks like.

`csrc/cuda/kernels.cu` is compiled once per architecture, each copy in a namespace of its own, so that a small change
recompiles quickly and two cores share the work; `csrc/cuda/cuda_ops.cpp` (plain C++ with torch's headers, no CUDA ones)
registers the ops and picks a copy by compute capability at run time. The CUDA runtime is linked statically, so that the
extension does not depend on which CUDA version torch was built with.

Used by setup.py, which loads this file by its path (`obstacle`, `extension`), the codegen table and the tests
(`compile_command`, `kernel_facts`). Environment: `LOWRANK_FAST_CUDA_ARCHS`, for example "80;90a" (default: all of
ARCHITECTURES that the compiler knows); `LOWRANK_FAST_NVCC`, the compiler.
"""

from __future__ import annotations

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
from typing import Any

ARCHITECTURES = ("80", "86", "89", "90a", "100a")
PTX = "100"  # newer GPUs compile this themselves; "a" architectures have no forward-compatible PTX
SHARED_LIMIT = {"80": 163, "86": 99, "89": 99, "90a": 227, "100a": 227}  # KiB of dynamic shared memory per block


def find_nvcc() -> str | None:
    """The CUDA compiler: LOWRANK_FAST_NVCC, CUDA_HOME, the PATH, or the one from the nvidia-cuda-nvcc wheel."""
    candidates = [os.environ.get("LOWRANK_FAST_NVCC"), shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(1, str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"))
    for folder in map(Path, sys.path):
        candidates += [str(path) for path in folder.glob("nvidia/cu1*/bin/nvcc")]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and Path(path).exists()), None)


def architectures(nvcc: str) -> list[str]:
    """The architectures to compile, without those that this compiler does not know."""
    wanted = os.environ.get("LOWRANK_FAST_CUDA_ARCHS")
    names = wanted.replace(",", ";").split(";") if wanted else list(ARCHITECTURES)
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    known = {name.removeprefix("sm_") for name in listing}
    chosen = [name.strip() for name in names if name.strip().removesuffix("a") in known or name.strip() in known]
    if not chosen:
        raise RuntimeError(f"{nvcc} compiles none of the architectures {names}; it knows {sorted(known)}")
    return chosen


def compile_command(nvcc: str, arch: str, source: Path, target: Path, ptx: bool = False) -> list[str]:
    """The nvcc command for one architecture; `ptx` adds forward-compatible PTX."""
    codes = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx:
        codes += ["-gencode", f"arch=compute_{PTX},code=compute_{PTX}"]
    if int(arch.removesuffix("a")) >= 90:
        codes.append("-DLOWRANK_CLUSTERS")  # thread block clusters: the one-launch backward
    return [
        nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "--resource-usage", f"-DLOWRANK_ARCH=sm_{arch}", *codes,
        "-c", str(source), "-o", str(target),
    ]  # fmt: skip


def compile_kernels(source_root: Path, build: Path, jobs: int = 2) -> tuple[list[Path], list[str]]:
    """Compile `source_root/csrc/cuda/kernels.cu` for every architecture into `build`.

    Returns the objects and the macros (`-DLOWRANK_TABLES=...`, `-DLOWRANK_ARCHITECTURES=...`) that the bindings need.
    Objects newer than every source are kept. Raises RuntimeError with the compiler's words when something fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(
            "no nvcc: install the CUDA toolkit or the PyPI package nvidia-cuda-nvcc, or set LOWRANK_FAST_NVCC"
        )
    folder = source_root / "csrc" / "cuda"
    newest = max(path.stat().st_mtime for path in folder.iterdir())
    build.mkdir(parents=True, exist_ok=True)
    names = architectures(nvcc)

    def compile_one(arch: str) -> Path:
        target = build / f"kernels_sm{arch}.o"
        if target.exists() and target.stat().st_mtime > newest:
            return target
        partial = target.with_suffix(".partial.o")
        command = compile_command(nvcc, arch, folder / "kernels.cu", partial, ptx=arch == names[-1] and arch == "100a")
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        os.replace(partial, target)
        return target

    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compile_one, names))
    tables = "".join(f"LOWRANK_TABLE({name.removesuffix('a')},sm_{name})" for name in names)
    return objects, [f"-DLOWRANK_TABLES={tables}", f'-DLOWRANK_ARCHITECTURES="{";".join(names)}"']


def runtime_library(nvcc: str) -> Path:
    """The static CUDA runtime beside the compiler."""
    root = Path(nvcc).resolve().parent.parent
    script = Path(nvcc).read_bytes()[:200] if Path(nvcc).stat().st_size < 4096 else b""
    found = re.search(rb"exec (\S+)/bin/nvcc", script)  # a wrapper script that calls the real one
    if found:
        root = Path(found.group(1).decode())
    for place in ("lib64", "lib", "targets/x86_64-linux/lib"):
        if (root / place / "libcudart_static.a").exists():
            return root / place / "libcudart_static.a"
    raise RuntimeError(f"no libcudart_static.a under {root}")


# ------------------------------------------------------------------------------------------------ for setup.py


def obstacle() -> str | None:
    """Why the CUDA extension cannot be built here, in one line; None when it can."""
    if sys.platform != "linux":
        return "they are built on Linux only"
    if find_nvcc() is None:
        return "no nvcc was found (install the CUDA toolkit or nvidia-cuda-nvcc, or set LOWRANK_FAST_NVCC)"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build environment; use `pip install --no-build-isolation .`"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    return None


def extension(root: Path) -> Any:
    """The setuptools extension `lowrank_fast._CUDA`; compiles the kernels (one object per architecture) on the way.

    The bindings are plain C++, so torch's CUDA headers and libraries are not needed, only its own.
    """
    from torch.utils.cpp_extension import CppExtension

    objects, macros = compile_kernels(root, root / "build" / "cuda", jobs=int(os.environ.get("MAX_JOBS", "2")))
    nvcc = find_nvcc()
    assert nvcc is not None
    return CppExtension(
        "lowrank_fast._CUDA",
        ["csrc/cuda/cuda_ops.cpp", "csrc/cuda/cuda_routed_ops.cpp"],
        include_dirs=[str(root / "csrc" / "cuda")],
        extra_compile_args=["-O2", "-g0", *macros],
        extra_objects=[str(path) for path in objects],
        extra_link_args=[str(runtime_library(nvcc)), "-ldl", "-lrt", "-lpthread"],
        depends=[f"csrc/cuda/{path.name}" for path in sorted((root / "csrc" / "cuda").glob("*.h"))],
    )


# ------------------------------------------------------------------------------------------------ machine code


@dataclass
class KernelFacts:
    """What the compiler made of one kernel."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes per thread; 0: nothing spilled, nothing indexed in memory
    static_shared: int  # bytes, without the dynamic ones
    instructions: Counter[str] = field(default_factory=Counter)

    def count(self, prefix: str) -> int:
        """How many instructions have an opcode that begins with `prefix`."""
        return sum(n for opcode, n in self.instructions.items() if opcode.startswith(prefix))


def find_binary_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: from the PATH, beside nvcc, or from the Triton wheel."""
    candidates = [shutil.which(name)]
    nvcc = find_nvcc()
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent / name))
    candidates += [str(Path(folder) / "triton" / "backends" / "nvidia" / "bin" / name) for folder in sys.path]
    return next((path for path in candidates if path and Path(path).exists()), None)


def _demangled(names: Sequence[str]) -> list[str]:
    if shutil.which("c++filt") is None or not names:
        return list(names)
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    short = [re.sub(r"void |lowrank::sm_\w+?::|\(lowrank.*", "", name) for name in done.stdout.splitlines()]
    return [re.sub(r"\(int\)", "", name) for name in short]


def kernel_facts(object_file: Path, arch: str, instructions: bool = True) -> list[KernelFacts]:
    """Registers, stack and the histogram of machine instructions of every kernel in an object file."""
    tool = find_binary_tool("cuobjdump")
    if tool is None:
        raise RuntimeError("no cuobjdump: install the CUDA toolkit or triton")
    usage = subprocess.run([tool, "-res-usage", str(object_file)], capture_output=True, text=True).stdout
    facts: dict[str, KernelFacts] = {}
    for match in re.finditer(r"Function (\S+):\s*\n?\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        name, registers, stack, shared = match.group(1), *map(int, match.groups()[1:])
        facts[name] = KernelFacts(name, arch, registers, stack, shared)
    if instructions:
        listing = subprocess.run([tool, "-sass", str(object_file)], capture_output=True, text=True).stdout
        current: KernelFacts | None = None
        for line in listing.splitlines():
            if "Function :" in line:
                current = facts.get(line.split(":")[1].strip())
            elif current is not None:
                opcode = re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line)
                if opcode:
                    current.instructions[opcode.group(1)] += 1
    mangled = list(facts)
    for name, short in zip(mangled, _demangled(mangled), strict=True):
        facts[name].name = short
    return sorted(facts.values(), key=lambda fact: fact.name)
