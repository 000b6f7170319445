"""Loads the compiled extension `lowrank_fast._CUDA`, and says in one line why CUDA kernels cannot run here.

The extension loads under any torch, with or without CUDA (it finds torch's CUDA stream at run time), so that its
registrations can be checked on a machine without a GPU. Nothing here initialises CUDA at import.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

_module: ModuleType | None = None
_reason: str | None = None


def load() -> None:
    """Import the extension and put its CUDA kernels behind the ops that `ops.py` declared.

    An extension built against another minor version of torch is left out: that one's C++ structures may differ.
    """
    global _module, _reason
    again = "reinstall lowrank_fast against this torch, with `pip install --no-build-isolation .`"
    try:
        found = importlib.import_module("lowrank_fast._CUDA")
    except ModuleNotFoundError:
        _reason = (
            "the CUDA extension is not built; reinstall with nvcc, a CUDA build of torch and LOWRANK_FAST_BUILD_CUDA=1"
        )
    except ImportError as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        _reason = f"the CUDA extension does not load with torch {torch.__version__}: {first_line}; {again}"
    else:
        if found.torch_version.split(".")[:2] != torch.__version__.split(".")[:2]:
            _reason = (
                f"the CUDA extension was built against torch {found.torch_version}, and this is {torch.__version__}; "
                f"{again}"
            )
            return
        found.register()
        _module = found


def module() -> ModuleType | None:
    """The extension, or None."""
    return _module


def missing_reason() -> str | None:
    """Why CUDA kernels cannot run on this machine, and what to do about it; None when they can."""
    if _reason is not None:
        return _reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA; install a CUDA build of torch"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU; check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"
    return None
