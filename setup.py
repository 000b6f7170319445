"""Builds the native parts of lowrank_fast; metadata and everything else stand in pyproject.toml.

Each native part is one extension with a variable of its own, so that the absence of one costs nothing else:

    LOWRANK_FAST_BUILD=auto  build what this machine can, and say in one line what was left out (the default)
    LOWRANK_FAST_BUILD=1     build, and fail loudly when that is impossible
    LOWRANK_FAST_BUILD=0     build nothing: a pure Python package, whose ops run the PyTorch expressions

LOWRANK_FAST_BUILD_CUDA says the same of the CUDA kernels, which need nvcc and a CUDA build of torch.

torch is imported only by the commands that compile. Objects are kept in build/, keyed by what they were compiled
against, so that a second build, editable or not, compiles only what changed. MAX_JOBS limits the parallel compilers.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
COMPILING_COMMANDS = {"build", "build_ext", "bdist_wheel", "bdist", "develop", "editable_wheel", "install"}


@dataclass(frozen=True)
class Part:
    """A native extension: what it is called in messages, who asks for it, why it cannot be built, and how it is."""

    title: str
    variable: str
    obstacle: Callable[[], str | None]
    extension: Callable[[], Extension]
    prepare: Callable[[Extension], None] = lambda extension: None  # what must be built before the extension itself

    def mode(self) -> str:
        mode = os.environ.get(self.variable, "auto") or "auto"
        if mode not in ("auto", "0", "1"):
            raise SystemExit(f"{self.variable} must be auto, 0 or 1; got {mode!r}")
        return mode


# ------------------------------------------------------------------------------------------------ the CPU kernels


def cpu_sources() -> list[str]:
    """`csrc/bindings.cpp` and `csrc/cpu/*.cpp`, relative to the root as setuptools wants them."""
    found = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    return [path.relative_to(ROOT).as_posix() for path in found if path.exists()]


def cpu_obstacle() -> str | None:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if sys.platform == "win32":
        return "they need GCC or Clang, which this Windows build does not use"
    if "csrc/bindings.cpp" not in cpu_sources():
        return "this source tree has no csrc/bindings.cpp"
    if find_spec("torch") is None:
        return (
            "torch is not importable in the build environment; with torch installed, "
            "`pip install --no-build-isolation .` builds the kernels"
        )
    if shutil.which(compiler) is None:
        return f"no C++ compiler {compiler!r} was found (set CXX to name another)"
    return None


def cpu_extension() -> Extension:
    """One module for every x86-64 machine: sources raise their own instruction set, so no -march here.

    The C++ standard is left to torch's BuildExtension, which knows what the headers of the torch at hand need.
    """
    import torch
    from torch.utils.cpp_extension import CppExtension

    openmp = [] if sys.platform == "darwin" else ["-fopenmp"]
    return CppExtension(
        "lowrank_fast._C",
        cpu_sources(),
        include_dirs=[str(ROOT / "csrc")],
        # the headers of single operators instead of all of them, which would take most of the build's time
        define_macros=[("LOWRANK_TORCH_VERSION", torch.__version__), ("AT_PER_OPERATOR_HEADERS", None)],
        # GCC 12 takes its own intrinsics' `__m256i y = y` for a use of something uninitialised
        extra_compile_args=[
            *("-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=fast"),
            *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),
            *openmp,
        ],
        extra_link_args=openmp,
        depends=sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.h")),
    )


# ------------------------------------------------------------------------------------------------ the CUDA kernels


def cuda_build() -> Any:
    """`lowrank_fast/cuda_build.py` by its path: importing the package would need torch and what is being built."""
    name = "lowrank_fast_cuda_build"
    if name not in sys.modules:
        spec = spec_from_file_location(name, ROOT / "lowrank_fast" / "cuda_build.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


PARTS = (
    Part("C++ CPU kernels", "LOWRANK_FAST_BUILD", cpu_obstacle, cpu_extension),
    Part(
        "CUDA kernels",
        "LOWRANK_FAST_BUILD_CUDA",
        lambda: cuda_build().obstacle(),
        lambda: cuda_build().extension(ROOT),
        lambda extension: cuda_build().prepare(extension, ROOT),
    ),
)


# ------------------------------------------------------------------------------------------------ building


def chosen_parts(report: list[str]) -> dict[str, tuple[Part, Extension]]:
    """The parts to build, by extension name; what is left out goes into `report`. SystemExit where 1 was asked for."""
    chosen = {}
    for part in PARTS:
        mode = part.mode()
        obstacle = f"{part.variable}=0" if mode == "0" else part.obstacle()
        if obstacle is None:
            try:
                extension = part.extension()
                chosen[extension.name] = (part, extension)
                continue
            except Exception as error:  # a torch that is installed but does not import
                obstacle = f"{type(error).__name__}: {error}"
        if mode == "1":
            raise SystemExit(f"lowrank_fast: {part.variable}=1, but the {part.title} cannot be built: {obstacle}")
        report.append(f"{part.title} left out: {obstacle}")
    return chosen


def build_command(chosen: dict[str, tuple[Part, Extension]], report: list[str]) -> type:
    """torch's BuildExtension, with lasting objects and with `auto` parts allowed to fail."""
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildParts(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            key = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = str(ROOT / "build" / key)
            self.in_source = bool(self.inplace)

        def build_extension(self, ext: Extension) -> None:
            part, _ = chosen[ext.name]
            began = time.monotonic()
            try:
                part.prepare(ext)
                super().build_extension(ext)
                report.append(
                    f"{part.title} built against torch {torch.__version__} in {time.monotonic() - began:.0f} s"
                )
            except Exception as error:
                if part.mode() == "1":
                    raise
                traceback.print_exc()
                report.append(f"{part.title} LEFT OUT, their build FAILED: {error}")
                report.append(f"the package works without them; {part.variable}=1 turns this into an error")
                self.leave_out(ext)

        def leave_out(self, ext: Extension) -> None:
            """Forget the extension, and any older build of it that would be loaded in its place."""
            ext.optional = True  # so that an editable build does not look for the file
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
            if self.in_source:
                (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)

    return BuildParts.with_options(use_ninja=True)


def main() -> None:
    arguments: dict[str, Any] = {}
    report: list[str] = []
    if "bdist_wheel" in sys.argv:  # a wheel takes all it finds in build/lib*, also what an earlier build left there
        for folder in (ROOT / "build").glob("lib*"):
            shutil.rmtree(folder)
    if COMPILING_COMMANDS.intersection(sys.argv):
        chosen = chosen_parts(report)
        if chosen:
            arguments["ext_modules"] = [extension for _, extension in chosen.values()]
            arguments["cmdclass"] = {"build_ext": build_command(chosen, report)}
    setup(
        packages=packages(),
        package_dir={"lowrank_fast.triton_kernels": "triton_kernels", "lowrank_fast.bench": "bench"},
        package_data={"lowrank_fast": ["py.typed"]},
        **arguments,
    )
    for line in report:
        print(f"lowrank_fast: {line}", file=sys.stderr)


def packages() -> list[str]:
    """Every folder with Python files under its installed name.

    `triton_kernels` is installed inside the package: at top level it would shadow triton-lang's package of that name.
    """
    found = []
    for folder, name in (
        ("lowrank_fast", "lowrank_fast"),
        ("triton_kernels", "lowrank_fast.triton_kernels"),
        ("bench", "lowrank_fast.bench"),
    ):
        inside = sorted({path.parent.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")})
        found += [".".join((name, *relative.parts)) for relative in inside if "results" not in relative.parts]
    return found


if __name__ == "__main__":
    main()
