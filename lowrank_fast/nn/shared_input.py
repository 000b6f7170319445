"""Several adapters that read the same tensor: one shrink with concatenated rows, one `dx`.

q, k and v read one `x`; gate and up another. Each adapter alone reads `x` [T, d_in] in its forward, reads it again in
its backward and produces a `dx` of its own, which autograd then adds up. `SharedInput` computes

    t = x [A_1; A_2; ...]^T          one read of x forward; one read of x and one dx backward

when the first member is called, and hands each member its columns. For n members that saves n - 1 reads of `x` in each
direction, n - 1 writes of `dx` and n - 1 additions of `[T, d_in]` tensors; members on frozen linear layers save the
additions of the layers' own gradients too (see `frozen`). Rows that several members share (EffiLoRA's one `A`) are
computed once.

Members recognise the shared input by identity of the tensor object, its version and the grad mode. If they turn out to
read different tensors the group dissolves for good, at the price of one wasted shrink; under non-reentrant
checkpointing that step fails, for it is recomputed by the other path. Hence q is no member in cross attention, as far
as names tell.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .frozen import Hidden, shrink_rows

# Names of sibling layers that read one tensor in the models at hand.
SIBLINGS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("to_q", "to_k", "to_v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
# Cross attention, whose q reads another tensor than k and v: in T5, BART and Whisper, BERT and GPT-2.
_CROSS = re.compile(r"EncDecAttention|encoder_attn|cross_?attn|cross_?attention", re.IGNORECASE)


def sibling_groups(names: Sequence[str]) -> list[list[str]]:
    """Those of the dotted module `names` that share an input by naming convention, in groups of two or more."""
    by_parent: dict[str, dict[str, str]] = {}
    for name in names:
        parent, _, leaf = name.rpartition(".")
        by_parent.setdefault(parent, {})[leaf] = name
    groups = []
    for parent, children in by_parent.items():
        for siblings in SIBLINGS:
            readers = siblings[1:] if len(siblings) == 3 and _CROSS.search(parent) else siblings
            found = [children[leaf] for leaf in readers if leaf in children]
            if len(found) > 1:
                groups.append(found)
    return groups


def layer_index(name: str) -> int | None:
    """The first number among the parts of a dotted module name: the layer it belongs to."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None


def _identity(block: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same numbers with the same claim to a gradient."""
    return block.data_ptr(), tuple(block.shape), block.stride(), block.requires_grad


class SharedInput:
    """The common shrink of several members, numbered from 0 in the order in which they are called.

    Args:
        rows: for each member, a callable that returns its row blocks `[r_i, d_in]`; members may return the same tensor.
            It is told whether dropout is on: rows that must see `x` without it are left out then.
    """

    def __init__(self, rows: Sequence[Callable[[bool], list[Tensor]]]) -> None:
        self._rows = list(rows)
        self._input: weakref.ref[Tensor] | None = None
        self._key: tuple[object, ...] = ()
        self._parts: dict[int, list[Tensor]] = {}
        self._reader: list[Tensor] = []
        self.dissolved = False

    def __getstate__(self) -> dict[str, object]:
        # A copy or a file takes no activations along; the weak reference could not be pickled either.
        return {**self.__dict__, "_input": None, "_parts": {}, "_reader": []}

    def take(
        self, member: int, x: Tensor, dtype: torch.dtype, dropout_p: float = 0.0, training: bool = False
    ) -> Hidden | None:
        """The columns `x rows^T  [.., r_i]` of a member, one part per row block; None if it must do its own shrink.

        `dtype` is that of the stream, in which `x` is read. One dropout mask serves the whole group.
        """
        if self.dissolved or torch.compiler.is_compiling():
            return None
        key = (0 if x.is_inference() else x._version, torch.is_grad_enabled(), dtype, training, dropout_p)
        same = self._input is not None and self._input() is x and key == self._key
        if same and member in self._parts:
            hidden = Hidden(self._parts.pop(member), self._reader)
            if not self._parts:
                self._input, self._reader = None, []
            return hidden
        if self._parts and member != 0:  # called with something else than the first member was
            self.dissolved, self._parts, self._input, self._reader = True, {}, None, []
            return None
        if member != 0:
            return None
        return self._compute(x, dtype, key, dropout_p if training else 0.0)

    def _compute(self, x: Tensor, dtype: torch.dtype, key: tuple[object, ...], dropout_p: float) -> Hidden | None:
        wanted = [rows(dropout_p > 0.0) for rows in self._rows]
        unique = {_identity(block): block for blocks in wanted for block in blocks}
        if len({block.dtype for block in unique.values()}) > 1:
            self.dissolved = True
            return None
        hidden = shrink_rows(x.to(dtype), list(unique.values()), dropout_p)
        columns = dict(zip(unique, hidden.parts, strict=True))
        self._parts = {i: [columns[_identity(block)] for block in blocks] for i, blocks in enumerate(wanted) if i}
        if self._parts:
            self._input, self._key, self._reader = weakref.ref(x), key, hidden.reader
        return Hidden([columns[_identity(block)] for block in wanted[0]], hidden.reader)
