"""Triton's interpreter, made right and made to count.

`repair()`: the interpreter keeps bfloat16 as raw 16-bit integers and multiplies those (3.6 to 3.9 at least; the
maintainers closed a fix as not supported). The repaired `dot` widens both operands to float32 first, exactly what a
matrix instruction with float32 accumulation computes. Its conversion from float32 to bfloat16 cuts the lower bits off;
repaired, it rounds to nearest even as a GPU does.

`Traffic` counts the bytes that loads and stores touch, launch by launch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as _interpreter

_builder = _interpreter.InterpreterBuilder
_original_dot = _builder.create_dot
_original_cast = _builder.cast_impl


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return _interpreter.TensorHandle(data, tl.float32)


def _dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
    return _original_dot(self, _widen(a), _widen(b), d, *settings)


def _cast(self: Any, handle: Any, to: Any) -> Any:
    if handle.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _original_cast(self, handle, to)
    bits = np.ascontiguousarray(handle.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40  # a NaN keeps its sign and stays one
    data = np.where(np.isnan(handle.data), quiet, rounded).astype(np.uint16)
    return _interpreter.TensorHandle(data.reshape(np.shape(handle.data)), tl.bfloat16)


def repair() -> None:
    """Make the interpreter multiply bfloat16 values and round to them; harmless when done twice."""
    _builder.create_dot = _dot
    _builder.cast_impl = _cast


class Traffic:
    """Bytes of one launch: `dram` (each byte once per launch, loads and stores apart) and `touched` (every access)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.touched = 0
        self._addresses: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._size: dict[bool, list[int]] = {False: [], True: []}

    def add(self, pointers: np.ndarray, mask: np.ndarray, size: int, store: bool) -> None:
        """Count one access of `size` bytes at each pointer that `mask` keeps."""
        addresses = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.int64)
        self.touched += addresses.size * size
        self._addresses[store].append(np.unique(addresses))
        self._size[store].append(size)

    def unique(self, store: bool) -> dict[int, np.ndarray]:
        """The distinct addresses loaded (or stored), by access size."""
        found: dict[int, list[np.ndarray]] = {}
        for size, addresses in zip(self._size[store], self._addresses[store], strict=True):
            found.setdefault(size, []).append(addresses)
        return {size: np.unique(np.concatenate(parts)) for size, parts in found.items()}

    def bytes_within(self, start: int, length: int, store: bool) -> int:
        """Distinct bytes loaded (or stored) inside one buffer."""
        total = 0
        for size, addresses in self.unique(store).items():
            total += size * int(((addresses >= start) & (addresses < start + length)).sum())
        return total

    @property
    def dram(self) -> int:
        return sum(size * a.size for store in (False, True) for size, a in self.unique(store).items())


@contextmanager
def counting() -> Iterator[list[Traffic]]:
    """Count what kernels load and store inside the block: one `Traffic` per launch, in order."""
    from . import launch

    launches: list[Traffic] = []
    load, store = _builder.create_masked_load, _builder.create_masked_store

    def begin(one: launch.Launch) -> bool:
        launches.append(Traffic(one.name))
        return False

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].add(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8 or 1, False)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].add(ptrs.data, mask.data, ptrs.get_element_ty().primitive_bitwidth // 8 or 1, True)
        return store(self, ptrs, value, mask, *rest)

    _builder.create_masked_load, _builder.create_masked_store = masked_load, masked_store
    try:
        with launch.observing(begin):
            yield launches
    finally:
        _builder.create_masked_load, _builder.create_masked_store = load, store
