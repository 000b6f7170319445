"""Which implementation of the ops runs where, and why not another one.

A backend is a namespace of callables with the signatures of `ops.SCHEMAS`. Left alone, the dispatcher picks by device:
the C++ kernels on the CPU, CUDA or else Triton on GPUs, the fallback elsewhere and for float64. `use_backend` or
`LOWRANK_FAST_BACKEND` forces one for the whole process; one that cannot run the tensors it is given is an error that
says why, never another backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

_forced: str | None = None


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
    global _forced
    if name is not None:
        reason = unavailable_reason(name)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    _forced = name


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
        force(previous)


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
    """Apply `LOWRANK_FAST_BACKEND`; called once at import."""
    name = os.environ.get(ENVIRONMENT)
    if name:
        try:
            force(name)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"{ENVIRONMENT}={name}: {error}") from None
