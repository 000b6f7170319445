"""Which implementation of the ops runs where, and why not another one.

A backend is a namespace of callables with the signatures of `ops.SCHEMAS`. Left alone, the dispatcher picks by device:
the C++ kernels on the CPU, CUDA or else Triton on GPUs, the fallback elsewhere and for float64. `use_backend` or
`LOWRANK_FAST_BACKEND` forces one for the whole process; one that cannot run the tensors it is given is an error that
says why, never another backend. What is wrong with the environment is said by every call until `use_backend` chooses
otherwise, and not by `import`, so that `lowrank-fast info` can say what there is instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _cuda, _native, fallback, ops, triton_backend

NAMES = ("cuda", "triton", "cpu", "reference")
ENVIRONMENT = "LOWRANK_FAST_BACKEND"


# Why a backend cannot run at all on this machine; None when it can.
_REASONS: dict[str, Callable[[], str | None]] = {
    "cuda": _cuda.missing_reason,
    "triton": triton_backend.unavailable_reason,
    "cpu": _native.missing_reason,
    "reference": lambda: None,
}
_NAMESPACES: dict[str, Any] = {
    "dispatch": ops.Dispatched,
    "cpu": ops.Dispatched,
    "cuda": ops.Dispatched,
    "triton": triton_backend,
    "reference": fallback,
}

# The name of the backend that every call uses; None: by device; UNUSABLE: calls raise what `_environment_error` says.
UNUSABLE = "unusable"
_forced: str | None = None
_environment_error: str | None = None
# Has the functions that stand in for public ones in eager mode (csrc/cpu/eager.h), where the choice allows them.
eager: ModuleType | None = None


def unavailable_reason(name: str) -> str | None:
    """Why the backend `name` cannot run on this machine, in one line; None when it can."""
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, NAMES))}; got {name!r}")
    return _REASONS[name]()


def available() -> list[str]:
    """The backends that can run on this machine, best first."""
    return [name for name in NAMES if unavailable_reason(name) is None]


def force(name: str | None) -> None:
    """Make every later call use the backend `name`; None returns to the choice by device.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for one that cannot run here.
    """
    if name is not None:
        reason = unavailable_reason(name)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    _choose(name)


def _choose(name: str | None) -> None:
    global _forced, eager
    _forced = name
    eager = _native.module() if name in (None, "cpu") else None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the calls inside the `with` block on the backend `name`: "cuda", "triton", "cpu" or "reference".

    Process-wide while it lasts, and also what the backward of those calls uses. Raises as `force` does.
    """
    previous = _forced
    force(name)
    try:
        yield
    finally:
        _choose(previous)


def select(y: Tensor) -> str:
    """The backend for activations like `y`; raises RuntimeError when a forced one cannot take them."""
    if _forced is None:
        return "reference" if y.dtype is torch.float64 else "dispatch"
    if _forced in ("cpu", "cuda"):  # named like the devices they run on
        if y.device.type != _forced and not torch.compiler.is_compiling():
            raise RuntimeError(f"backend {_forced!r} runs {_forced} tensors only; got a tensor on {y.device}")
        if y.dtype is torch.float64:
            raise RuntimeError(
                f"backend {_forced!r} runs float32, bfloat16 and float16; float64 runs on 'reference' only"
            )
    elif _forced == UNUSABLE:
        raise RuntimeError(_environment_error)
    return _forced


def register() -> None:
    """Put the Triton kernels behind the dispatcher for the GPUs they run on; called once at import."""
    if unavailable_reason("triton") is None:
        for key, wanted in (
            ("CUDA", _cuda.module() is None and (torch.version.cuda or torch.version.hip)),
            ("XPU", torch.xpu._is_compiled()),
        ):
            if wanted:
                ops.implement(key, triton_backend)


def namespace(name: str) -> Any:
    """The ops of a backend that `select` returned."""
    return _NAMESPACES[name]


def from_environment() -> None:
    """Apply `LOWRANK_FAST_BACKEND`, or remember why it (or `LOWRANK_FAST_CPU_ISA`) cannot be; called once at import."""
    global _environment_error
    name = os.environ.get(ENVIRONMENT)
    _environment_error = _native.environment_error()
    try:
        force(name or None)
    except (ValueError, RuntimeError) as error:
        _environment_error = f"{ENVIRONMENT}={name}: {error}"
    if _environment_error is not None:
        _choose(UNUSABLE)


def environment_error() -> str | None:
    """What is wrong with the environment variables that choose kernels, in one line; None when nothing is."""
    return _environment_error
