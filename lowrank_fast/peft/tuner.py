"""What the three tuners have in common, on PEFT's `BaseTuner`.

* Injection is all or nothing: on any error the model is as it was, `requires_grad` flags included.
* Shared tensors are saved once. Files in PEFT's duplicated form load too, if the copies are equal.
* A checkpoint is checked, name by name and shape by shape, before anything is loaded; a local file is checked before
  the model is touched (its header is read, no tensor).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from torch import Tensor, nn

from ..methods.blocks import near_names
from ..nn.shared_input import SharedInput, sibling_groups
from ..nn.state import check_entries
from .layer import is_linear

PREFIX = "base_model.model."


def read_header(path: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (a handle, not a dict)


def json_tensor(value: Any) -> Tensor:
    """`value` as UTF-8 JSON in a uint8 tensor."""
    return torch.frombuffer(bytearray(json.dumps(value, separators=(",", ":")).encode()), dtype=torch.uint8)


class FastTuner(BaseTuner):
    """Base of the tuners. Subclasses give `prefix` and `tuner_layer_cls`, and `method`, `_wrap` and `_add` where they
    adapt linear layers.
    """

    method: str  # as errors call it
    state_suffix: str | None = None  # name of the JSON tensor saved beside the weights, if any

    # ------------------------------------------------------------------------------------------ injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As PEFT's, or an error and an unchanged model."""
        flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config: Any = self.peft_config[adapter_name]
        path = config.tensors_file()
        try:
            self._check_config(config, model)
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
            self._after_injection(model, config, adapter_name)
            if path is not None:
                self._check_file(model, path, adapter_name)
        except BaseException:
            self._roll_back(model, adapter_name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
        config.forget_tensors()

    def _check_config(self, config: Any, model: nn.Module) -> None:
        """Refuse target names, or a regex, that match nothing, before anything is made."""
        targets = config.target_modules
        if targets is None or targets == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            return
        names = [name for name, _ in model.named_modules() if name]
        leaves = [name.rpartition(".")[2] for name in names]
        regex = isinstance(targets, str)
        if regex:
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules: {targets!r} is no valid regex: {error}") from None
        for target in [targets] if regex else sorted(targets):
            if any(re.fullmatch(target, name) if regex else f".{name}".endswith(f".{target}") for name in names):
                continue
            words = re.findall(r"\w+", target)
            wanted = words[-1] if regex and words else target
            raise ValueError(
                f"target_modules: {'the regex ' if regex else ''}{target!r} matches no module of {type(model).__name__}"
                f"{near_names(wanted, names if '.' in wanted else leaves)}"
            )

    def _wrap(self, linear: nn.Module) -> Any:
        """A layer of `tuner_layer_cls` around a linear layer."""
        raise NotImplementedError

    def _add(self, layer: Any, peft_config: Any, adapter_name: str, current_key: str) -> None:
        """Give `layer`, which is called `current_key` in the model, the tensors of an adapter."""
        raise NotImplementedError

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
        if isinstance(target, self.tuner_layer_cls):
            layer: Any = target
        elif is_linear(target):
            layer = self._wrap(target)
        else:
            raise ValueError(f"{self.method} adapts linear layers; {current_key} is a {type(target).__name__}")
        self._add(layer, peft_config, adapter_name, current_key)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _after_injection(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """For subclasses: what needs all layers to be there."""

    def _check_file(self, model: nn.Module, path: str, adapter_name: str) -> None:
        found = read_header(path)
        extra = None
        if self.state_suffix is not None:
            with safe_open(path, framework="pt") as file:
                for name in found:
                    if name.endswith(self.state_suffix):
                        extra = file.get_tensor(name)
        self._compare(model, adapter_name, found, extra, path)

    def _roll_back(self, model: nn.Module, adapter_name: str) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper) and adapter_name in getattr(module, "modules_to_save", {}):
                del module.modules_to_save[adapter_name]
                if not module.modules_to_save:
                    _set_module(model, name, module.original_module)
        for name, module in list(model.named_modules()):
            if isinstance(module, self.tuner_layer_cls):
                if adapter_name in module._all_available_adapter_names():
                    module.delete_adapter(adapter_name)
                if not module._all_available_adapter_names():
                    self._remove_layer(model, name, module)

    def _remove_layer(self, model: nn.Module, name: str, layer: Any) -> None:
        _set_module(model, name, layer.base_layer)

    # ------------------------------------------------------------------------------------------ saving and loading

    @classmethod
    def _layers(cls, model: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, module in model.named_modules():
            if isinstance(module, cls.tuner_layer_cls):
                yield name, module

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # `<prefix><attribute>.<adapter>` -> `<prefix><attribute>`, wherever in the key it stands
        pattern = rf"(\.{re.escape(cls.prefix)}[A-Za-z_]+)\.{re.escape(adapter_name)}(?=\.|$)"
        return re.sub(pattern, r"\1", key, count=1)

    @classmethod
    def _own_tensors(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Model key -> tensor, with aliases, of one adapter."""
        found: dict[str, Tensor] = {}
        for name, layer in cls._layers(model):
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                container: Any = getattr(layer, attribute)
                if not isinstance(container, nn.Module) or adapter_name not in container:  # type: ignore[operator]
                    continue
                own = container[adapter_name]  # type: ignore[index]
                base = f"{name}.{attribute}.{adapter_name}"
                if isinstance(own, Tensor):
                    found[base] = own
                else:
                    found.update({f"{base}.{leaf}": t for leaf, t in own.state_dict(keep_vars=True).items()})
        return found

    @classmethod
    def _groups(cls, model: nn.Module, adapter_name: str) -> dict[str, list[str]]:
        """Checkpoint key (without PEFT's prefix) -> model keys of all aliases; one entry per tensor to save."""
        first: dict[int, str] = {}
        groups: dict[str, list[str]] = {}
        for key, tensor in cls._own_tensors(model, adapter_name).items():
            saved = cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(PREFIX)
            groups.setdefault(first.setdefault(id(tensor), saved), []).append(key)
        return groups

    @classmethod
    def _expected(cls, model: nn.Module, adapter_name: str, extra: Tensor | None) -> dict[str, tuple[int, ...]]:
        """Checkpoint key -> shape of what a checkpoint of this adapter must hold."""
        tensors = cls._own_tensors(model, adapter_name)
        return {saved: tuple(tensors[keys[0]].shape) for saved, keys in cls._groups(model, adapter_name).items()}

    @classmethod
    def _is_own(cls, key: str) -> bool:
        return f".{cls.prefix}" in f".{key}" and not (cls.state_suffix and key.endswith(cls.state_suffix))

    @classmethod
    def _compare(
        cls, model: nn.Module, adapter_name: str, found: dict[str, tuple[int, ...]], extra: Tensor | None, what: str
    ) -> None:
        """ValueError unless `found` (checkpoint key -> shape) is exactly this adapter."""
        first = cls._first_names(model, adapter_name)
        own = {}
        for key, shape in found.items():
            if cls._is_own(key):
                bare = key.removeprefix(PREFIX)
                own[first.get(bare, bare)] = tuple(shape)
        check_entries(cls._expected(model, adapter_name, extra), own, f"adapter checkpoint {what}")

    @classmethod
    def _first_names(cls, model: nn.Module, adapter_name: str) -> dict[str, str]:
        return {
            cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(PREFIX): saved
            for saved, keys in cls._groups(model, adapter_name).items()
            for key in keys
        }

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        expected = cls._expected(model, adapter_name, None)
        out = {}
        for saved, keys in cls._groups(model, adapter_name).items():
            if saved in expected:
                out[keys[0]] = state_dict[keys[0]]
        extra = cls._extra_state(model, adapter_name)
        if extra is not None and cls.state_suffix is not None:
            out[PREFIX + cls.state_suffix] = extra
        return out

    @classmethod
    def _extra_state(cls, model: nn.Module, adapter_name: str) -> Tensor | None:
        return None

    @classmethod
    def _load_extra(cls, model: nn.Module, adapter_name: str, extra: Tensor) -> None:
        """Take what `_extra_state` saved."""

    @classmethod
    def _prepare_load(cls, model: nn.Module, adapter_name: str, keys: list[str], extra: Tensor | None) -> None:
        """For subclasses: make room for optional tensors that the checkpoint has, refuse one that cannot be loaded."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        extra, rest, own = None, {}, {}
        for key, tensor in state_dict.items():
            if cls.state_suffix and key.endswith(cls.state_suffix):
                extra = tensor
            elif cls._is_own(key):
                bare = cls._remove_adapter_name_from_key(key, adapter_name).removeprefix(PREFIX)
                own[bare] = tensor
            else:
                rest[key] = tensor
        cls._prepare_load(model, adapter_name, list(own), extra)
        shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
        cls._compare(model, adapter_name, shapes, extra, f"for {adapter_name!r}")
        first = cls._first_names(model, adapter_name)
        compact: dict[str, Tensor] = {}
        for bare, tensor in own.items():
            saved = first.get(bare, bare)
            kept = compact.setdefault(saved, tensor)
            if kept is not tensor and not torch.equal(kept, tensor):
                raise ValueError(f"adapter checkpoint: {bare} must equal {saved}, with which it shares one tensor")
        if extra is not None:
            cls._load_extra(model, adapter_name, extra)
        present = cls._own_tensors(model, adapter_name)
        for saved, keys in cls._groups(model, adapter_name).items():
            for key in keys:
                rest[key] = compact[saved] if saved in compact else present[key].detach()
        return rest

    # ------------------------------------------------------------------------------------------ shared inputs

    def _fuse(self, model: nn.Module, adapter_name: str) -> None:
        """Give sibling layers that read the same tensor one `SharedInput`."""
        layers = {name: layer for name, layer in self._layers(model) if adapter_name in layer.r}
        for names in sibling_groups(list(layers)):
            members = [layers[name] for name in names]
            if len({layer.in_features for layer in members}) == 1:
                group = SharedInput([layer.rows_of(adapter_name) for layer in members])
                for i, layer in enumerate(members):
                    layer.groups[adapter_name] = (group, i)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent) if parent else model, leaf, module)


__all__ = ["PREFIX", "FastTuner", "json_tensor", "read_header"]
