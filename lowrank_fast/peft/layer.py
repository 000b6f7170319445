"""The linear layer that Lily and EffiLoRA wrap around a base layer: routing, merging, padding mask, shared inputs.

`base_layer` is anything with the shape of a linear layer: nn.Linear, transformers' Conv1D, quantised ones. Merging
needs its weight: nn.Linear and Conv1D.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from ..methods.blocks import linear_sizes
from ..nn.frozen import Hidden, frozen_linear, frozen_linear_of, shrink_rows
from ..nn.inplace import hooked
from ..nn.routed import add_branch
from ..nn.shared_input import SharedInput
from .padding import PaddingMask


def is_linear(module: nn.Module) -> bool:
    """Whether `module` has the sizes of a linear layer and is not an adapter's own."""
    try:
        linear_sizes(module)
    except ValueError:
        return False
    return True


class FastLinear(nn.Module, BaseTunerLayer):
    """Base of the adapter layers. Subclasses give `rows`, `branch`, `update`, `factors` and the tensors."""

    other_param_names: tuple[str, ...] = ("r", "scaling", "dropout", "groups")

    def __init__(self, base_layer: nn.Module, padding: PaddingMask) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_sizes(self.get_base_layer())
        self.padding = padding
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.groups: dict[str, tuple[SharedInput, int]] = {}
        self.merged_adapters = []
        self._merged_deltas: dict[str, Tensor] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []

    # ------------------------------------------------------------------------------------------ forward

    def rows(self, adapter: str, with_dropout: bool) -> list[Tensor]:
        """The matrices this layer multiplies its input with; with dropout, those that see it through the mask."""
        raise NotImplementedError

    def branch(self, adapter: str, x: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The update as `hidden [.., k]` and `up [d_out, k]`, from the shrink `parts` of `rows`."""
        raise NotImplementedError

    def update(self, adapter: str, y: Tensor, x: Tensor, inplace: bool) -> Tensor:
        """`y` with the whole update, shrink included, in one operation; in place where that is safe, if `inplace`."""
        raise NotImplementedError

    def scale(self, adapter: str) -> float:
        """Factor of the update."""
        return self.scaling[adapter]

    def rows_of(self, adapter: str) -> Callable[[bool], list[Tensor]]:
        """`rows` with the adapter filled in."""
        return partial(self.rows, adapter)

    def shared(self, adapter: str, x: Tensor, dtype: torch.dtype) -> Hidden | None:
        """This layer's share of the fused shrink of its group; None where it must do its own."""
        if adapter not in self.groups or len(self.active_adapters) != 1:
            return None
        group, member = self.groups[adapter]
        return group.take(member, x, dtype, self.dropout[adapter], self.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the updates of the active adapters."""
        if self._disable_adapters and self.merged:
            self.unmerge()
        names = (
            [] if self._disable_adapters or self.merged else [name for name in self.active_adapters if name in self.r]
        )
        linear = frozen_linear_of(self.base_layer, x) if len(names) == 1 and not (args or kwargs) else None
        if linear is not None:
            return self._with_frozen(linear, names[0], x)
        y = self.base_layer(x, *args, **kwargs)
        inplace = not hooked(self.base_layer)  # a forward hook may have kept y
        for name in names:
            source = self.shared(name, x, y.dtype)
            if source is None:
                y = self.update(name, y, x, inplace)
            else:
                y = add_branch(y, x, *self.branch(name, x, source.parts), self.scale(name), inplace=inplace)
        return y

    def _with_frozen(self, linear: nn.Linear, name: str, x: Tensor) -> Tensor:
        source = self.shared(name, x, x.dtype)
        if source is None:
            p = self.dropout[name] if self.training else 0.0
            source = shrink_rows(x, self.rows(name, p > 0.0), p)
        return frozen_linear(linear, source, *self.branch(name, x, source.parts), self.scale(name))

    # ------------------------------------------------------------------------------------------ merging

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        """A `[r, d_in]`, B `[d_out, r]` and the scale of an equivalent LoRA; RuntimeError where there is none."""
        raise NotImplementedError

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`scale * B A`, in the layout of the base weight, computed in float32 or wider."""
        A, B, scale = self.factors(adapter)
        kind = torch.float64 if A.dtype is torch.float64 else torch.float32
        delta = scale * (B.detach().to(kind) @ A.detach().to(kind))
        return delta.mT if type(self.get_base_layer()).__name__ == "Conv1D" else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the base weight. Raises RuntimeError for routers that depend on the input."""
        names = check_adapters_to_merge(self, adapter_names)
        weight = getattr(self.get_base_layer(), "weight", None)
        deltas = {}
        for name in names:
            if name in self.r:
                if weight is None or not weight.is_floating_point():
                    kind = type(self.get_base_layer()).__name__
                    raise NotImplementedError(f"merging into {kind} is not supported; export_lora and let PEFT merge")
                deltas[name] = self.get_delta_weight(name)
        for name, delta in deltas.items():
            assert weight is not None
            kept = weight.data
            merged = (kept.to(delta.dtype) + delta).to(kept.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(f"merging {name!r} gives weights that are not finite")
            self._merged_deltas[name] = kept.clone()
            weight.data = merged
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the base weight back, bit for bit; in the dtype and on the device that it has now."""
        weight: Any = self.get_base_layer().weight
        while self.merged_adapters:
            weight.data = self._merged_deltas.pop(self.merged_adapters.pop()).to(weight)
