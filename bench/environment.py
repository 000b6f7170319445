"""What every record says about the machine and the software it was measured with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import lowrank_fast
from lowrank_fast import _native
from lowrank_fast.info import cpu_model, installed_version


def isa_in_use() -> str:
    """The instruction set of our kernels; torch's own, with the word "fallback", where the extension is not built."""
    module = _native.module()
    if module is None:
        return f"fallback ({torch.backends.cpu.get_cpu_capability()})"
    return str(module.isa())


def default_dtypes() -> list[str]:
    """float32, and bfloat16 where oneDNN multiplies it: elsewhere the baselines take ten times as long."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ["float32"] if supported is not None and not supported() else ["float32", "bfloat16"]


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Versions of Python, torch, this package and, where installed, transformers and peft."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lowrank_fast": lowrank_fast.__version__,
        "transformers": installed_version("transformers"),
        "peft": installed_version("peft"),
    }
    return {name: version for name, version in found.items() if version is not None}


@lru_cache(maxsize=1)
def commit() -> str | None:
    """The commit of the checkout around this package or the current directory, "-dirty" with changes; None outside one.

    A directory counts as our checkout when its top level holds `lowrank_fast/`: an installed package may lie in the
    repository of another project.
    """
    for directory in (Path(lowrank_fast.__file__).parent, Path.cwd()):
        top = _git(directory, "rev-parse", "--show-toplevel")
        if top is None or not (Path(top) / "lowrank_fast" / "__init__.py").is_file():
            continue
        head = _git(directory, "rev-parse", "--short=12", "HEAD")
        if head is None:
            return None
        return head + ("-dirty" if _git(directory, "status", "--porcelain", "--untracked-files=no") else "")
    return None


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def load_average() -> float:
    """The one-minute load average; 0.0 where the system has none."""
    try:
        return float(os.getloadavg()[0])
    except (AttributeError, OSError):
        return 0.0


def now() -> str:
    """Local time with its offset, to the second."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def snapshot() -> dict[str, Any]:
    """The fields of a record that do not depend on what was measured."""
    return {
        "versions": versions(),
        "cpu": cpu_model(),
        "isa": isa_in_use(),
        "threads": torch.get_num_threads(),
        "load": load_average(),
        "date": now(),
        "commit": commit(),
    }
