"""LoR2C as a PEFT tuner: one `LoR2CLayer` beside each transformer block, driven by hooks on the block.

Unlike other tuners nothing is replaced: the layer is a child named `lor2c` of the block. The structure (spans, injected
layers, what the controller did) is saved with the tensors as JSON in `lor2c_manifest`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..methods.blocks import Projections, find_layers, find_projections
from ..methods.lor2c import Settings, Slot, Topology, read_manifest
from ..methods.lor2c_controller import LoR2CController, check_plan
from ..methods.lor2c_hooks import BlockHooks, install_projections, make_slots, uniform_hidden_size
from .config import LoR2CConfig
from .lookup import adapter_of_kind
from .tuner import PREFIX, FastTuner

CHILD = "lor2c"


class LoR2CLayer(nn.Module, BaseTunerLayer):
    """The slots of all adapters at one block."""

    adapter_layer_names = ("lor2c_slot",)
    other_param_names = ("lor2c_topologies",)

    def __init__(self, layer: int, block: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.lor2c_slot = nn.ModuleDict({})
        self.lor2c_topologies: dict[str, Topology] = {}
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.handles = BlockHooks(layer, self.running).install(block)
        self.projection_handles: dict[str, list[Any]] = {}

    def running(self, only: str | None = None) -> list[tuple[Topology, bool]]:
        """The topologies of the active adapters, or of one of them if it is active, and whether dropout is on."""
        if self._disable_adapters:
            return []
        names = [a for a in self.active_adapters if a in self.lor2c_topologies and only in (None, a)]
        return [(self.lor2c_topologies[a], self.training) for a in names]

    def add(self, adapter_name: str, slot: Slot, topology: Topology, projections: Projections | None) -> None:
        """Take the slot of a new adapter, and hook its projections: other adapters may have others, or other roles."""
        self.lor2c_slot[adapter_name] = slot
        self.lor2c_topologies[adapter_name] = topology
        if projections is not None:
            own = partial(self.running, adapter_name)
            self.projection_handles[adapter_name] = install_projections(self.layer, projections, own)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; the adapter's hooks go too."""
        self._unhook(adapter_name)
        super().delete_adapter(adapter_name)

    def _unhook(self, adapter_name: str) -> None:
        for handle in self.projection_handles.pop(adapter_name, ()):
            handle.remove()

    def remove_hooks(self) -> None:
        """Leave the block as it was."""
        for adapter_name in list(self.projection_handles):
            self._unhook(adapter_name)
        for handle in self.handles:
            handle.remove()

    def get_base_layer(self) -> nn.Module:
        return self

    @property
    def weight(self) -> Tensor:
        """Some parameter, which tells PEFT device and dtype. Raises AttributeError if there is no adapter."""
        for parameter in self.parameters():
            return parameter
        raise AttributeError("this LoR2CLayer has no adapter, hence no weight")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("LoR2C runs from hooks on its block")


