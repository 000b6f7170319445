"""Memory layouts of equal values, guarded buffers, poisoned allocations, and what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

ACTIVATION_LAYOUTS = ("contiguous", "padded_rows", "offset", "transposed_leading", "inner_stride")
PARAMETER_LAYOUTS = ("contiguous", "padded_rows", "offset", "transposed")
NAN = float("nan")


def _buffer(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.full(shape, NAN, dtype=values.dtype, device=values.device)


def _padded_rows(values: Tensor) -> Tensor:
    *leading, d = values.shape
    return _buffer(values, (*leading, d + 5))[..., 3 : 3 + d]


def _offset(values: Tensor) -> Tensor:
    return _buffer(values, (values.numel() + 7,))[1 : 1 + values.numel()].view(values.shape)


def _transposed_leading(values: Tensor) -> Tensor:
    shape = values.shape
    if len(shape) < 3:
        return _padded_rows(values)
    return _buffer(values, (shape[1], shape[0], *shape[2:])).transpose(0, 1)


def _inner_stride(values: Tensor) -> Tensor:
    *leading, d = values.shape
    return _buffer(values, (*leading, 2 * d))[..., ::2]


def _transposed(values: Tensor) -> Tensor:
    *leading, rows, columns = values.shape
    return _buffer(values, (*leading, columns, rows)).transpose(-1, -2)


_VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda values: _buffer(values, tuple(values.shape)),
    "padded_rows": _padded_rows,
    "offset": _offset,
    "transposed_leading": _transposed_leading,
    "inner_stride": _inner_stride,
    "transposed": _transposed,
}


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in other memory, with NaN in every gap; "expanded" repeats the first token with stride 0.

    "transposed" of a bank `[E, d_out, r]` is the view that PEFT's Lily has of its `[E r, d_out]` weight.
    """
    if layout == "expanded":
        if values.dim() < 2 or values.numel() == 0:
            return values
        return values.reshape(-1, values.shape[-1])[0].expand(values.shape)
    view = _VIEWS[layout](values)
    return view.copy_(values)


@dataclass
class Guarded:
    """A view to be written (`view`) inside a larger buffer whose other elements must keep their bits."""

    view: Tensor
    buffer: Tensor
    outside: Tensor
    before: Tensor

    def assert_only_the_view_changed(self) -> None:
        now = self.buffer[self.outside]
        assert torch.equal(now, self.before), (
            f"{int((now != self.before).sum())} elements outside the view were written"
        )


def guarded(values: Tensor, layout: str = "padded_rows", guard: int = 64) -> Guarded:
    """`values` in a view of a buffer with `guard` sentinels before and after, and sentinels in its gaps."""
    room = laid_out(values, layout)
    reach = sum((n - 1) * s for n, s in zip(room.shape, room.stride(), strict=True)) + 1 if values.numel() else 0
    buffer = torch.full((reach + 2 * guard,), 7.5, dtype=values.dtype, device=values.device)
    view = buffer.as_strided(room.shape, room.stride(), guard)
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=values.device)
    outside.as_strided(room.shape, room.stride(), guard).fill_(False)
    view.copy_(values)
    return Guarded(view, buffer, outside, buffer[outside].clone())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Allocations made inside come filled with NaN, in Python and in C++, so that an element left unwritten shows."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = filled


@contextmanager
def kept_for_backward(besides: tuple[Tensor, ...]) -> Iterator[list[Tensor]]:
    """Collects the tensors that autograd saves inside the block, but for those that share storage with `besides`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
