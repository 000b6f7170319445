"""Calibration of one adapter among several, batches as tokenizers give them, and merged weights in a cast model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn

from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, calibrate
from lowrank_fast.peft.lily import LilyLayer

from . import tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]


def two_adapters(experts: int = 2) -> Any:
    """A model with "default" (active) and "b", whose weights do something; "b" has a head of its own."""
    model = get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=TARGETS))
    config = LilyConfig(r=4, num_B=experts, target_modules=TARGETS, modules_to_save=["lm_head"])
    model.add_adapter("b", config)
    for name, seed in (("b", 1), ("default", 2)):
        model.set_adapter(name)
        tiny.perturb(model, 0.3, seed=seed)
    return model.eval()


def weights_of(model: Any, adapter: str) -> list[torch.Tensor]:
    layers = [m for m in model.modules() if isinstance(m, LilyLayer)]
    return [layer.lily_static[adapter] for layer in layers if adapter in layer.lily_static]


def state(model: Any) -> list[Any]:
    layers = [(m.active_adapters, m.recorder) for m in model.modules() if isinstance(m, LilyLayer)]
    return [layers, model.base_model.active_adapters, [p.requires_grad for p in model.parameters()]]


@pytest.mark.parametrize("experts", [2, 3])
@pytest.mark.parametrize("active", ["default", ["default", "b"]])
def test_an_adapter_is_calibrated_by_itself_whichever_are_active(active: Any, experts: int) -> None:
    batches = [tiny.batch("llama", seed=i) for i in range(2)]
    model = two_adapters(experts)
    model.set_adapter("b")
    expected = calibrate(model, batches)
    weights = weights_of(model, "b")
    assert expected.output_error > 1e-3
    model = two_adapters(experts)
    model.base_model.set_adapter(active)
    before = state(model)
    assert calibrate(model, batches, "b") == expected
    assert len(weights) == len(weights_of(model, "b")) == 4 * len(TARGETS)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model, "b"), weights, strict=True))
    assert not weights_of(model, "default")
    assert state(model) == before


def test_a_calibration_that_fails_leaves_everything_as_it_was() -> None:
    model = two_adapters()
    calibrate(model, [tiny.batch("llama")], "b")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before, weights = state(model), weights_of(model, "b")
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        calibrate(model, [tiny.batch("llama", seed=2), {"no_such_argument": 1}], "b")
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model, "b"), weights, strict=True))


def test_a_calibration_takes_what_a_tokenizer_returns() -> None:
    model, batch = two_adapters(), tiny.batch("llama")
    assert calibrate(model, [transformers.BatchEncoding(batch)]) == calibrate(model, [batch])


def test_calibrating_a_model_without_adapters_says_so() -> None:
    with pytest.raises(ValueError, match="needs a PEFT model with an adapter; got a LlamaForCausalLM"):
        calibrate(tiny.model("llama"), [tiny.batch("llama")])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_unmerging_gives_weights_of_the_dtype_that_the_model_has_by_then(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny.model("llama"), EffiLoRAConfig(r=4, target_modules=TARGETS))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    tiny.perturb(model)
    model.merge_adapter()
    model.to(dtype)
    model.unmerge_adapter()
    assert {p.dtype for p in model.parameters()} == {dtype}
    linear: nn.Linear = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    name = next(n for n, p in model.named_parameters() if p is linear.weight)
    assert torch.equal(linear.weight, before[name].to(dtype))
    model(**tiny.batch("llama"))
