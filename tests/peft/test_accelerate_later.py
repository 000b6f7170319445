"""What happens to an accelerated model afterwards: other adapters, hooks, other forwards, copies and files."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lowrank_fast.peft import accelerate_adapters, restore_adapters

from . import tiny
from .test_accelerate import lily, lora
from .test_lily import relative

QKV = ["q_proj", "k_proj", "v_proj"]
OTHERS = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}


def qwen_with(kind: str | None) -> Any:
    """A model whose q, k and v have a bias, which lora_bias asks for; `kind` of the adapter `other`, or plain LoRA."""
    model = lora("qwen", targets=QKV)
    accelerate_adapters(model, verbose=False)
    model.add_adapter("other", LoraConfig(r=4, target_modules=QKV, **OTHERS.get(kind or "", {})))
    model.set_adapter("other")
    tiny.perturb(model, seed=8)
    return model.eval()


def both(model: Any, architecture: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits as they are, and PEFT's own."""
    batch = tiny.batch(architecture)
    found = model(**batch).logits
    restore_adapters(model)
    return found, model(**batch).logits


# ------------------------------------------------------------------------------------------------ other adapters


@pytest.mark.parametrize("kind", OTHERS)
def test_an_adapter_of_another_kind_added_later_is_computed_by_peft(kind: str) -> None:
    model = qwen_with(kind)
    found, expected = both(model, "qwen")
    assert torch.equal(found, expected)
    model.set_adapter("default")
    plain = model(**tiny.batch("qwen")).logits
    assert len(accelerate_adapters(model, verbose=False).taken) == 12
    assert relative(model(**tiny.batch("qwen")).logits, plain) < 1e-6
    model.base_model.set_adapter(["default", "other"])
    found, expected = both(model, "qwen")
    assert torch.equal(found, expected)


def test_a_dora_adapter_loaded_later_is_computed_by_peft(tmp_path: Path) -> None:
    dora = lora(targets=QKV, use_dora=True)
    dora.save_pretrained(tmp_path)
    model = lora(targets=QKV)
    accelerate_adapters(model, verbose=False)
    model.load_adapter(tmp_path, "dora")
    model.set_adapter("dora")
    assert torch.equal(model.eval()(**tiny.batch("llama")).logits, dora(**tiny.batch("llama")).logits)


def test_accelerating_again_tells_which_adapters_are_left_to_peft() -> None:
    model = qwen_with("dora")
    report = accelerate_adapters(model, verbose=False)
    assert (len(report.taken), len(report.refused), len(report.partly)) == (12, 0, 12)
    assert "of those, 12 only in part: 'other' stays PEFT's: it uses DoraLinearVariant" in str(report)
    found, expected = both(model, "qwen")
    assert torch.equal(found, expected)


def test_accelerating_again_gives_layers_back_that_have_nothing_left_to_fuse() -> None:
    model = qwen_with("dora")
    model.delete_adapter("default")
    report = accelerate_adapters(model, verbose=False)
    assert (len(report.taken), len(report.refused), report.shared_inputs) == (0, 12, 0)
    assert restore_adapters(model) == 0
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert "forward" not in layer.__dict__


# ------------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(("kind", "architecture"), [("lora", "llama"), ("lora", "qwen"), ("lily", "llama")])
def test_what_a_hook_on_the_base_layer_kept_stays_as_it_was(kind: str, fuse: bool, architecture: str) -> None:
    """llama's projections have no bias, qwen's do: their outputs are views of a product, which is written instead."""
    model = lora(architecture, targets=QKV) if kind == "lora" else lily(target_modules=QKV)
    accelerate_adapters(model, fuse_inputs=fuse, verbose=False)
    base, kept = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer, []
    handle = base.register_forward_hook(lambda module, args, output: kept.append((output, output.detach().clone())))
    batch = tiny.batch(architecture)
    with torch.no_grad():
        found = model(**batch).logits
    model(**batch)
    assert [torch.equal(output, value) for output, value in kept] == [True, True]
    handle.remove()
    assert relative(found, model(**batch).logits) < 1e-6


