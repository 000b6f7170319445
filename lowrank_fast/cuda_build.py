"""Compiles the CUDA kernels: one object per GPU architecture, for setup.py, the codegen table and the tests.

`csrc/cuda/kernels.cu` is compiled once per architecture, each copy in a namespace of its own, so that the processors
share the work; the newest copy also carries its PTX, which later GPUs compile themselves. `csrc/cuda/cuda_device.cpp`
(plain C++ with torch's headers, no CUDA ones) picks a copy by compute capability at run time. The
CUDA runtime is linked statically and its symbols stay inside the extension, so that it does not matter which CUDA
version torch was built with. From scratch, bindings and link included, it takes 150 s on two cores (AMD EPYC, Zen 3,
nothing else running, nvcc 13.0, 2026-11-25); the first build of `make test-cuda-build` prints it.

setup.py loads this file by its path: it imports torch only where it compiles. Environment: `LOWRANK_FAST_CUDA_ARCHS`,
for example "80;90a" (default: all of ARCHITECTURES that the compiler knows); `LOWRANK_FAST_NVCC`, the compiler.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ARCHITECTURES = ("80", "86", "89", "90a", "100a")
NO_NVCC = "no nvcc was found; install the CUDA toolkit or `pip install 'lowrank-fast[nvcc]'`, or set LOWRANK_FAST_NVCC"


def find_nvcc() -> str | None:
    """The CUDA compiler: LOWRANK_FAST_NVCC, CUDA_HOME, the PATH, the PyPI package nvidia-cuda-nvcc, /usr/local/cuda."""
    named = os.environ.get("LOWRANK_FAST_NVCC")
    if named:
        return named if Path(named).is_file() else None
    candidates = [shutil.which("nvcc")]
    if os.environ.get("CUDA_HOME"):
        candidates.insert(0, str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
    for folder in map(Path, sys.path):
        candidates += [str(path) for path in sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True)]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and Path(path).is_file()), None)


def number(arch: str) -> int:
    """90 for "90a"."""
    return int(arch.rstrip("af"))


def architectures(nvcc: str) -> list[str]:
    """The architectures to compile, oldest first: those asked for, or the default ones that this compiler knows.

    Raises RuntimeError for one that was asked for and that it does not know.
    """
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    known = {int(found) for found in re.findall(r"sm_(\d+)", listing)}
    asked = [name.strip() for name in re.split("[;,]", os.environ.get("LOWRANK_FAST_CUDA_ARCHS", "")) if name.strip()]
    strange = [name for name in asked if not re.fullmatch(r"\d+[af]?", name) or number(name) not in known]
    if strange:
        raise RuntimeError(
            f"LOWRANK_FAST_CUDA_ARCHS: {nvcc} does not compile for {', '.join(strange)}; it knows "
            f"{', '.join(map(str, sorted(known)))}, each also with an a for that GPU alone, such as 90a"
        )
    return sorted(asked or [name for name in ARCHITECTURES if number(name) in known], key=number)


def compile_command(nvcc: str, arch: str, source: Path, target: Path, ptx: bool = False) -> list[str]:
    """The nvcc command for one architecture; `ptx` adds PTX for the GPUs after it ("a" architectures have none)."""
    codes = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    if ptx:
        codes += ["-gencode", f"arch=compute_{number(arch)},code=compute_{number(arch)}"]
    if number(arch) >= 90:
        codes.append("-DLOWRANK_CLUSTERS")  # thread block clusters: the one-launch backward
    return [
        nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", f"-DLOWRANK_ARCH=sm_{arch}", *codes,
        "-c", str(source), "-o", str(target),
    ]  # fmt: skip


def compile_kernels(source_root: Path, build: Path, jobs: int) -> list[Path]:
    """Compile `source_root/csrc/cuda/kernels.cu` for every architecture into `build`, and write `architectures.h`.

    The object of an architecture is kept while the sources, the flags and the version of the compiler stay the same,
    wherever these lie: two trees may share `build`. Raises RuntimeError with the compiler's words when something fails.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError(NO_NVCC)
    folder = source_root / "csrc" / "cuda"
    digest = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    for path in sorted([*folder.glob("*.cu"), *folder.glob("*.cuh"), folder / "types.h"]):
        digest.update(path.read_bytes())
    build.mkdir(parents=True, exist_ok=True)
    names = architectures(nvcc)

    def compile_one(arch: str) -> Path:
        partial = build / f"sm_{arch}.partial.o"
        command = compile_command(nvcc, arch, folder / "kernels.cu", partial, ptx=arch == names[-1])
        key = digest.copy()
        key.update(repr(command[1:-4]).encode())  # without the paths of nvcc, source and target
        target = build / f"sm_{arch}-{key.hexdigest()[:16]}.o"
        if target.exists():
            return target
        for old in build.glob(f"sm_{arch}-*.o"):
            old.unlink()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
        os.replace(partial, target)
        return target

    with ThreadPoolExecutor(jobs) as pool:  # newest first: it takes longest, and would else run alone at the end
        objects = list(pool.map(compile_one, names[::-1]))[::-1]
    tables = " ".join(f"LOWRANK_TABLE({number(name)}, sm_{name})" for name in names)
    header = f'#define LOWRANK_TABLES {tables}\n#define LOWRANK_ARCHITECTURES "{";".join(names)}"\n'
    if not (build / "architectures.h").exists() or (build / "architectures.h").read_text() != header:
        (build / "architectures.h").write_text(header)
    return objects


