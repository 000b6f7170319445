"""The interpreter as `interpreter.repair` leaves it: integer overflow raises, and types say what they said before."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import triton_backend as backend

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")


@triton.jit
def arithmetic_kernel(x, out, OPERATION: tl.constexpr):
    at = tl.arange(0, 4)
    value = tl.load(x + at)
    if OPERATION == "add":
        result = value + value
    elif OPERATION == "sub":
        result = value - (-value)
    else:
        result = value * value
    tl.store(out + at, result)


@pytest.mark.parametrize(("operation", "largest"), [("add", 2**30 - 1), ("sub", 2**30 - 1), ("mul", 46340)])
def test_an_int32_overflow_raises_and_the_largest_result_does_not(operation: str, largest: int) -> None:
    out = torch.empty(4, dtype=torch.int32)
    fits = torch.tensor([0, 1, -largest, largest], dtype=torch.int32)
    arithmetic_kernel[(1,)](fits, out, operation)
    assert out.tolist() == [int(v) * int(v) if operation == "mul" else 2 * int(v) for v in fits]
    with pytest.raises(triton.runtime.errors.InterpreterError, match=f"int32 overflow in {operation}"):
        arithmetic_kernel[(1,)](fits + torch.tensor([0, 0, 0, 1], dtype=torch.int32), out, operation)


def test_the_same_sum_in_int64_does_not_raise() -> None:
    x, out = torch.full((4,), 2**40), torch.empty(4, dtype=torch.int64)
    arithmetic_kernel[(1,)](x, out, "add")
    assert out.tolist() == [2**41] * 4


@pytest.mark.parametrize("element", [tl.int1, tl.int32, tl.uint8, tl.float32, tl.bfloat16, tl.pointer_type(tl.float16)])
@pytest.mark.parametrize("shape", [[16], [1, 32], [4, 4, 2], [tl.constexpr(8), tl.constexpr(16)]], ids=str)
def test_block_types_are_what_triton_makes_of_them(element: tl.dtype, shape: list[int]) -> None:
    interpreter = backend.kernels("interpreter")
    theirs = tl.block_type.__new__(tl.block_type)
    interpreter._original_block_type(theirs, element, shape)
    for ours in (tl.block_type(element, shape), tl.block_type(element, shape)):  # made, then remembered
        assert ours == theirs and str(ours) == str(theirs) and ours.numel == theirs.numel
        assert [int(size) for size in ours.shape] == [int(size) for size in theirs.shape]
        assert interpreter._numpy_dtype(ours) == interpreter._original_numpy_dtype(theirs)
        value = tl.core.tensor(None, ours)
        assert value.dtype == element and value.type is ours and int(value.numel) == int(theirs.numel)
        assert [int(size) for size in value.shape] == [int(size) for size in theirs.shape]


def test_a_scalar_has_no_shape() -> None:
    value = tl.core.tensor(None, tl.float32)
    assert len(value.shape) == 0 and int(value.numel) == 1 and value.dtype == tl.float32