class LoR2CModel(FastTuner):
    """The tuner of `LoR2CConfig`; see `lowrank_fast.methods.lor2c`."""

    prefix = "lor2c_"
    tuner_layer_cls = LoR2CLayer
    state_suffix = "lor2c_manifest"
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (PEFT's declaration)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_config(self, config: Any, model: nn.Module) -> None:
        name, blocks = find_layers(model, config.layers)
        check_plan(len(blocks), config.r, config.max_merges, config.max_injections, config.sfs_k, config.auto_threshold)
        uniform_hidden_size(model, list(blocks))
        if config.max_injections:
            for block in blocks:
                find_projections(block, config.target_modules)
        config._blocks = [f"{name}.{i}" for i in range(len(blocks))]

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return key in peft_config._blocks

    def _check_target_module_compatiblity(self, peft_config: Any, model: nn.Module, target_name: str) -> None:
        """Any block will do: nothing in it is replaced."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = peft_config._blocks.index(current_key)
        if layer == 0:
            self._build(peft_config, parent)
        slots, projections, topology = peft_config._built
        if not hasattr(target, CHILD):
            target.add_module(CHILD, LoR2CLayer(layer, target))
        own: LoR2CLayer = getattr(target, CHILD)
        own.add(adapter_name, slots[layer], topology, projections[layer])
        if adapter_name not in self.active_adapters:
            slots[layer].requires_grad_(False)

    def _build(self, config: Any, blocks: nn.Module) -> None:
        alpha, dropout = config.lora_alpha, config.lora_dropout
        settings = Settings(
            r=config.r,
            alpha=alpha,
            dropout=dropout,
            lora_r=max(1, config.r // 2),
            lora_alpha=alpha if config.injected_alpha is None else config.injected_alpha,
            lora_dropout=dropout if config.injected_dropout is None else config.injected_dropout,
            inplace=config.inplace,
            seed=config.seed,
        )
        inject = bool(config.max_injections)
        listed = list(blocks.children())
        slots, projections = make_slots(self.model, listed, settings, config.share, inject, config.target_modules)
        config._built = (slots, projections, Topology(slots, settings, inject))

    def _after_injection(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        del config._built, config._blocks

    def _remove_layer(self, model: nn.Module, name: str, layer: Any) -> None:
        layer.remove_hooks()
        parent = model.get_submodule(name.rpartition(".")[0])
        delattr(parent, CHILD)

    def unload(self) -> nn.Module:
        """The model without hooks and adapters."""
        for name, layer in list(self._layers(self.model)):
            self._remove_layer(self.model, name, layer)
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        raise NotImplementedError(
            "LoR2C cannot be merged into the weights: its branch runs parallel to a whole block, whose skip path has "
            "no weight to take it up. Keep the adapter, or unload() to drop it."
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self.merge_and_unload()

    def unmerge_adapter(self) -> None:
        raise NotImplementedError("LoR2C is never merged")

    # ------------------------------------------------------------------------------------------ saving and loading

    @classmethod
    def _names(cls, model: nn.Module, adapter_name: str) -> dict[int, str]:
        """Block -> name of its layer. An encoder and a decoder may have an adapter each, both with a block 0."""
        return {
            layer.layer: name.removeprefix(PREFIX)
            for name, layer in cls._layers(model)
            if adapter_name in layer.lor2c_topologies
        }

    @classmethod
    def _topology(cls, model: nn.Module, adapter_name: str) -> Topology:
        for _, layer in cls._layers(model):
            if adapter_name in layer.lor2c_topologies:
                return layer.lor2c_topologies[adapter_name]
        raise ValueError(f"the model has no LoR2C adapter {adapter_name!r}")

    @classmethod
    def _groups(cls, model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
        """Named after the first block in use, which need not be the first that has the tensor."""
        live = cls._expected(model, adapter_name, None)
        out = {}
        for saved, keys in super()._groups(model, adapter_name).items():
            names = [cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(PREFIX) for key in keys]
            chosen = next((i for i, name in enumerate(names) if name in live), 0)
            out[names[chosen] if keys else saved] = [keys[chosen], *keys[:chosen], *keys[chosen + 1 :]]
        return out

    @classmethod
    def _expected(cls, model: nn.Module, adapter_name: str, extra: Tensor | None) -> dict[str, tuple[int, ...]]:
        topology = cls._topology(model, adapter_name)
        manifest = None
        if extra is not None:
            manifest = read_manifest(extra)
            topology.check_manifest(manifest)
        names = cls._names(model, adapter_name)
        return {f"{names[i]}.lor2c_slot.{leaf}": shape for (i, leaf), shape in topology.entries(manifest).items()}

    @classmethod
    def _first_names(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        return {}

    @classmethod
    def _extra_state(cls, model: nn.Module, adapter_name: str) -> Tensor | None:
        return cls._topology(model, adapter_name).manifest_tensor()

    @classmethod
    def _prepare_load(cls, model: nn.Module, adapter_name: str, keys: list[str], extra: Tensor | None) -> None:
        if extra is None:
            raise ValueError(f"adapter checkpoint: {PREFIX}{cls.state_suffix} is missing")

    @classmethod
    def _load_extra(cls, model: nn.Module, adapter_name: str, extra: Tensor) -> None:
        cls._topology(model, adapter_name).load_manifest(read_manifest(extra))


def lor2c_controller(
    model: nn.Module,
    total_steps: int | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    adapter_name: str | None = None,
) -> LoR2CController:
    """The controller that a PEFT model's `LoR2CConfig` asks for (the active adapter's by default).

    For transformers' Trainer: `Trainer(..., callbacks=[lor2c_controller(model).callback()])`; in a loop of your own
    give `total_steps` and `optimizer` and call `step(n)` after the n-th optimizer step.

    Raises: TypeError for a model without PEFT adapters or an adapter of another method; ValueError for an unknown name.
    """
    name, config = adapter_of_kind("lor2c_controller", model, adapter_name, LoR2CConfig)
    return LoR2CController(
        model,
        total_steps,
        max_merges=config.max_merges,
        max_injections=config.max_injections,
        optimizer=optimizer,
        sfs_k=config.sfs_k,
        max_span=config.max_span,
        merge_interval=config.merge_interval,
        inject_interval=config.inject_interval,
        fade_steps=config.fade_steps,
        auto_threshold=config.auto_threshold,
        adapter_name=name,
    )
