"""Fused low-rank adapter kernels: LoR2C residual adds, and the routed projections of EffiLoRA and Lily."""

from __future__ import annotations

from . import _cuda, _native, ops  # noqa: F401  (ops declares the schemas that the extension registers kernels for)

_native.load()
_cuda.load()

from . import backends, functional  # noqa: E402
from .backends import use_backend  # noqa: E402
from .functional import expand_add, residual_add, routed_projection, shrink  # noqa: E402
from .residual_norm import residual_add_norm  # noqa: E402

backends.register()
backends.from_environment()

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "expand_add",
    "functional",
    "residual_add",
    "residual_add_norm",
    "routed_projection",
    "shrink",
    "use_backend",
]
