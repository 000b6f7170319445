"""The ops themselves, below the public functions: an argument of another shape, dtype or layout is refused before
anything is written, or else the call means something, and gives what the PyTorch expressions give.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_fast import _native, fallback, ops

from .test_compile import _samples

pytestmark = pytest.mark.skipif(_native.module() is None, reason="the C++ extension is not built")

Arguments = dict[str, Any]
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)
WRITTEN = {"residual_add_out": ("out",), "residual_add_backward_out": ("dx", "dA", "dB")}
WRITTEN |= dict.fromkeys(("residual_add_", "expand_add_", "routed_projection_"), ("y",))


def _op(name: str) -> Any:
    return getattr(torch.ops.lowrank_fast, name).default


def _valid(op: str) -> Arguments:
    positional, keywords = next(_samples(op))
    names = [argument.name for argument in _op(op)._schema.arguments]
    return dict(zip(names, positional, strict=False)) | keywords


def _copies(arguments: Arguments) -> Arguments:
    """Copies in the same layout, expanded ones included."""
    return {
        name: value if not isinstance(value, Tensor) or 0 in value.stride() else value.clone()
        for name, value in arguments.items()
    }


def _others(tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor in other shapes, dtypes and layouts."""
    for dim, size in enumerate(tensor.shape):
        for other in {size - 1, size + 1, 0}:
            shape = (*tensor.shape[:dim], other, *tensor.shape[dim + 1 :])
            yield f"{list(shape)}", torch.ones(shape, dtype=tensor.dtype)
    yield "flat", tensor.flatten()
    yield "one more dimension", tensor[None]
    yield "a scalar", tensor.new_ones(())
    for dtype in DTYPES:
        yield str(dtype), tensor.to(dtype)
    yield "expanded", tensor.new_ones(()).expand(tensor.shape)


def _outcome(op: str, given: Arguments, function: Any) -> list[Tensor]:
    """Everything that a call gives: what it returns and what it writes."""
    keywords = {name: given[name] for name in ("out", "dx", "dA", "dB") if name in given}
    returned = function(*(value for name, value in given.items() if name not in keywords), **keywords)
    results = [returned] if isinstance(returned, Tensor) else list(returned or ())
    return results + [given[name] for name in WRITTEN.get(op, ())]


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_an_unfit_tensor_is_refused_or_means_what_the_expression_means(op):
    valid = _valid(op)
    expression = getattr(fallback, op, None) or ops.COMPOSED[op]
    said: list[tuple[str, str]] = []
    for name, tensor in valid.items():
        if not isinstance(tensor, Tensor):
            continue
        for what, other in _others(tensor):
            arguments = {**valid, name: other}
            given = _copies(arguments)
            try:
                got = _outcome(op, given, _op(op))
            except (RuntimeError, IndexError) as error:
                said.append((f"{name} {what}", str(error)))
                for argument, value in given.items():
                    if isinstance(value, Tensor):
                        assert torch.equal(value, arguments[argument]), f"{name} {what}: {argument} was changed"
            else:
                for value, expected in zip(got, _outcome(op, _copies(arguments), expression), strict=True):
                    torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2, msg=f"{op}: {name} {what}")
    assert len(said) > 10
    for what, error in said:
        assert "lowrank_fast: " in error or "unsupported operation" in error, f"{what}: {error}"


@pytest.mark.parametrize(("op", "written"), [(op, name) for op, names in WRITTEN.items() for name in names])
def test_a_result_that_shares_memory_with_an_input_is_refused(op, written):
    valid = _valid(op)
    for name, tensor in valid.items():
        if not isinstance(tensor, Tensor) or name == written or tensor.dtype is not valid[written].dtype:
            continue
        both = torch.ones(valid[written].numel() + tensor.numel() - 1, dtype=tensor.dtype)
        arguments = {
            **valid,
            written: both[: valid[written].numel()].view(valid[written].shape),
            name: both[valid[written].numel() - 1 :].view(tensor.shape),
        }
        keywords = {key: arguments[key] for key in ("out", "dx", "dA", "dB") if key in arguments}
        with pytest.raises(RuntimeError, match="unsupported operation"):
            _op(op)(*(value for key, value in arguments.items() if key not in keywords), **keywords)
        assert torch.equal(both, torch.ones_like(both)), name


@pytest.mark.parametrize("name", ["dx", "dA", "dB"])
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_the_composed_backward_refuses_buffers_unlike_the_gradients(name, change):
    """What stands in for `residual_add_backward_out` where a backend has none: `copy_` would convert and broadcast."""
    arguments = _valid("residual_add_backward_out")
    buffer = arguments[name]
    arguments[name] = buffer.half() if change == "dtype" else buffer.new_zeros(3, *buffer.shape)
    before = arguments[name].clone()
    buffers = {key: arguments.pop(key) for key in ("dx", "dA", "dB")}
    with pytest.raises(RuntimeError, match=f"{name} must be"):
        ops.COMPOSED["residual_add_backward_out"](*arguments.values(), **buffers)
    assert torch.equal(buffers[name], before)
