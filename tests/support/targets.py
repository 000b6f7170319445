"""Where a backend's tensors live, and what it takes."""

from __future__ import annotations

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_of(backend: str) -> torch.device:
    """The device that `backend` runs on here: the GPU for "cuda", and for "triton" where there is one."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def interpreted(backend: str) -> bool:
    """Whether the backend's kernels run in an interpreter, a thousand times slower: tests then draw small problems."""
    return backend == "triton" and device_of(backend).type == "cpu"
