"""Memory that tells when a kernel writes where it must not, or leaves unwritten what it must write."""

from __future__ import annotations

import torch
from torch import Tensor

GUARD = 64  # elements on either side of every tensor


class Arena:
    """Tensors inside larger buffers: what lies around them must keep its bits, and what lies in a new one is NaN."""

    def __init__(self) -> None:
        self._guards: list[tuple[Tensor, int]] = []
        self._empty = torch.empty

    def _buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        buffer = self._empty(elements + 2 * GUARD, dtype=dtype)
        buffer.fill_(float("nan") if dtype.is_floating_point else 1)
        self._guards.append((buffer, elements))
        return buffer

    def place(self, tensor: Tensor) -> Tensor:
        """A copy of `tensor` with its strides, between guards of NaN."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        buffer = self._buffer(span, tensor.dtype)
        view = buffer.as_strided(tensor.shape, tensor.stride(), GUARD)
        return view.copy_(tensor) if tensor.numel() else view

    def new(self, shape: tuple[int, ...], dtype: torch.dtype, stride: tuple[int, ...] | None = None) -> Tensor:
        """An uninitialised tensor: NaN between guards of NaN."""
        count = 1
        for n in shape:
            count *= n
        buffer = self._buffer(count, dtype)
        plain = buffer[GUARD : GUARD + count].view(shape)
        return plain if stride is None else buffer.as_strided(shape, stride, GUARD)

    def check(self) -> None:
        """Fail if anything was written outside a tensor."""
        for buffer, count in self._guards:
            for side in (buffer[:GUARD], buffer[GUARD + count :]):
                untouched = torch.isnan(side) if side.is_floating_point() else side == 1
                assert bool(untouched.all()), f"a kernel wrote outside a {buffer.dtype} tensor of {count} elements"
