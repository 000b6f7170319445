"""Triton's interpreter, made to compute what a matrix instruction does, to count, and to take less time.

`repair()` replaces these operations:

* `dot`. The interpreter keeps bfloat16 as raw 16-bit integers and multiplies those (3.6 to 3.9 at least; the
  maintainers closed a fix as not supported), and it knows nothing of how a matrix instruction adds. Repaired, products
  are exact, 16 of them are added to the accumulator at a time, and each sum is truncated to float32: the coarsest that
  NVIDIA's have been found to do (Fasi, Higham, Mikaitis, Pranesh 2021). Float32 operands go through six products of
  bfloat16 terms, in the order in which Triton's `bf16x6` lowers them, added to the accumulator outside, or through
  fused multiply-adds where `common.FLOAT32_PRECISION` is `ieee`.
* the conversion from float32 to bfloat16, which cuts the lower bits off; repaired, it rounds to nearest even.
* the check of integer sums and products for overflow, whose outcome the interpreter throws away; repaired, it takes
  place where `check_overflow()` asked for it.
* the exchange of `triton.language` for the interpreter's functions, which takes milliseconds and is done again at every
  call of a device function; repaired, once per launch. Likewise the facts of a type, worked out again for every value.

`Traffic` counts the bytes that loads and stores touch, launch by launch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as _interpreter

from . import common

_builder = _interpreter.InterpreterBuilder
_original_cast = _builder.cast_impl
_original_patch = _interpreter._patch_lang
_original_block_type = tl.core.block_type.__init__
_original_numpy_dtype = _interpreter._get_np_dtype
PRODUCTS = 16  # of one matrix instruction


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 `values`, rounded to bfloat16; a NaN keeps its sign and stays one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(np.shape(values))


def _from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _terms(values: np.ndarray) -> list[np.ndarray]:
    """Three bfloat16 values, largest first, whose sum is `values`."""
    found = []
    for _ in range(3):
        found.append(_from_bfloat16(_to_bfloat16(values)))
        values = values - found[-1]
    return found


_LOW_BITS = np.uint64((1 << 29) - 1)  # of float64's mantissa, what float32's lacks


def _truncated(values: np.ndarray) -> np.ndarray:
    """Float64 values cut off to float32's precision, towards zero."""
    return (values.view(np.uint64) & ~_LOW_BITS).view(np.float64)


