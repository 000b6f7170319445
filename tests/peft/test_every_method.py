"""Every method on every architecture: zero at first, trains, saves, switches, checkpoints, casts, generates."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from . import tiny
from .conftest import METHODS, adapter


def wrapped(method: str, architecture: str = "llama", noise: float = 0.1, **changes: Any) -> Any:
    """A tiny model with an adapter that does something."""
    model = get_peft_model(tiny.model(architecture), adapter(method, architecture, **changes))
    if noise:
        tiny.perturb(model, noise)
    return model.eval()


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> gradient of the loss; the model's gradients are cleared."""
    model.zero_grad()
    model(**batch).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float) -> None:
    """Same names, and gradients equal relative to the largest in the set."""
    assert a.keys() == b.keys()
    assert a
    size = max(float(t.norm()) for t in b.values())
    for name in a:
        assert float((a[name] - b[name]).norm()) <= tolerance * size, name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_what_hooks_kept_of_the_model_stays_as_it_was(architecture: str, method: str) -> None:
    model, kept = wrapped(method, architecture), []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            kept.append((output, output.detach().clone()))

    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)):
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(**tiny.batch(architecture))
    model(**tiny.batch(architecture))
    assert kept
    assert all(torch.equal(output, value) for output, value in kept)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_new_adapter_changes_nothing_and_then_trains(architecture: str, method: str) -> None:
    batch = tiny.batch(architecture)
    # frozen, as in the adapted model: with weights that need a gradient, PyTorch may run another kernel
    base = tiny.model(architecture).requires_grad_(False)(**batch).logits
    model = wrapped(method, architecture, noise=0.0)
    assert torch.equal(model(**batch).logits, base)
    before = model(**batch).loss.detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    assert model(**batch).loss.detach() < before
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    assert not torch.equal(model(**batch).logits, base)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_a_saved_adapter_comes_back_bit_for_bit_with_each_tensor_once(
    tmp_path: Path, architecture: str, method: str
) -> None:
    model = wrapped(method, architecture)
    batch = tiny.batch(architecture)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny.model(architecture), tmp_path)
    assert torch.equal(back(**batch).logits, expected)
    lean = PeftModel.from_pretrained(tiny.model(architecture), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(lean(**batch).logits, expected)
    file = tmp_path / "adapter_model.safetensors"
    unique = {id(p): p.numel() * p.element_size() for p in model.parameters() if p.requires_grad}
    manifest = sum(t.numel() for name, t in load_file(file).items() if name.endswith("lor2c_manifest"))
    header = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert file.stat().st_size == sum(unique.values()) + manifest + header
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == model.active_peft_config.peft_type


@pytest.mark.parametrize("method", METHODS)
def test_two_adapters_switch_and_neither_touches_the_other(tmp_path: Path, method: str) -> None:
    model, batch = wrapped(method), tiny.batch("llama")
    first = model(**batch).logits
    model.add_adapter("second", adapter(method, "llama", r=2))
    assert torch.equal(model(**batch).logits, first)
    model.set_adapter("second")
    second_parameters = [p for n, p in model.named_parameters() if ".second." in n]
    assert second_parameters
    assert all(p.requires_grad for p in second_parameters)
    tiny.perturb(model, seed=9)
    second = model(**batch).logits
    assert not torch.equal(second, first)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    back = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    back.load_adapter(tmp_path / "second", "second")
    assert torch.equal(back(**batch).logits, first)
    back.set_adapter("second")
    assert torch.equal(back(**batch).logits, second)
    model.delete_adapter("second")
    assert torch.equal(model(**batch).logits, first)
    assert not any(".second." in n for n, _ in model.named_parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, reentrant: bool) -> None:
    batch = tiny.batch("llama")
    model = wrapped(method).train()
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model, batch), plain, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast_is_close_to_fp32_and_adapters_stay_fp32(method: str) -> None:
    batch, model = tiny.batch("llama"), wrapped(method)
    exact = model(**batch).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert float((out.logits.float() - exact).norm() / exact.norm()) < 0.03
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype is torch.float32 and p.grad is not None and p.grad.dtype is torch.float32 for p in trained)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("forward_too", [True, False])
def test_a_backward_inside_autocast_gives_the_gradients_in_fp32(method: str, forward_too: bool) -> None:
    """PyTorch rounds the base model's own backward products to bf16 there; ours are not (see tests/nn)."""
    batch, model = tiny.batch("llama"), wrapped(method)
    plain = gradients(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_too):
        loss = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(g.dtype is torch.float32 for g in found.values())
    assert_close(found, plain, 5e-2 if forward_too else 2e-2)


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_model_keeps_fp32_adapters_and_bf16_activations(method: str) -> None:
    batch = tiny.batch("llama")
    model = get_peft_model(tiny.model("llama").to(torch.bfloat16), adapter(method, "llama"))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    out = model(**batch, output_hidden_states=True)
    assert {h.dtype for h in out.hidden_states} == {torch.bfloat16}
    out.loss.backward()
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("method", METHODS)
def test_a_deep_copy_is_independent(method: str) -> None:
    model, batch = wrapped(method), tiny.batch("llama")
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    tiny.perturb(model, seed=11)
    assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(twin(**batch).logits, expected)


