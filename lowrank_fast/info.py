"""What is installed and what can run: the facts behind `lowrank-fast info`."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import lowrank_fast

from . import _native, backends

PACKAGES = ("triton", "transformers", "peft")
VARIABLES = ("LOWRANK_FAST_BACKEND", "LOWRANK_FAST_CPU_ISA", "LOWRANK_FAST_TRITON_PRECISION", "OMP_NUM_THREADS")


def collect() -> dict[str, Any]:
    """Versions, machine, backends (with the reason why one is missing), instruction sets, build facts; all JSON types.

    `cpu.isa` is the instruction set that our kernels use, `cpu.isas` those that this CPU can run; None and [] when the
    C++ extension is missing.
    """
    module = _native.module()
    return {
        "versions": {
            "lowrank_fast": lowrank_fast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            **{name: installed_version(name) for name in PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "threads": torch.get_num_threads(),
            "isa": None if module is None else module.isa(),
            "isas": [] if module is None else list(module.isas()),
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": {name: backends.unavailable_reason(name) for name in backends.NAMES},
        "extension": {
            "file": None if module is None else module.__file__,
            "missing": _native.missing_reason(),
            "build": {} if module is None else dict(module.build_info()),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def installed_version(package: str) -> str | None:
    """The version in the package's metadata, without importing it; None when it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"