def test_a_loss_on_a_base_layers_output_does_not_reach_its_adapter() -> None:
    model, kept = lora(targets=["q_proj", "v_proj"]), []
    accelerate_adapters(model, verbose=False)
    layer = model.base_model.model.model.layers[1].self_attn.v_proj
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output))
    model(**tiny.batch("llama"))
    kept[0].square().sum().backward()
    assert layer.lora_B["default"].weight.grad is None


class Counting(ModelHook):  # type: ignore[misc]
    """Counts the calls of a layer."""

    calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_a_forward_that_someone_replaced_before_is_kept() -> None:
    model, hook, batch = lora(targets=["q_proj", "v_proj"]), Counting(), tiny.batch("llama")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, hook)
    expected = model(**batch).logits
    report = accelerate_adapters(model, verbose=False)
    assert (len(report.taken), len(report.refused)) == (7, 1)
    assert "its forward was replaced before" in str(report)
    assert relative(model(**batch).logits, expected) < 1e-6
    assert restore_adapters(model) == 7
    model(**batch)
    assert hook.calls == 3
    remove_hook_from_module(layer)  # leaves a bound method on the layer
    assert len(accelerate_adapters(model, verbose=False).taken) == 8


def test_a_forward_that_someone_wraps_afterwards_is_kept() -> None:
    model, hook, batch = lora(targets=["q_proj", "v_proj"]), Counting(), tiny.batch("llama")
    expected = model(**batch).logits
    accelerate_adapters(model, verbose=False)
    fast = model(**batch).logits
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    add_hook_to_module(layer, hook)
    assert len(accelerate_adapters(model, verbose=False).taken) == 8
    assert torch.equal(model(**batch).logits, fast)
    assert restore_adapters(model) == 8
    assert torch.equal(model(**batch).logits, expected)
    assert hook.calls == 2
    remove_hook_from_module(layer)
    assert len(accelerate_adapters(model, verbose=False).taken) == 8
    assert torch.equal(model(**batch).logits, fast)


# ------------------------------------------------------------------------------------------------ copies and files


def through_a_file(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("kind", ["lora", "lily"])
@pytest.mark.parametrize("how", [copy.deepcopy, through_a_file])
def test_copies_are_accelerated_too_and_stand_on_their_own(kind: str, how: Any) -> None:
    model, batch = lora() if kind == "lora" else lily(), tiny.batch("llama")
    accelerate_adapters(model, verbose=False)
    attention = model.base_model.model.model.layers[0].self_attn
    attention.q_proj(torch.randn(2, tiny.HIDDEN))  # leaves a group that waits for its other members
    expected = model(**batch).logits
    attention.q_proj(torch.randn(2, tiny.HIDDEN))
    twin = how(model)
    assert torch.equal(twin(**batch).logits, expected)
    tiny.perturb(twin, seed=5)
    changed = twin(**batch).logits
    assert not torch.equal(changed, expected)
    assert torch.equal(model(**batch).logits, expected)
    restored = restore_adapters(twin)
    assert restored == restore_adapters(model) > 0
    assert relative(twin(**batch).logits, changed) < 1e-6


# ------------------------------------------------------------------------------------------------ shapes


class Pair(nn.Module):
    """Two layers with a bias that read one input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 0, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("grad", [True, False])
def test_inputs_of_any_number_of_dimensions(shape: tuple[int, ...], grad: bool) -> None:
    model: PeftModel = get_peft_model(Pair(), LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    tiny.perturb(model)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = model(x)
    assert accelerate_adapters(model, verbose=False).shared_inputs == 1
    with torch.set_grad_enabled(grad):
        found = model(x)
    assert torch.allclose(found, expected, atol=1e-6)
