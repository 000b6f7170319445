"""EffiLoRA (arXiv 2512.00878) as a PEFT tuner, on the fused operations.

    y = W x + (alpha / r) * sum_e w_e B_e A x,   w = softmax(R x) per token in float32 (E = 1: no router)

One A per distinct input width serves all layers. The Reducer (`lowrank_fast.methods.reducer`) says which layers'
heads are updated; inactive heads take part in the forward, get no gradient (None), and their router neither.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from .. import functional as F
from ..methods.blocks import linear_sizes
from ..methods.reducer import Reducer, ReducerState
from ..nn.inplace import dtype_for
from ..nn.routed import branch, routed_update
from ..nn.weights import Bank, Down
from .config import EffiLoRAConfig
from .layer import FastLinear, is_linear
from .lily import group_key
from .lookup import adapter_of_kind
from .padding import PaddingMask
from .tuner import FastTuner, json_tensor


class EffiLoRALayer(FastLinear):
    """One adapted linear layer."""

    adapter_layer_names = ("effilora_A", "effilora_B", "effilora_router")
    other_param_names = (
        *FastLinear.other_param_names, "num_B", "a_grad", "active", "active_mask", "suppression", "reducer_state",
    )  # fmt: skip

    def __init__(self, base_layer: nn.Module, padding: PaddingMask) -> None:
        super().__init__(base_layer, padding)
        self.num_B: dict[str, int] = {}
        self.a_grad: dict[str, str] = {}
        self.active: dict[str, bool] = {}
        self.suppression: dict[str, float] = {}
        self.reducer_state: dict[str, ReducerState] = {}
        self.effilora_A: Any = nn.ModuleDict({})
        self.effilora_B: Any = nn.ModuleDict({})
        self.effilora_router: Any = nn.ModuleDict({})
        self.active_mask: Any = BufferDict({}, persistent=False)
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}

    def add(self, adapter: str, config: EffiLoRAConfig, down: Down | None, width: int, state: ReducerState) -> Down:
        """Take a new adapter; returns its A, made here with `width` columns if `down` is None."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        kind = dtype if dtype is not None and dtype.is_floating_point else None
        where: dict[str, Any] = {"device": device, "dtype": kind}
        self.r[adapter], self.scaling[adapter] = config.r, config.lora_alpha / config.r
        self.num_B[adapter], self.a_grad[adapter] = config.num_B, config.a_grad
        self.dropout[adapter], self.active[adapter], self.suppression[adapter] = config.lora_dropout, True, 1.0
        self.reducer_state[adapter] = state
        down = Down(width, config.r, **where) if down is None else down
        self.effilora_A[adapter] = down
        self.effilora_B[adapter] = Bank(config.num_B, config.r, self.out_features, **where)
        if config.num_B > 1:
            self.effilora_router[adapter] = Down(self.in_features, config.num_B, **where)
        self.active_mask[adapter] = torch.ones(config.num_B, dtype=torch.bool, device=device)
        if config.freeze_A:
            self.frozen_peft_weight_names[adapter] = ("effilora_A",)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        return down

    # ------------------------------------------------------------------------------------------ forward

    def _tensors(self, adapter: str) -> tuple[Tensor, Tensor, Tensor | None, bool | Tensor | None]:
        """A, bank, router and `active` of this step; a compiled graph takes a mask tensor and serves every step."""
        A = self.effilora_A[adapter].weight[:, : self.in_features]
        bank = self.effilora_B[adapter].bank
        router = self.effilora_router[adapter].weight if adapter in self.effilora_router else None
        if torch.compiler.is_compiling():
            mask = self.active_mask[adapter]
            if self.a_grad[adapter] == "active":
                A = torch.where(mask[0], A, A.detach())
            return A, bank, router, mask
        if self.active[adapter]:
            return A, bank, router, None
        if self.a_grad[adapter] == "active":
            A = A.detach()
        return A, bank, None if router is None else router.detach(), False

    def rows(self, adapter: str, with_dropout: bool) -> list[Tensor]:
        A, _, router, _ = self._tensors(adapter)
        return [A] if router is None or with_dropout else [A, router]

    def scale(self, adapter: str) -> float:
        return self.scaling[adapter] * self.suppression[adapter]

    def branch(self, adapter: str, x: Tensor, parts: list[Tensor]) -> tuple[Tensor, Tensor]:
        _, bank, router, active = self._tensors(adapter)
        logits = None
        if router is not None:  # with dropout the router's rows are not in the common shrink
            logits = parts[1] if len(parts) > 1 else F.shrink(x, dtype_for(router, x))
        return branch(parts[0], bank, logits=logits, active=active)

    def update(self, adapter: str, y: Tensor, x: Tensor, inplace: bool) -> Tensor:
        A, bank, router, active = self._tensors(adapter)
        return routed_update(
            y, x, A, bank, router, self.scale(adapter), routing="token", router_input="x", active=active,
            dropout_p=self.dropout[adapter], training=self.training, inplace=inplace,
        )  # fmt: skip

    def factors(self, adapter: str) -> tuple[Tensor, Tensor, float]:
        if self.num_B[adapter] > 1:
            raise RuntimeError(
                f"EffiLoRA adapter {adapter!r} has num_B={self.num_B[adapter]} heads mixed per token: it is no fixed "
                "matrix and cannot be merged or exported; only num_B=1 can"
            )
        A = self.effilora_A[adapter].weight[:, : self.in_features]
        return A, self.effilora_B[adapter].bank[0], self.scaling[adapter]


