"""Builds kernels with g++ for the SIMT harness: one shared library per set of sources and flags, kept in build/simt."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


@contextmanager
def _one_builder() -> Iterator[None]:
    """Processes that want the same library (`pytest -n 2`) wait for the first one to build it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _digest(flags: tuple[str, ...], *files: Path) -> str:
    digest = hashlib.sha256(repr((COMPILER, flags)).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: Path, target: Path, flags: tuple[str, ...]) -> None:
    _run([COMPILER, "-std=c++17", "-fPIC", f"-I{HERE}", *flags, "-c", str(source), "-o", str(target)])


def runtime_objects() -> list[Path]:
    """The harness itself, compiled once for all kernels; not instrumented."""
    digest = _digest((), *(HERE / name for name in RUNTIME), *HERE.glob("*.h"))
    targets = [CACHE / f"{name}-{digest}.o" for name in RUNTIME]
    with _one_builder():
        for name, target in zip(RUNTIME, targets, strict=True):
            if not target.exists():
                with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                    _compile(HERE / name, Path(folder, "out.o"), ("-O2", "-g1"))
                    os.replace(Path(folder, "out.o"), target)
    return targets


def build(
    kernels: Path = CUDA, entry: Path = HERE / "kernels.cpp", flags: tuple[str, ...] = (), target: Path | None = None
) -> Path:
    """The library of the kernels in `kernels`, with the C interface of `entry`: in the cache, or at `target`.

    The kernels are compiled with `-fsanitize=thread` and without its library: the harness supplies the hooks, and so
    sees every load and store.
    """
    objects = runtime_objects()
    if target is not None:
        return _link(kernels, entry, flags, target, objects)
    sources = [*kernels.glob("*.cuh"), *kernels.glob("*.h"), entry, *HERE.glob("*.h"), *map(HERE.joinpath, RUNTIME)]
    target = CACHE / f"{entry.stem}-{_digest(flags, *sources)}.so"
    with _one_builder():
        if not target.exists():
            _forget_old(entry.stem)
            _link(kernels, entry, flags, target, objects)
    return target


def _link(kernels: Path, entry: Path, flags: tuple[str, ...], target: Path, objects: list[Path]) -> Path:
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        _compile(entry, Path(folder, "entry.o"), (f"-I{kernels}", "-O1", "-g1", "-fsanitize=thread", *flags))
        _run([COMPILER, "-shared", "-o", f"{folder}/out.so", f"{folder}/entry.o", *map(str, objects), "-ldl"])
        os.replace(f"{folder}/out.so", target)
    return target


def binding() -> Any:
    """The Python module of `binding.cpp`: the torch bindings with the kernels in the harness."""
    from torch.utils import cpp_extension

    folder = CACHE / "binding"
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "lowrank_simt_binding",
        [str(HERE / "binding.cpp")],
        extra_include_paths=[str(HERE), str(CUDA)],
        extra_cflags=["-O1", "-g0", "-DAT_PER_OPERATOR_HEADERS"],
        extra_ldflags=[str(build())],
        build_directory=str(folder),
    )


def _forget_old(stem: str, keep: int = 7) -> None:
    """Each change of a source leaves a library behind: keep the newest ones."""
    for path in sorted(CACHE.glob(f"{stem}-*.so"), key=lambda path: path.stat().st_mtime, reverse=True)[keep:]:
        path.unlink(missing_ok=True)
