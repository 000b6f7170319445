"""Routing the LoRA and Lily layers of an existing PEFT model through the fused operations.

    report = accelerate_adapters(model); print(report)
    restore_adapters(model)

Only the `forward` of each layer instance is replaced: parameters, names, checkpoints, merging and switching stay
PEFT's. A call that the fused path does not cover (merged, disabled, `adapter_names=`, an active adapter with DoRA or a
bias, whenever it was added) goes to PEFT's own forward.
PEFT copies the activations to float32 where adapters are float32 beside a 16-bit model; here the kernels convert in
registers.

Dropout masks come from a counter-based generator: the same distribution as nn.Dropout, other bits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.lily.layer import Linear as PeftLilyLinear
from peft.tuners.lora.layer import VARIANT_KWARG_KEYS
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..nn.frozen import Hidden, frozen_linear, frozen_linear_of, shrink_rows
from ..nn.inplace import hooked
from ..nn.routed import add_branch, branch, routed_update
from ..nn.shared_input import SharedInput, sibling_groups
from .layer import FastLinear
from .lor2c import LoR2CLayer

_MARK = "_lowrank_fast_group"
_PEFTS_KEYWORDS = ("adapter_names", *VARIANT_KWARG_KEYS)  # not for the base layer; only PEFT's own forward knows them


@dataclass(frozen=True)
class AccelerationReport:
    """Which layers were taken, and which not and why; `partly`: why adapters of a taken layer stay PEFT's."""

    taken: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    shared_inputs: int = 0
    partly: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"accelerated {len(self.taken)} adapter layers; {self.shared_inputs} groups share one input"]
        for action, layers in (("left {} as they are", self.refused), ("of those, {} only in part", self.partly)):
            reasons: dict[str, list[str]] = {}
            for name, reason in layers.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"{action.format(len(names))}: {reason} ({shown})")
        return "\n".join(lines)


def _is_ours(forward: Any) -> bool:
    return isinstance(forward, partial) and forward.func is _forward


def _refusal(layer: Any) -> str | None:
    """Why a tuner layer cannot be taken, whatever its adapters; None when it can."""
    if type(layer) not in (PeftLilyLinear, PeftLoraLinear):
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__} has no fused form here"
    forward = layer.__dict__.get("forward")
    known = forward is None or _is_ours(forward) or getattr(forward, "__func__", None) is type(layer).forward
    if not known and _MARK not in layer.__dict__:  # with the mark it wraps ours
        return "its forward was replaced before, which acceleration would undo (accelerate's hooks do that)"
    return None