def runtime_library(nvcc: str) -> Path:
    """The static CUDA runtime that belongs to the compiler."""
    plan = subprocess.run([nvcc, "--dryrun", "-c", "any.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    root = Path(top.group(1).strip()).resolve() if top else Path(nvcc).resolve().parent.parent
    for place in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (root / place / "libcudart_static.a").exists():
            return root / place / "libcudart_static.a"
    raise RuntimeError(f"no libcudart_static.a under {root}; install nvidia-cuda-runtime of the version of nvcc")


# ------------------------------------------------------------------------------------------------ for setup.py


def obstacle() -> str | None:
    """Why the CUDA extension cannot be built here, in one line; None when it can."""
    if sys.platform != "linux":
        return "they are built on Linux only"
    try:
        import torch
    except ImportError:
        return "torch is not importable in the build environment; use `pip install --no-build-isolation .`"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if find_nvcc() is None:
        return NO_NVCC
    return None


def extension(root: Path) -> Any:
    """The setuptools extension `lowrank_fast._CUDA`, without its kernels: `prepare` compiles those.

    The bindings are plain C++, so torch's CUDA headers and libraries are not needed, only its own.
    """
    import torch
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        "lowrank_fast._CUDA",
        [f"csrc/cuda/cuda_{name}.cpp" for name in ("device", "ops", "routed_ops")],
        include_dirs=[str(root / "csrc" / "cuda")],
        define_macros=[("LOWRANK_TORCH_VERSION", torch.__version__), ("AT_PER_OPERATOR_HEADERS", None)],
        extra_compile_args=["-O2", "-g0", "-fvisibility=hidden"],
        extra_link_args=["-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"],
        depends=[f"csrc/cuda/{path.name}" for path in sorted((root / "csrc" / "cuda").glob("*.h"))],
    )


def prepare(extension: Any, root: Path) -> None:
    """Compile the kernels of `extension` (MAX_JOBS at a time) and link them to it."""
    build = root / "build" / "cuda"
    objects = compile_kernels(root, build, jobs=int(os.environ.get("MAX_JOBS", "") or os.cpu_count() or 1))
    nvcc = find_nvcc()
    assert nvcc is not None
    extension.include_dirs.append(str(build))
    extension.depends += [str(path) for path in (*objects, build / "architectures.h")]
    extension.extra_objects += [*map(str, objects), str(runtime_library(nvcc))]


if __name__ == "__main__":  # the Makefile asks: does this machine have a CUDA compiler?
    sys.exit(find_nvcc() is None)
