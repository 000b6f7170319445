"""Loads the compiled extension `lowrank_fast._C`, and remembers in one sentence why it is not there."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch  # libtorch must be loaded before the extension

ISA_VARIABLE = "LOWRANK_FAST_CPU_ISA"

_module: ModuleType | None = None
_reason: str | None = None
_environment_error: str | None = None


def load() -> None:
    """Import the extension, which registers the CPU kernels for the ops that `ops.py` declared.

    Applies `LOWRANK_FAST_CPU_ISA`, or remembers that it names an instruction set that this CPU does not run.
    """
    global _module, _reason, _environment_error
    try:
        _module = importlib.import_module("lowrank_fast._C")
    except ModuleNotFoundError:
        _reason = "the C++ extension is not built; reinstall with a C++20 compiler and LOWRANK_FAST_BUILD=1"
    except ImportError as error:
        _reason = f"the C++ extension does not load with torch {torch.__version__}: {error}; reinstall lowrank_fast"
    if _module is not None and os.environ.get(ISA_VARIABLE):
        try:
            _module.set_isa(os.environ[ISA_VARIABLE])
        except ValueError as error:
            _environment_error = str(error)


def module() -> ModuleType | None:
    """The extension, or None."""
    return _module


def environment_error() -> str | None:
    """Why `LOWRANK_FAST_CPU_ISA` could not be applied; None when it was, or is not set."""
    return _environment_error


def missing_reason() -> str | None:
    """Why the extension is missing; None when it is loaded."""
    return _reason