def _apart(layer: Any) -> dict[str, str]:
    """Adapter -> why it goes through PEFT's own forward, for those of the `layer` that do."""
    reasons = {name: _kind(layer).refusal(layer, name) for name in _kind(layer).names(layer)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _plain_call(layer: Any, kind: type[_Lora] | type[_Lily], kwargs: dict[str, Any]) -> bool:
    if not hasattr(layer, _MARK):  # restored, but something that wrapped this forward still calls it
        return False
    if layer.disable_adapters or layer.merged:
        return False
    if kwargs and any(kwargs.get(key) is not None for key in _PEFTS_KEYWORDS):
        return False
    return all(kind.fused(layer, name) for name in layer.active_adapters)


class _Lora:
    """What differs between methods: the tensors of one LoRA adapter of a layer."""

    @staticmethod
    def names(layer: Any) -> list[str]:
        return list(layer.lora_A)

    @staticmethod
    def holds(layer: Any, adapter: str) -> bool:
        return adapter in layer.lora_A

    @staticmethod
    def fused(layer: Any, adapter: str) -> bool:
        return adapter not in layer.lora_variant and not layer.lora_bias.get(adapter)

    @staticmethod
    def refusal(layer: Any, adapter: str) -> str | None:
        if adapter in layer.lora_variant:
            return f"it uses {type(layer.lora_variant[adapter]).__name__} (DoRA and other variants)"
        return "its lora_B has a bias" if layer.lora_bias.get(adapter) else None

    @staticmethod
    def dropout(layer: Any, adapter: str) -> float:
        module = layer.lora_dropout[adapter]
        return module.p if isinstance(module, nn.Dropout) and module.training else 0.0

    @staticmethod
    def down(layer: Any, adapter: str) -> Tensor:
        return layer.lora_A[adapter].weight

    @staticmethod
    def bank(layer: Any, adapter: str) -> tuple[Tensor, Tensor | None]:
        return layer.lora_B[adapter].weight[None], None

    @staticmethod
    def branch(layer: Any, adapter: str, t: Tensor) -> tuple[Tensor, Tensor]:
        return t, layer.lora_B[adapter].weight


class _Lily:
    """The same for PEFT's Lily."""

    @staticmethod
    def names(layer: Any) -> list[str]:
        return list(layer.lily_A)

    @staticmethod
    def holds(layer: Any, adapter: str) -> bool:
        return adapter in layer.lily_A

    @staticmethod
    def fused(layer: Any, adapter: str) -> bool:
        return True

    @staticmethod
    def refusal(layer: Any, adapter: str) -> str | None:
        return None

    @staticmethod
    def dropout(layer: Any, adapter: str) -> float:
        return 0.0

    @staticmethod
    def down(layer: Any, adapter: str) -> Tensor:
        return layer.lily_A[adapter].weight

    @staticmethod
    def bank(layer: Any, adapter: str) -> tuple[Tensor, Tensor | None]:
        stacked = layer.lily_B[adapter].weight
        bank = stacked.view(layer.num_B[adapter], -1, stacked.shape[1]).transpose(1, 2)  # [E, d_out, r], no copy
        return bank, layer.lily_router[adapter].weight

    @staticmethod
    def branch(layer: Any, adapter: str, t: Tensor) -> tuple[Tensor, Tensor]:
        return branch(t, *_Lily.bank(layer, adapter), routing="batch")


def _kind(layer: Any) -> type[_Lora] | type[_Lily]:
    return _Lily if isinstance(layer, PeftLilyLinear) else _Lora


def _rows(layer: Any, with_dropout: bool) -> list[Tensor]:
    return [_kind(layer).down(layer, layer.active_adapters[0])]


def _shared(layer: Any, adapters: list[str], dropout_p: float, x: Tensor, dtype: torch.dtype) -> Hidden | None:
    """The fused shrink. Not with dropout: PEFT draws one mask per layer, a group would draw one for all."""
    found = getattr(layer, _MARK)
    if found is None or len(layer.active_adapters) != 1 or dropout_p > 0.0:
        return None
    group, member = found
    if member == 0 and not all(_kind(m).holds(m, adapters[0]) and _kind(m).fused(m, adapters[0]) for m in group.layers):
        return None
    return group.take(member, x, dtype)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    kind = _kind(self)
    if not _plain_call(self, kind, kwargs):
        return type(self).forward(self, x, *args, **kwargs)
    if hasattr(self, "_check_forward_args"):
        self._check_forward_args(x, *args, **kwargs)
    for key in _PEFTS_KEYWORDS:
        kwargs.pop(key, None)
    adapters = [name for name in self.active_adapters if kind.holds(self, name)]
    linear = frozen_linear_of(self.base_layer, x) if len(adapters) == 1 and not (args or kwargs) else None
    if linear is not None:
        return _with_frozen(self, kind, linear, adapters[0], x)
    y = self.base_layer(x, *args, **kwargs)
    inplace = not hooked(self.base_layer)
    for name in adapters:
        p = kind.dropout(self, name)
        source = _shared(self, adapters, p, x, y.dtype)
        if source is not None:
            y = add_branch(y, x, *kind.branch(self, name, source.parts[0]), self.scaling[name], inplace=inplace)
        else:
            bank, router = kind.bank(self, name)
            y = routed_update(
                y, x, kind.down(self, name), bank, router, self.scaling[name], routing="batch", dropout_p=p,
                training=p > 0.0, inplace=inplace,
            )  # fmt: skip
    return y


def _with_frozen(layer: Any, kind: type[_Lora] | type[_Lily], linear: nn.Linear, name: str, x: Tensor) -> Tensor:
    p = kind.dropout(layer, name)
    source = _shared(layer, [name], p, x, x.dtype)
    if source is None:
        source = shrink_rows(x, [kind.down(layer, name)], p)
    return frozen_linear(linear, source, *kind.branch(layer, name, source.parts[0]), layer.scaling[name])


def accelerate_adapters(model: nn.Module, *, fuse_inputs: bool = True, verbose: bool = True) -> AccelerationReport:
    """Route the LoRA and Lily layers of `model` through the fused operations; `restore_adapters` undoes it.

    Args:
        model: a PEFT model, or any model with PEFT's layers in it.
        fuse_inputs: one shrink for layers that read the same tensor (q, k, v; gate, up).
        verbose: print the report.

    Returns: which layers were taken, and which not and why. Calling it twice changes nothing; calling it after adapters
    were added or deleted brings the groups and the report up to date.
    """
    taken: dict[str, Any] = {}
    refused: dict[str, str] = {}
    partly: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, (FastLinear, LoR2CLayer)):
            continue
        reason = _refusal(layer)
        apart = {} if reason is not None else _apart(layer)
        if reason is None and apart and len(apart) == len(_kind(layer).names(layer)):
            reason = next(iter(apart.values()))
        if reason is not None:
            refused[name] = reason
            _restore(layer)
            continue
        if apart:
            partly[name] = "; ".join(f"{adapter!r} stays PEFT's: {why}" for adapter, why in apart.items())
        taken[name] = layer
        if _MARK not in layer.__dict__ or "forward" not in layer.__dict__:
            # Not a bound method, which pickle would look up by name on the layer.
            object.__setattr__(layer, "forward", partial(_forward, layer))
        object.__setattr__(layer, _MARK, None)
    groups = _group(taken) if fuse_inputs else 0
    report = AccelerationReport(list(taken), refused, groups, partly)
    if verbose:
        print(report)
    return report


class _Group(SharedInput):
    """A `SharedInput` that knows its layers."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__([partial(_rows, layer) for layer in layers])
        self.layers = layers


def _group(taken: dict[str, Any]) -> int:
    count = 0
    for names in sibling_groups(list(taken)):
        members = [taken[name] for name in names]
        if len({type(m) for m in members}) == 1 and len({m.in_features for m in members}) == 1:
            group = _Group(members)
            count += 1
            for i, member in enumerate(members):
                object.__setattr__(member, _MARK, (group, i))
    return count


def _restore(layer: Any) -> bool:
    if _MARK not in layer.__dict__:
        return False
    object.__delattr__(layer, _MARK)
    if _is_ours(layer.__dict__.get("forward")):  # else something wrapped it, and `_plain_call` steps aside
        object.__delattr__(layer, "forward")
    return True


def restore_adapters(model: nn.Module) -> int:
    """Give the layers that `accelerate_adapters` took their own forward back; returns how many."""
    return sum([_restore(layer) for layer in model.modules()])


__all__ = ["AccelerationReport", "accelerate_adapters", "restore_adapters"]
