"""Where a backend's tensors live, and what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def device_of(backend: str) -> torch.device:
    """The device that `backend` runs on here: the GPU for "cuda", and for "triton" where there is one."""
    on_gpu = backend in ("cuda", "triton") and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def interpreted(backend: str) -> bool:
    """Whether the backend's kernels run in an interpreter, a thousand times slower: tests then draw small problems."""
    return backend == "triton" and device_of(backend).type == "cpu"


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for small expressions on a busy machine, where waking a second one takes longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
