"""Lily (arXiv 2407.09946) as a PEFT tuner, on the fused routed projection.

    y = W x + s * sum_e w_e B_e A x,   p = softmax(R A x),   w = p per token, or its mean over tokens

Tensors have the names and layouts of PEFT's own Lily (`lily_A` [r, d_in], `lily_B` [E r, d_out], `lily_router` [E,
r]), so that its files load: see `LilyConfig.from_peft`. `lily_static` [E], if present, replaces the router: see
`calibrate`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils import TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..methods.calibration import WeightRecorder
from ..nn.routed import branch, routed_update
from ..nn.weights import Bank, Down, uniform_
from .config import LilyConfig
from .layer import FastLinear
from .padding import PaddingMask
from .tuner import PREFIX, FastTuner, read_header


class LilyLayer(FastLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("lily_A", "lily_B", "lily_router")
    other_param_names = (*FastLinear.other_param_names, "num_B", "routing", "use_mask", "lily_static")

    def __init__(self, base_layer: nn.Module, padding: PaddingMask) -> None:
        super().__init__(base_layer, padding)
        self.num_B: dict[str, int] = {}
        self.routing: dict[str, str] = {}
        self.use_mask: dict[str, bool] = {}
        self.lily_A: Any = nn.ModuleDict({})
        self.lily_B: Any = nn.ModuleDict({})
        self.lily_router: Any = nn.ModuleDict({})
        self.lily_static: Any = BufferDict({}, persistent=True)
        self.recorder: tuple[str, WeightRecorder] | None = None

    def add(self, adapter: str, config: LilyConfig, down: Down | None, bank: Bank | None) -> None:
        """Take a new adapter, with the tensors it shares; None makes new ones."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        kind = dtype if dtype is not None and dtype.is_floating_point else None
        where: dict[str, Any] = {"device": device, "dtype": kind}
        self.r[adapter], self.scaling[adapter] = config.r, config.scaling
        self.num_B[adapter], self.routing[adapter] = config.num_B, config.routing
        self.dropout[adapter], self.use_mask[adapter] = config.lora_dropout, config.use_attention_mask
        self.lily_A[adapter] = Down(self.in_features, config.r, **where) if down is None else down
        if bank is None:
            bank = Bank(config.num_B, config.r, self.out_features, stacked=True, **where)
            if not config.init_weights:
                uniform_(bank.weight)
        self.lily_B[adapter] = bank
        self.lily_router[adapter] = Down(config.r, config.num_B, **where)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def rows(self, adapter: str, with_dropout: bool) -> list[Tensor]:
        return [self.lily_A[adapter].weight]

    def _static(self, adapter: str) -> Tensor | None:
        return self.lily_static[adapter] if adapter in self.lily_static else None  # noqa: SIM401  (no get)

    def _reads_mask(self, adapter: str) -> bool:
        """Whether the mask says what to leave out of a mean, or which tokens of a flat input are one sample."""
        routing = self.routing.get(adapter)
        return routing == "sample" or (routing == "batch" and self.use_mask[adapter])

    def _mask(self, adapter: str, x: Tensor) -> Tensor | None:
        averaged = self.use_mask[adapter] and self.routing[adapter] != "token"
        return self.padding.tokens(x) if averaged else None

    def _routing(self, adapter: str, x: Tensor) -> str:
        # In x [S, d] each sample has one token, whose weights are its own mean.
        one_token = self.routing[adapter] == "sample" and x.dim() < 3
        return "token" if one_token else self.routing[adapter]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As `FastLinear.forward`; while a calibration runs, it records the routing weights of that adapter."""
        if x.dim() == 2 and (self.recorder is not None or any(map(self._reads_mask, self.active_adapters))):
            shape = self.padding.folded(x)
            if shape is not None:
                return self.forward(x.unflatten(0, shape), *args, **kwargs).flatten(0, 1)
        if self.recorder is not None:
            name, recorder = self.recorder
            A, R = self.lily_A[name].weight, self.lily_router[name].weight
            recorder.record(self, x, A, R, self.padding.tokens(x))
        return super().forward(x, *args, **kwargs)

    def branch(self, adapter: str, x: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        return branch(
            parts[0], self.lily_B[adapter].bank, self.lily_router[adapter].weight, routing=self._routing(adapter, x),
            weights=self._static(adapter), token_mask=self._mask(adapter, x),
        )  # fmt: skip

    def update(self, adapter: str, y: Tensor, x: Tensor, inplace: bool) -> Tensor:
        static = self._static(adapter)
        routing, router = self._routing(adapter, x), self.lily_router[adapter].weight
        return routed_update(
            y, x, self.lily_A[adapter].weight, self.lily_B[adapter].bank, router if static is None else None,
            self.scaling[adapter], routing=routing if static is None else "static", weights=static,
            token_mask=self._mask(adapter, x), dropout_p=self.dropout[adapter], training=self.training, inplace=inplace,
        )  # fmt: skip

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        if adapter not in self.lily_static:
            raise RuntimeError(
                f"Lily adapter {adapter!r} routes by its input, so it is no fixed matrix: run "
                "lowrank_fast.peft.calibrate(model, batches) first"
            )
        bank = self.lily_B[adapter].bank
        mixed = torch.tensordot(self.lily_static[adapter].to(bank.dtype), bank, dims=1)
        return self.lily_A[adapter].weight, mixed, self.scaling[adapter]


class LilyModel(FastTuner):
    """The tuner of `LilyConfig`."""

    method = "Lily"
    prefix = "lily_"
    tuner_layer_cls = LilyLayer
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LILY_TARGET_MODULES_MAPPING

    def _check_config(self, config: Any, model: nn.Module) -> None:
        super()._check_config(config, model)
        if not hasattr(self, "padding"):
            self.padding = PaddingMask()
            self.padding_handles: list[Any] = []
            if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
                self.padding_handles = self.padding.watch(model)
        config._shared = {}

    def _wrap(self, linear: nn.Module) -> LilyLayer:
        return LilyLayer(linear, self.padding)

    def _add(self, layer: LilyLayer, peft_config: Any, adapter_name: str, current_key: str) -> None:
        key = (
            group_key(peft_config.target_modules, current_key, peft_config.grouping),
            layer.out_features,
            layer.in_features,
        )
        members: list[LilyLayer] = peft_config._shared.setdefault(key, [])
        leader = (len(members) // peft_config.stride_A) * peft_config.stride_A
        down = members[leader].lily_A[adapter_name] if leader < len(members) else None
        bank = members[0].lily_B[adapter_name] if members else None
        layer.add(adapter_name, peft_config, down, bank)
        members.append(layer)

    def _roll_back(self, model: nn.Module, adapter_name: str) -> None:
        super()._roll_back(model, adapter_name)
        if not any(self._layers(model)):
            self._drop_padding_hook()

    def _drop_padding_hook(self) -> None:
        if hasattr(self, "padding"):
            for handle in self.padding_handles:
                handle.remove()
            del self.padding, self.padding_handles  # the next adapter makes new ones

    def unload(self) -> nn.Module:
        """The model without adapters."""
        self._drop_padding_hook()
        return super().unload()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """The model with the (calibrated) adapter in its weights."""
        merged = super().merge_and_unload(*args, **kwargs)
        self._drop_padding_hook()
        return merged

    def _after_injection(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        del config._shared
        if config.fuse_inputs:
            self._fuse(model, adapter_name)

    @classmethod
    def _prepare_load(cls, model: nn.Module, adapter_name: str, keys: list[str], extra: Tensor | None) -> None:
        static = {key.rpartition(".lily_static")[0] for key in keys if key.endswith(".lily_static")}
        for name, layer in cls._layers(model):
            bare = name.removeprefix(PREFIX)
            if bare in static and adapter_name not in layer.lily_static:
                device = layer.lily_A[adapter_name].weight.device
                layer.lily_static[adapter_name] = torch.zeros(layer.num_B[adapter_name], device=device)
            elif bare not in static and adapter_name in layer.lily_static:
                del layer.lily_static[adapter_name]

    def _check_file(self, model: nn.Module, path: str, adapter_name: str) -> None:
        self._prepare_load(model, adapter_name, [key.removeprefix(PREFIX) for key in read_header(path)], None)
        super()._check_file(model, path, adapter_name)


def group_key(targets: set[str] | list[str] | str | None, name: str, grouping: str = "target") -> str:
    """What the module `name` shares its bank by (together with its shape), given `target_modules`.

    "target": the longest target name that matches at a dot; for a regex, or a target that is one layer's full name, the
    module's own name without its numbers. "peft": the regex itself, or the longest target that `name` ends with.
    """
    if grouping == "peft":
        return targets if isinstance(targets, str) else max((t for t in targets or () if name.endswith(t)), key=len)
    if not isinstance(targets, str):
        matching = [t for t in targets or () if name == t or name.endswith("." + t)]
        longest = max(matching, key=len, default=name)
        if not re.search(r"(^|\.)\d+\.", longest):
            return longest
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name)
