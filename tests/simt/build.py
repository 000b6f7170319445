"""Builds kernels with g++ for the SIMT harness: one shared library per set of sources and flags, kept in build/simt."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CUDA = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "simt"
RUNTIME = ("fibers.cpp", "memory.cpp")
COMPILER = os.environ.get("CXX", "g++")


def missing_reason() -> str | None:
    """Why the harness cannot be built on this machine; None when it can."""
    if shutil.which(COMPILER) is None:
        return f"no C++ compiler {COMPILER!r}"
    return None


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _digest(folder: Path, entry: Path, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted([*folder.glob("*.cuh"), *folder.glob("*.h"), entry, *HERE.glob("*.cpp"), *HERE.glob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(kernels: Path = CUDA, entry: Path = HERE / "kernels.cpp", flags: tuple[str, ...] = ()) -> Path:
    """The library of the kernels in the folder `kernels`, with the C interface of `entry`.

    The kernels are compiled with `-fsanitize=thread` and without its library: the harness supplies the hooks, and so
    sees every load and store. The runtime itself is not instrumented.
    """
    target = CACHE / f"{entry.stem}-{_digest(kernels, entry, flags)}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        common = [COMPILER, "-std=c++17", "-g1", "-fPIC", f"-I{HERE}", f"-I{kernels}", "-c"]
        jobs = [[*common, "-O1", "-fsanitize=thread", *flags, str(entry), "-o", f"{folder}/entry.o"]]
        jobs += [[*common, "-O2", str(HERE / name), "-o", f"{folder}/{name}.o"] for name in RUNTIME]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(_run, jobs))
        objects = [f"{folder}/entry.o", *(f"{folder}/{name}.o" for name in RUNTIME)]
        _run([COMPILER, "-shared", "-o", f"{folder}/out.so", *objects, "-ldl"])
        os.replace(f"{folder}/out.so", target)
    return target