@pytest.mark.parametrize("method", ["lor2c", "lor2c-share", "lily-token", "effilora-1", "effilora-3"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mamba"])
def test_generation_with_a_cache_equals_generation_without(architecture: str, method: str) -> None:
    model = wrapped(method, architecture, noise=0.3)
    ids = tiny.batch(architecture, rows=2)["input_ids"]
    arguments = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    mask = torch.ones_like(ids)
    cached = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **arguments)
    full = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **arguments)
    assert torch.equal(cached, full)


@pytest.mark.parametrize("method", METHODS)
def test_unload_gives_the_base_model_back(method: str) -> None:
    batch = tiny.batch("llama")
    plain = tiny.model("llama")
    model = wrapped(method).unload()
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    blocks = model.model.layers
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


@pytest.mark.parametrize("method", METHODS)
def test_modules_to_save_are_trained_and_saved(tmp_path: Path, method: str) -> None:
    model = wrapped(method, "bert", modules_to_save=["classifier"])
    batch = tiny.batch("bert")
    assert model(**batch).loss.requires_grad
    assert any("modules_to_save" in n and p.requires_grad for n, p in model.named_parameters())
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny.model("bert"), tmp_path)
    assert torch.equal(back(**batch).logits, expected)


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_seeded_in_training_and_off_in_eval(method: str) -> None:
    batch = tiny.batch("llama")
    model, plain = wrapped(method, lora_dropout=0.5), wrapped(method)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model.train()
    torch.manual_seed(1)
    first = model(**batch).logits
    assert not torch.equal(model(**batch).logits, first)
    torch.manual_seed(1)
    assert torch.equal(model(**batch).logits, first)


class Quantised(nn.Module):
    """A linear layer with int8 weights and one scale, as quantisation libraries have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.step = float(linear.weight.detach().abs().max()) / 127
        self.register_buffer("qweight", (linear.weight.detach() / self.step).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.qweight.to(x.dtype) * self.step).mT


@pytest.mark.parametrize("method", METHODS)
def test_quantised_bases_work_and_their_weights_are_not_touched(method: str) -> None:
    base, batch = tiny.model("llama"), tiny.batch("llama")
    for block in base.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.self_attn, "v_proj"), (block.mlp, "down_proj")):
            setattr(parent, name, Quantised(getattr(parent, name)))
    plain = base(**batch).logits
    model = get_peft_model(base, adapter(method, "llama"))
    assert torch.equal(model(**batch).logits, plain)
    tiny.perturb(model)
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    if not method.startswith("lor2c"):
        assert type(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer) is Quantised


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "backend"), [*((method, "aot_eager") for method in METHODS), ("effilora-3", "inductor")]
)
def test_torch_compile_gives_the_same_loss_and_gradients(method: str, backend: str) -> None:
    """Inductor, the default, takes half a minute to several: one method through it, all through what it is given."""
    batch, model = tiny.batch("llama"), wrapped(method).train()
    plain = gradients(model, batch)
    expected = float(model(**batch).loss)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain, 1e-5)
