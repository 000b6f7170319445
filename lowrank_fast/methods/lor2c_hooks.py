"""Attaching LoR2C to a model: hooks on its blocks and projections, slots for its tensors, and `LoR2C` itself.

Hooks, not wrapper modules: attribute access, state-dict keys, FSDP wrapping and hidden-state recorders stay as they
are. A hook of someone else that ran before ours (on a block, or on a module in it such as BERT's last LayerNorm) may
have kept the tensor that the update would go into: such a block is updated in a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..nn.inplace import first_tensor, hooked
from ..nn.weights import Down, positive
from .blocks import Projections, find_layers, find_projections, hidden_size
from .lor2c import Settings, Slot, Topology


class BlockHooks:
    """The hooks of one block; `active()` yields the topologies to run and whether they are in training."""

    keeps_outputs = False

    def __init__(self, layer: int, active: Callable[[], Iterable[tuple[Topology, bool]]]) -> None:
        self.layer = layer
        self.active = active
        self._watched, self._looked_at = False, -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_looked_at": -1}  # another process numbers its hooks anew

    def watched(self, module: nn.Module) -> bool:
        """Whether a hook may have kept the output of the block before ours ran.

        Looking through a block takes 15 us, so it is done again only after a hook was registered somewhere, or while
        there is one that could have been removed. A module that brings its hook along is missed if it is put into the
        block later.
        """
        if torch.compiler.is_compiling():
            return False  # nothing is updated in place there
        latest = RemovableHandle.next_id
        if self._watched or self._looked_at != latest:
            self._watched, self._looked_at = hooked(module, self.after), latest
        return self._watched

    @staticmethod
    def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for topology, training in self.active():
            topology.before(self.layer, self._input(args, kwargs), training)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        y = hidden = first_tensor(output)
        active = list(self.active())
        writes = (t.settings.inplace and any(span.end == self.layer for span in t.spans) for t, _ in active)
        if any(writes) and self.watched(module):
            hidden = y.clone()
        for topology, training in active:
            hidden = topology.after(self.layer, self._input(args, kwargs), hidden, training)
        for topology, _ in active:
            topology.passed(self.layer, self._input(args, kwargs), hidden)
        if hidden is y:
            return output
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def install(self, block: nn.Module) -> list[Any]:
        """Handles; the forward hook goes first, so that recorders of hidden states see the update."""
        return [
            block.register_forward_pre_hook(self.before, with_kwargs=True),
            block.register_forward_hook(self.after, with_kwargs=True, prepend=True),
        ]


class ProjectionHook:
    """The hook of one q, v or fused projection."""

    keeps_outputs = False

    def __init__(
        self, layer: int, roles: tuple[str, ...], columns: Any, active: Callable[[], Iterable[tuple[Topology, bool]]]
    ) -> None:
        self.layer, self.roles, self.columns, self.active = layer, roles, columns, active

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        active = [(t, training) for t, training in self.active() if self.layer in t.injected]
        if any(t.settings.inplace for t, _ in active) and hooked(module, self.after):
            output = output.clone()
        for topology, training in active:
            output = topology.project(self.layer, self.roles, self.columns, args[0], output, training)
        return output


def install_projections(
    layer: int, projections: Projections, active: Callable[[], Iterable[tuple[Topology, bool]]]
) -> list[Any]:
    """Handles of the hooks on the q and v projections of one block."""
    if len(projections.modules) == 2:
        roles: tuple[tuple[str, ...], ...] = (("query",), ("value",))
    else:
        roles = (("query", "value"),)
    return [
        module.register_forward_hook(ProjectionHook(layer, role, columns, active).after)
        for (_, module, columns), role in zip(projections.modules, roles, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ construction


def share_groups(share: bool | dict[str, list[int]] | None, layers: int) -> dict[int, str]:
    """Block -> name of the group whose A it uses; blocks without an entry have their own.

    `share`: True for one A for all, or `{name: [blocks]}`. Raises ValueError for overlapping or impossible groups.
    """
    if not share:
        return {}
    groups = {"all": list(range(layers))} if share is True else share
    owner: dict[int, str] = {}
    for name, members in groups.items():
        for layer in members:
            if not 0 <= layer < layers:
                raise ValueError(f"share: group {name!r} names block {layer}; the model has blocks 0 to {layers - 1}")
            if layer in owner:
                raise ValueError(f"share: block {layer} is in {owner[layer]!r} and {name!r}; a block has one A")
            owner[layer] = name
    return owner


def uniform_hidden_size(model: nn.Module, blocks: Sequence[nn.Module]) -> int:
    """The hidden size of all `blocks`; ValueError if they differ."""
    sizes = [hidden_size(model, block) for block in blocks]
    if len(set(sizes)) > 1:
        first = next(i for i, d in enumerate(sizes) if d != sizes[0])
        raise ValueError(
            f"LoR2C needs blocks of one hidden size; block 0 has {sizes[0]}, block {first} has {sizes[first]}"
        )
    return sizes[0]


def make_slots(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    settings: Settings,
    share: bool | dict[str, list[int]] | None,
    inject: bool,
    targets: list[str] | None,
    dtype: torch.dtype | None = None,
) -> tuple[list[Slot], list[Projections | None]]:
    """A slot for each block, on its device, and its projections where injections may come.

    Everything is checked before the first slot is made.
    """
    positive("LoR2C", "r", settings.r)
    positive("LoR2C", "lora_r", settings.lora_r)
    d = uniform_hidden_size(model, blocks)
    owner = share_groups(share, len(blocks))
    projections = [find_projections(block, targets) if inject else None for block in blocks]
    downs: dict[str, Down] = {}
    slots = []
    for layer, block in enumerate(blocks):
        like = next((p for p in block.parameters() if p.is_floating_point()), None)
        device = None if like is None else like.device
        kind = dtype if dtype is not None or like is None else like.dtype
        down = None
        if layer in owner:
            down = downs.get(owner[layer])
            if down is None:
                down = downs[owner[layer]] = Down(d, settings.r, device=device, dtype=kind)
        slots.append(Slot(d, settings, down, projections[layer], device, kind))
    return slots, projections


class LoR2C(nn.Module):
    """LoR2C on any model, without PEFT: owns the slots, hooks the blocks, leaves the model's own parameters alone.

    Args:
        model: the model; freeze it yourself. layers: name of its list of blocks, found by itself when None.
        r, alpha, dropout: of every branch. share: one A for all blocks (True) or for `{name: [blocks]}`.
        injections: prepare q/v LoRA of rank r / 2 for `LoR2CController`.
        target_modules: names of query and value, or of one fused projection; found by name when None.
        inplace: update block outputs in place where that is safe.
    Raises: ValueError if the blocks or projections cannot be found, or sizes or groups do not fit.

    `enabled = False` switches the branches off; `remove()` takes the hooks out. `parameters()` are what to train.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layers: str | None = None,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        share: bool | dict[str, list[int]] = False,
        injections: bool = False,
        target_modules: list[str] | None = None,
        inplace: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _, blocks = find_layers(model, layers)
        lora_r = max(1, r // 2) if isinstance(r, int) else r
        settings = Settings(r, alpha, dropout, lora_r, alpha, dropout, inplace, seed)
        slots, projections = make_slots(model, list(blocks), settings, share, injections, target_modules)
        self.slots = nn.ModuleList(slots)
        self.topology = Topology(slots, settings, injections)
        self.enabled = True
        self._handles: list[Any] = []
        for layer, (block, found) in enumerate(zip(blocks, projections, strict=True)):
            self._handles += BlockHooks(layer, self._active).install(block)
            if found is not None:
                self._handles += install_projections(layer, found, self._active)

    def _active(self) -> list[tuple[Topology, bool]]:
        return [(self.topology, self.training)] if self.enabled else []

    def remove(self) -> None:
        """Take the hooks out of the model, which is then as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("LoR2C runs from hooks: call the model itself")