def matrix_product(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """`acc + a @ b` of exact products in float32, as matrix instructions add them up."""
    a, b, acc = a.astype(np.float64), b.astype(np.float64), acc.astype(np.float64)
    for first in range(0, a.shape[-1], PRODUCTS):
        acc = _truncated(acc + a[..., first : first + PRODUCTS] @ b[..., first : first + PRODUCTS, :])
    return acc.astype(np.float32)


def float32_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a @ b` of float32 values by `bf16x6`."""
    (a0, a1, a2), (b0, b1, b2) = ([term.astype(np.float64) for term in _terms(one)] for one in (a, b))
    # Exact, whatever the shape of the tile: a float32 product of BLAS adds in an order that depends on it.
    small = (a1 @ b1 + a2 @ b0 + a0 @ b2 + a1 @ b0 + a0 @ b1).astype(np.float32)
    return matrix_product(a0, b0, np.where(np.isnan(small), np.float32(0.0), small))


def ieee_product(a: np.ndarray, b: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """`acc + a @ b` of float32 values by fused multiply-adds, one after the other: each product is exact in float64,
    each sum is rounded to float32."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(a.shape[-1]):
        acc = (acc + a[..., k, None] * b[..., k, None, :]).astype(np.float32)
    return acc


def _dot(self: Any, a: Any, b: Any, d: Any, *settings: Any) -> Any:
    if a.dtype.scalar == tl.float32:
        if common.FLOAT32_PRECISION.value == "ieee":
            return _interpreter.TensorHandle(ieee_product(a.data, b.data, d.data), tl.float32)
        return _interpreter.TensorHandle(d.data + float32_product(a.data, b.data), tl.float32)
    left, right = (_from_bfloat16(one.data) if one.dtype.scalar == tl.bfloat16 else one.data for one in (a, b))
    return _interpreter.TensorHandle(matrix_product(left, right, d.data), tl.float32)


def _cast(self: Any, handle: Any, to: Any) -> Any:
    if handle.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
        return _original_cast(self, handle, to)
    return _interpreter.TensorHandle(_to_bfloat16(handle.data), tl.bfloat16)


class _Language:
    """`triton.language` while a launch runs: the interpreter's from the first `patch` to `restore`."""

    def __init__(self) -> None:
        self._running = False
        self._exchanged: list[tuple[Any, str, Any, Any]] = []  # where, its name there, Triton's, the interpreter's

    def patch(self, function: Any) -> _Language:
        """For a kernel or a device function of its; both names that they may know the language by are exchanged."""
        if self._running:
            return self
        self._running = True
        for where, name, _, ours in self._exchanged:
            setattr(where, name, ours)
        if not self._exchanged:
            changes = _original_patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))._changes
            self._exchanged = [(where, name, theirs, getattr(where, name)) for where, name, theirs in changes]
        return self

    def restore(self) -> None:
        """The launch is over."""
        for where, name, theirs, _ in reversed(self._exchanged):
            if theirs is _interpreter._MISSING:
                delattr(where, name)
            else:
                setattr(where, name, theirs)
        self._running = False


_language = _Language()


def _overflow_check(self: Any, left: Any, right: Any, operation: Any) -> None:
    kind, options = left.type.scalar, self.builder.options
    if kind.int_bitwidth >= 64 or not (options.debug and options.sanitize_overflow):
        return
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
    result = exact(left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
    if result.size and not kind.get_int_min_value() <= result.min() <= result.max() <= kind.get_int_max_value():
        raise OverflowError(f"int{kind.int_bitwidth} overflow in {operation.__name__}")


# By the name of a type, which tells its element type and shape; types and what follows from them never change.
_block_types: dict[tuple[Any, ...], dict[str, Any]] = {}
_tensor_facts: dict[str, tuple[Any, ...]] = {}
_numpy_dtypes: dict[str, np.dtype] = {}


def _init_block_type(self: Any, element: Any, shape: Any) -> None:
    key = (element.name, *(getattr(size, "value", size) for size in shape))
    if key not in _block_types:
        _original_block_type(self, element, shape)
        _block_types[key] = dict(self.__dict__)
    self.__dict__.update(_block_types[key])


def _init_tensor(self: Any, handle: Any, kind: Any) -> None:
    if kind.name not in _tensor_facts:
        shape = kind.shape if kind.is_block() else ()
        sizes = [tl.constexpr(size) for size in shape]
        _tensor_facts[kind.name] = kind.scalar, tl.core.tuple(sizes), tl.constexpr(math.prod(shape))
    self.handle, self.type = handle, kind
    self.dtype, self.shape, self.numel = _tensor_facts[kind.name]


def _numpy_dtype(kind: Any) -> np.dtype:
    if kind.name not in _numpy_dtypes:
        _numpy_dtypes[kind.name] = _original_numpy_dtype(kind)
    return _numpy_dtypes[kind.name]


def repair() -> None:
    """Make the interpreter multiply and round as a GPU does; harmless when done twice."""
    _interpreter._patch_lang = _language.patch
    _builder.create_dot = _dot
    _builder.cast_impl = _cast
    TritonSemantic.binary_op_sanitize_overflow_impl = _overflow_check
    tl.core.block_type.__init__, tl.core.tensor.__init__ = _init_block_type, _init_tensor
    _interpreter._get_np_dtype = _numpy_dtype
    builder = _interpreter.interpreter_builder
    allowed = builder.options.allowed_dot_input_precisions
    if "bf16x6" not in allowed:
        builder.options = dataclasses.replace(builder.options, allowed_dot_input_precisions=(*allowed, "bf16x6"))


def check_overflow() -> None:
    """From now on an integer overflow in any kernel raises, as Triton's debug mode has it on a GPU."""
    builder = _interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)


class Traffic:
    """Bytes of one launch: `dram` (each byte once per launch, loads and stores apart) and `touched` (every access)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.touched = 0
        self._addresses: dict[bool, list[np.ndarray]] = {False: [], True: []}
        self._size: dict[bool, list[int]] = {False: [], True: []}
        self._unique: dict[bool, dict[int, np.ndarray]] = {}

    def add(self, pointers: np.ndarray, mask: np.ndarray, size: int, store: bool) -> None:
        """Count one access of `size` bytes at each pointer that `mask` keeps."""
        addresses = np.asarray(pointers)[np.asarray(mask, dtype=bool)].astype(np.int64)
        self.touched += addresses.size * size
        self._addresses[store].append(np.unique(addresses))
        self._size[store].append(size)
        self._unique.pop(store, None)

    def unique(self, store: bool) -> dict[int, np.ndarray]:
        """The distinct addresses loaded (or stored), by access size."""
        if store not in self._unique:
            found: dict[int, list[np.ndarray]] = {}
            for size, addresses in zip(self._size[store], self._addresses[store], strict=True):
                found.setdefault(size, []).append(addresses)
            self._unique[store] = {size: np.unique(np.concatenate(parts)) for size, parts in found.items()}
        return self._unique[store]

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
