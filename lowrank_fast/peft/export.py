"""From Lily and EffiLoRA to ordinary LoRA: calibration of routers, and export to PEFT's LoRA format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..methods.calibration import CalibrationReport, WeightRecorder, evaluating, measure, run
from ..nn.state import save_tensors
from .effilora import EffiLoRAModel
from .layer import FastLinear
from .lily import LilyLayer, LilyModel
from .lookup import adapter_of, config_of
from .tuner import PREFIX


def calibrate(model: nn.Module, batches: Iterable[Any], adapter_name: str | None = None) -> CalibrationReport:
    """Replace the routers of a Lily adapter by their mean weights over `batches`.

    Args:
        model: a PEFT model with a Lily adapter (or one that is already calibrated: it is done afresh).
        batches: what the model takes: mappings of keyword arguments (dicts, what a tokenizer returns), or single
            tensors. They are run four times.
        adapter_name: the active adapter by default. It is calibrated by itself, whichever are active; these are again
            afterwards.

    Returns: the error that this caused; `print` it. Afterwards the adapter is an ordinary LoRA: `merge_and_unload`,
        `unmerge_adapter` and `export_lora` work. `uncalibrate` brings the routers back.
    Raises: ValueError if there is no Lily adapter or no batch. After an error in the model all is as it was.
    """
    name = adapter_of(model, adapter_name)
    layers = [m for m in model.modules() if isinstance(m, LilyLayer) and name in m.r]
    data = list(batches)
    if not layers or not data:
        raise ValueError(f"calibrate: needs a Lily adapter {name!r} and at least one batch")
    before = {layer: layer.lily_static[name] for layer in layers if name in layer.lily_static}
    uncalibrate(model, name)
    try:
        with alone(model, name), evaluating(model):
            return _calibrated(model, data, name, layers)
    except BaseException:
        _set_static(name, before, layers)
        raise


def _calibrated(model: Any, data: list[Any], name: str, layers: list[LilyLayer]) -> CalibrationReport:
    recorder = WeightRecorder()
    for layer in layers:
        layer.recorder = name, recorder
    try:
        for batch in data:
            run(model, batch)
    finally:
        for layer in layers:
            layer.recorder = None
    weights = {layer: recorder.mean(layer) for layer in layers if layer in recorder.sums}

    def static() -> None:
        _set_static(name, weights, layers)

    errors = measure(model, data, static, lambda: uncalibrate(model, name), model.disable_adapter)
    static()
    tokens = int(max(float(count) for count in recorder.tokens.values()))
    return CalibrationReport(len(weights), tokens, *errors, recorder.spread())


def _set_static(name: str, weights: dict[LilyLayer, Tensor], layers: list[LilyLayer]) -> None:
    for layer in layers:
        if layer in weights:
            layer.lily_static[name] = weights[layer]
        elif name in layer.lily_static:
            del layer.lily_static[name]


@contextmanager
def alone(model: Any, adapter_name: str) -> Iterator[None]:
    """One adapter of a PEFT model as the only active one; afterwards those and `requires_grad` are as before."""
    tuner = model.base_model
    parts = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    active = [(part, part._active_adapter) for part in parts]
    named, flags = tuner.active_adapter, [(p, p.requires_grad) for p in model.parameters()]
    try:
        tuner.set_adapter(adapter_name)
        yield
    finally:
        tuner.active_adapter = named
        for part, names in active:
            part._active_adapter = names
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def uncalibrate(model: nn.Module, adapter_name: str | None = None) -> None:
    """Let the routers decide again."""
    name = adapter_of(model, adapter_name)
    for layer in model.modules():
        if isinstance(layer, LilyLayer) and name in layer.lily_static:
            del layer.lily_static[name]


def export_lora(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str | None = None) -> None:
    """Write a calibrated Lily, or an EffiLoRA with one head, as an ordinary PEFT LoRA into `folder`.

    `PeftModel.from_pretrained(base, folder)` loads it, without this package. A and B are replicated for each module;
    `modules_to_save` go along.
    Raises: RuntimeError for an adapter that routes by its input; ValueError if there is nothing to export.
    """
    name = adapter_of(model, adapter_name)
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    ranks: set[tuple[int, float]] = set()
    for key, layer in model.named_modules():
        if isinstance(layer, FastLinear) and name in layer.r:
            A, B, scale = layer.factors(name)
            ranks.add((A.shape[0], scale))
            targets.append(key.removeprefix(PREFIX))
            with torch.no_grad():
                tensors[f"{PREFIX}{targets[-1]}.lora_A.weight"] = A.detach().clone()
                tensors[f"{PREFIX}{targets[-1]}.lora_B.weight"] = B.detach().clone()
    if not targets:
        raise ValueError(f"export_lora: the model has no Lily or EffiLoRA adapter {name!r}")
    (rank, scale) = ranks.pop()
    config = config_of(model, name)
    own = (f".{LilyModel.prefix}", f".{EffiLoRAModel.prefix}")
    state = get_peft_model_state_dict(model, adapter_name=name)
    tensors.update({key: t for key, t in state.items() if not any(prefix in key for prefix in own)})  # trained heads
    os.makedirs(folder, exist_ok=True)
    save_tensors(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), {"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]
        target_modules=targets,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    ).save_pretrained(str(folder))
