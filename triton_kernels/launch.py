"""Launches: made by the backend, then run, or recorded for `lowrank-fast codegen` and for the tests that count them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .common import FLOAT32_PRECISION
from .table import ARCHITECTURES


class Launch(NamedTuple):
    """One kernel launch: positional arguments, then the compile-time constants by name."""

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    stages: int

    def options(self, architecture: str) -> dict[str, Any]:
        """What the compiler is told beside the constants.

        On NVIDIA's, up to rank 64, shrinks with float32 products (three parts for each value) or two products of `x`,
        and all kernels with IEEE products, may use all registers: ptxas would spill a few to fit another CTA. Other
        kernels it schedules better if they may not.
        """
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        shrinks = self.name in ("residual_add_kernel", "shrink_kernel", "routed_small_kernel")
        float32 = self.args[0].dtype is torch.float32
        many = shrinks and (float32 or self.constants.get("ROUTER") == "x")
        ieee = float32 and FLOAT32_PRECISION.value == "ieee"
        if architecture.startswith("sm_") and (many or ieee) and self.constants["RP"] <= 64:
            options["maxnreg"] = min(255, 65536 // (32 * self.warps))
        return options


_observer: Callable[[Launch], bool] | None = None
_architecture: str | None = None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def run(launch: Launch) -> None:
    """Run a launch on the current stream, or hand it to the observer."""
    if min(launch.grid) == 0 or (_observer is not None and _observer(launch)):
        return
    if not interpreted():
        options = launch.options(architecture(launch.args[0].device))
        launch.kernel[launch.grid](*launch.args, **launch.constants, **options)
    else:
        launch.kernel[launch.grid](*launch.args, **launch.constants)


@contextmanager
def observing(observer: Callable[[Launch], bool], architecture: str | None = None) -> Iterator[None]:
    """Show every launch inside the block to `observer`, which returns True to keep it from running.

    With `architecture`, launches are planned for that one, whatever the tensors' device (`meta` tensors do).
    """
    global _observer, _architecture
    if architecture is not None and architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}; got {architecture!r}")
    previous = _observer, _architecture
    _observer, _architecture = observer, architecture
    try:
        yield
    finally:
        _observer, _architecture = previous


_by_device: dict[torch.device, str] = {}


def architecture(device: torch.device) -> str:
    """The table's architecture for a device; raises RuntimeError for one that the kernels do not support."""
    if _architecture is not None:
        return _architecture
    known = _by_device.get(device)
    if known is None:
        known = _by_device[device] = _detect(device)
    return known


# AMD's parts with matrix instructions for waves of 64 lanes; they share the rows of gfx942.
INSTINCT = ("gfx90a", "gfx942", "gfx950")


def _detect(device: torch.device) -> str:
    if device.type == "cpu":
        return "sm_90"
    if device.type == "xpu":
        return "sm_80"
    if device.type != "cuda":
        raise RuntimeError(f"the Triton kernels run on CUDA, ROCm and XPU tensors; got a tensor on {device}")
    if torch.version.hip is not None:
        properties = torch.cuda.get_device_properties(device)
        name = properties.gcnArchName.split(":")[0]
        if name not in INSTINCT:
            raise RuntimeError(
                f"the Triton kernels need one of AMD's Instinct GPUs ({', '.join(INSTINCT)}); "
                f"{properties.name} is {name}"
            )
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(
            f"the Triton kernels need compute capability 8.0 (Ampere) or newer; {name} has {major}.{minor}"
        )
    if (major == 8 and minor > 0) or major >= 12:
        return "sm_89"  # GeForce and workstation cards: 99 KB of shared memory for a CTA
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")
