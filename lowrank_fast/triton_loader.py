"""Finding Triton and the kernels in `triton_kernels/`, without importing either before the first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

OLDEST_TRITON = (3, 6)


def unavailable_reason() -> str | None:
    """Why the backend cannot run on this machine, in one line; None when it can. Imports neither Triton nor a
    driver."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (CUDA and ROCm builds of PyTorch bring it)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1" or torch.cuda.is_available() or torch.xpu.is_available():
        return None
    built = torch.version.cuda or torch.version.hip or (torch.version.xpu if hasattr(torch.version, "xpu") else None)
    if built:
        return "PyTorch finds no GPU (a driver without a device, or no driver); TRITON_INTERPRET=1 runs CPU tensors"
    return (
        f"PyTorch {torch.__version__} has no GPU support; install a CUDA or ROCm build, "
        "or set TRITON_INTERPRET=1 for CPU tensors"
    )


@functools.cache
def kernels(name: str) -> ModuleType:
    """A module of `lowrank_fast.triton_kernels`, imported at the first use; in a source tree, from the folder
    beside it."""
    package = f"{__package__}.triton_kernels"
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        folder = Path(__file__).resolve().parent.parent / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[package] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    _check_version()
    return importlib.import_module(f"{package}.{name}")


def _check_version() -> None:
    import triton

    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < OLDEST_TRITON:
        raise RuntimeError(
            f"backend 'triton' needs Triton {'.'.join(map(str, OLDEST_TRITON))} or newer; got {triton.__version__}"
        )
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        importlib.import_module(f"{__package__}.triton_kernels.interpreter").repair()


def plan() -> Any:
    """The module that turns shapes into launches."""
    return kernels("plan")


def plan_backward() -> Any:
    """The same for backward."""
    return kernels("plan_backward")
