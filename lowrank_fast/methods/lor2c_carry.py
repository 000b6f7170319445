"""What a LoR2C span over several blocks carries from its first block to its last: the `t` of the right forward.

In a forward the latest `t = h_start A^T [.., r]` is the right one. Where the hooks run inside a checkpoint, blocks are
run again in backward, and another forward may have come in between. So a forward also notes `t`, without its graph,
under each tensor that enters a block inside the span: a recomputation begins with that tensor, or with one of its
memory, and finds `t` there. Notes are weak: they go with the tensor. Within a recomputation `t` is handed on from the
tensor that a block reads to the one it returns, and dropped when the backward ends.

A recomputed block whose input is unknown
(the checkpoint begins with something else than a block, or is reentrant, or its inputs were moved to another device)
raises: it cannot be told whose forward it is, and a guess would be a wrong gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

# (first block, last block, block whose slot holds A and B)
Key = tuple[int, int, int]


def _in_backward() -> bool:
    return bool(torch._C._current_graph_task_id() != -1)


def _place(x: Tensor) -> tuple[object, ...]:
    """Where in its memory a tensor is."""
    return x.storage_offset(), tuple(x.shape), x.stride()


class Carried:
    """The `t` of each span on its way, and notes of those that a recomputation may ask for.

    Under `torch.compile` only `start` and `take` may be called: recomputation is the compiler's own there.
    """

    def __init__(self) -> None:
        self._running: dict[Key, tuple[Tensor, bool]] = {}  # of the latest forward: t, whether it was recorded
        self._notes = WeakIdKeyDictionary()  # memory of a block's input -> place in it -> key -> (t, recorded)
        self._again: dict[Key, tuple[Tensor, Tensor, bool]] = {}  # of a recomputation: under what, t, recorded

    def __deepcopy__(self, memo: object) -> Carried:
        return Carried()

    def __reduce__(self) -> tuple[type[Carried], tuple[()]]:
        return Carried, ()

    def held(self) -> int:
        """How many entries there are; 0 when nothing is kept alive."""
        return len(self._running) + len(self._notes) + len(self._again)

    def start(self, key: Key, x: Tensor, t: Tensor) -> None:
        """The first block of a span reads `x`, and `t` leaves it."""
        if torch.compiler.is_compiling() or not _in_backward():
            self._running[key] = (t, torch.is_grad_enabled())
        else:
            self._hand_on(key, x, t, torch.is_grad_enabled())

    def _hand_on(self, key: Key, x: Tensor, t: Tensor, recorded: bool) -> None:
        if not self._again:
            # The recomputation of a first block alone ends here, and what it handed on must not stay.
            torch.autograd.Variable._execution_engine.queue_callback(self._again.clear)
        self._again[key] = (x, t, recorded)

    def enter(self, keys: Iterable[Key], x: Tensor) -> None:
        """`x` enters a block inside the spans `keys`: in a forward, note what they carry."""
        if torch.is_grad_enabled() and not _in_backward():
            for key in keys:
                self._note(key, x, self._running.get(key))

    def leave(self, keys: Iterable[Key], x: Tensor, y: Tensor) -> None:
        """A block inside the spans `keys`, or their first, has read `x` and returns `y`: in backward, pass it on."""
        if not _in_backward():
            return
        for key in keys:
            entry = self._find(key, x)
            if entry is not None:
                self._hand_on(key, y, *entry)
                self._note(key, y, entry)  # for a checkpoint inside the one that is being recomputed

    def _note(self, key: Key, x: Tensor, entry: tuple[Tensor, bool] | None) -> None:
        if entry is not None:
            t, recorded = entry
            places: dict[Any, Any] = self._notes.setdefault(x.untyped_storage(), {})
            places.setdefault(_place(x), {})[key] = (t.detach().requires_grad_(t.requires_grad), recorded)

    def _find(self, key: Key, x: Tensor) -> tuple[Tensor, bool] | None:
        handed = self._again.get(key)
        if handed is not None and handed[0] is x:
            return handed[1:]
        return self._notes.get(x.untyped_storage(), {}).get(_place(x), {}).get(key)

    def take(self, key: Key, x: Tensor, trained: bool) -> Tensor:
        """The `t` of a span at its last block, which reads `x`; `trained`: whether A is.

        Raises: RuntimeError if there is none, or if it was computed without the gradient that A needs.
        """
        if torch.compiler.is_compiling():
            return self._running.pop(key)[0]
        again = _in_backward()
        entry = self._find(key, x) if again else self._running.pop(key, None)
        first, last, _ = key
        if entry is None and not again:
            raise RuntimeError(
                f"LoR2C: a span leads from block {first} to {last}; block {first} must run before block {last}"
            )
        lost = f"LoR2C: the span from block {first} to {last} would lose its gradient: "
        if entry is None:
            raise RuntimeError(
                f"{lost}block {last} is recomputed from another tensor than it was given, so it cannot be told whose "
                "forward it is. Checkpoint blocks themselves, or runs of blocks, and with "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        t, recorded = entry
        if torch.is_grad_enabled() and not recorded and trained:
            raise RuntimeError(
                f"{lost}block {first} ran without gradients, in reentrant checkpointing or under no_grad, and block "
                f"{last} with them; use gradient_checkpointing_kwargs={{'use_reentrant': False}}"
            )
        return t
