"""Loads the compiled extension `lowrank_fast._C`, and remembers in one sentence why it is not there."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch  # noqa: F401  (libtorch must be loaded before the extension)

_module: ModuleType | None = None
_reason: str | None = None


def load() -> None:
    """Import the extension, which registers the CPU kernels for the ops that `ops.py` declared."""
    global _module, _reason
    try:
        _module = importlib.import_module("lowrank_fast._C")
    except ModuleNotFoundError:
        _reason = "the C++ extension is not built; reinstall with a C++17 compiler and LOWRANK_FAST_BUILD=1"
    except ImportError as error:
        _reason = f"the C++ extension does not load with torch {torch.__version__}: {error}; reinstall lowrank_fast"


def module() -> ModuleType | None:
    """The extension, or None."""
    return _module


def missing_reason() -> str | None:
    """Why the extension is missing; None when it is loaded."""
    return _reason
