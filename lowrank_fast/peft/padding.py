"""The padding mask of a transformer's forward, for layers that are not handed one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class PaddingMask:
    """The 2-D attention mask of the forward that runs now, or whose parts a checkpointed backward runs again.

    A hook on the model catches the mask, another forgets it after the forward and leaves it at the nodes that made the
    outputs. A backward begins at these, and the engine finishes what a later forward made before it turns to an earlier
    one: so the node that was passed last says whose forward is being recomputed.
    """

    def __init__(self) -> None:
        self._watching = False  # without hooks on a model there is no mask
        self._running = False
        self._mask: Tensor | None = None
        self._again: tuple[Tensor | None] | None = None  # the mask of the forward that is differentiated, where known

    def __getstate__(self) -> dict[str, Any]:
        return {"_watching": self._watching, "_running": False, "_mask": None, "_again": None}

    def watch(self, model: nn.Module) -> list[Any]:
        """Handles of the hooks on `model`, whose keyword or second argument is the mask."""
        self._watching = True
        return [
            model.register_forward_pre_hook(self.enter, with_kwargs=True),
            model.register_forward_hook(self.leave, always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward of the model."""
        mask = kwargs.get("attention_mask")
        if mask is None and len(args) > 1 and isinstance(args[1], Tensor):
            mask = args[1]  # transformers models take (input_ids, attention_mask, ...)
        self._running, self._again = True, None  # nothing of a backward that failed
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After a forward of the model, a failed one too."""
        mask, self._running, self._mask = self._mask, False, None
        if torch.compiler.is_compiling():
            return
        found = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        for value in found:
            if isinstance(value, Tensor) and value.grad_fn is not None:
                value.grad_fn.register_prehook(partial(self._differentiating, mask))

    def _differentiating(self, mask: Tensor | None, gradients: Any) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._differentiated)
        self._again = (mask,)

    def _differentiated(self) -> None:
        self._again = None

    def current(self) -> Tensor | None:
        """The mask of the forward that runs now, or is run again; None outside of one.

        Raises: RuntimeError in a backward that did not begin at an output of the model.
        """
        if self._running or torch.compiler.is_compiling():
            return self._mask
        if not self._watching or torch._C._current_graph_task_id() == -1:
            return None
        if self._again is not None:
            return self._again[0]
        raise RuntimeError(
            "Lily: a part of the model is run again (gradient checkpointing) in a backward that did not begin at an "
            "output of the model, so its attention mask is not known; use an output, or routing='token'"
        )

    def folded(self, x: Tensor) -> tuple[int, int] | None:
        """`(b, n)` where `x [b n, d]` holds the tokens of a batch in one list, as OPT's fc1 gets them; else None."""
        mask = self.current() if x.dim() == 2 else None
        if mask is None or mask.shape[1] < 2 or mask.numel() != x.shape[0]:
            return None
        return mask.shape[0], mask.shape[1]

    def tokens(self, x: Tensor) -> Tensor | None:
        """bool `[b, n]` for `x [b, n, d]`; None without a mask that fits. With a KV cache: the last n columns."""
        mask = self.current() if x.dim() == 3 else None
        if mask is None or mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            return None
        return mask[:, -x.shape[1] :].to(x.device) != 0