class Handle:
    """One adapter of one layer, as the Reducer sees it."""

    def __init__(self, layer: EffiLoRALayer, adapter: str) -> None:
        self.layer, self.adapter = layer, adapter

    def set_active(self, active: bool) -> None:
        self.layer.active[self.adapter] = active
        self.layer.active_mask[self.adapter].fill_(active)

    def set_suppression(self, factor: float) -> None:
        self.layer.suppression[self.adapter] = factor

    def bank_parameters(self) -> list[nn.Parameter]:
        own = [self.layer.effilora_B[self.adapter].weight]
        if self.adapter in self.layer.effilora_router:
            own.append(self.layer.effilora_router[self.adapter].weight)
        return own


class EffiLoRAModel(FastTuner):
    """The tuner of `EffiLoRAConfig`."""

    method = "EffiLoRA"
    prefix = "effilora_"
    tuner_layer_cls = EffiLoRALayer
    state_suffix = "effilora_reducer"
    target_module_mapping: dict[str, Any] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_config(self, config: Any, model: nn.Module) -> None:
        super()._check_config(config, model)
        config._shared, config._state = {}, ReducerState()

    def _wrap(self, linear: nn.Module) -> EffiLoRALayer:
        return EffiLoRALayer(linear, PaddingMask())

    def _add(self, layer: EffiLoRALayer, peft_config: Any, adapter_name: str, current_key: str) -> None:
        key: Any = layer.in_features
        width = layer.in_features
        if peft_config.share_A == "slice":
            key, width = "all", self._largest_width(peft_config)
        elif peft_config.share_A == "target":
            key = (group_key(peft_config.target_modules, current_key), layer.in_features)
        down = peft_config._shared.get(key)
        peft_config._shared[key] = layer.add(adapter_name, peft_config, down, width, peft_config._state)

    def _largest_width(self, config: Any) -> int:
        widths = [0]
        for name, module in self.model.named_modules():
            if self._check_target_module_exists(config, name) and is_linear(module):
                widths.append(linear_sizes(module)[0])
        return max(widths)

    def _after_injection(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        del config._shared, config._state
        if config.fuse_inputs:
            self._fuse(model, adapter_name)

    @classmethod
    def _own_tensors(cls, model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        return {k: v for k, v in super()._own_tensors(model, adapter_name).items() if ".active_mask." not in k}

    @classmethod
    def _state(cls, model: nn.Module, adapter_name: str) -> ReducerState | None:
        for _, layer in cls._layers(model):
            if adapter_name in layer.reducer_state:
                return layer.reducer_state[adapter_name]
        return None

    @classmethod
    def _extra_state(cls, model: nn.Module, adapter_name: str) -> Tensor | None:
        state = cls._state(model, adapter_name)
        return None if state is None or not state.scores else json_tensor(state.to_json())

    @classmethod
    def _load_extra(cls, model: nn.Module, adapter_name: str, extra: Tensor) -> None:
        state = cls._state(model, adapter_name)
        if state is not None:
            state.from_json(bytes(extra.cpu().tolist()).decode())


def effilora_reducer(
    model: nn.Module,
    *,
    validation: Any = None,
    adapter_name: str | None = None,
    **settings: Any,
) -> Reducer:
    """The Reducer that a PEFT model's `EffiLoRAConfig` asks for (the active adapter's by default).

    Args:
        validation: held-out batches, for `importance="suppression"`; see `Reducer`.
        settings: further arguments of `Reducer`, such as `loss` or `unit`.

    For transformers' Trainer: `callbacks=[effilora_reducer(model, validation=batches).callback()]`; in a loop of your
    own call `begin_step(n)` before the forward of step n (from 0) and `end_backward(n)` before the optimizer.

    Raises: TypeError for a model without PEFT adapters or an adapter of another method; ValueError for an unknown name.
    """
    name, config = adapter_of_kind("effilora_reducer", model, adapter_name, EffiLoRAConfig)
    handles = {
        key: Handle(layer, name)
        for key, layer in model.named_modules()
        if isinstance(layer, EffiLoRALayer) and name in layer.r
    }
    state = EffiLoRAModel._state(model, name)
    return Reducer(
        model,
        handles,
        keep_ratio=config.keep_ratio,
        importance=config.importance,
        selection=config.selection,
        interval=config.interval,
        warmup=config.warmup,
        seed=config.seed,
        validation=validation,
        state=state,
        **settings,
    )
