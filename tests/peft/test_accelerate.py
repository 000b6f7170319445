"""Accelerating PEFT's own LoRA and Lily layers: same numbers, same parameters and files, reversible, fewer passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_fast.peft import LoR2CConfig, accelerate_adapters, restore_adapters

from . import tiny
from .conftest import TARGETS
from .test_every_method import assert_close, gradients
from .test_lily import CALLS, assert_gradients_agree, assert_same_step, relative, step_of


def lora(architecture: str = "llama", dropout: float = 0.0, targets: Any = None, **fields: Any) -> Any:
    config = LoraConfig(
        **{
            "r": 4,
            "lora_alpha": 8,
            "lora_dropout": dropout,
            "target_modules": targets or TARGETS[architecture],
            **fields,
        }
    )
    model = get_peft_model(tiny.model(architecture), config)
    tiny.perturb(model)
    return model.eval()


def lily(**fields: Any) -> Any:
    config = peft.LilyConfig(**{"r": 4, "num_B": 3, "stride_A": 3, "scaling": 2.0, "target_modules": CALLS, **fields})
    model = get_peft_model(tiny.model("llama"), config)
    tiny.perturb(model)
    return model.eval()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("fuse", [True, False])
def test_lora_keeps_its_forward_gradients_and_adamw_step(architecture: str, fuse: bool) -> None:
    batch = tiny.batch(architecture)
    expected = step_of(lora(architecture), batch)
    model = lora(architecture)
    accelerate_adapters(model, fuse_inputs=fuse, verbose=False)
    found = step_of(model, batch)
    assert relative(found[0], expected[0]) < 1e-6
    assert_gradients_agree(found[1], expected[1])
    assert relative(found[2], expected[2]) < 1e-6


@pytest.mark.parametrize("fuse", [True, False])
def test_lily_keeps_its_forward_gradients_and_adamw_step(fuse: bool) -> None:
    batch = tiny.batch("llama")
    expected = step_of(lily(), batch)
    model = lily()
    accelerate_adapters(model, fuse_inputs=fuse, verbose=False)
    found = step_of(model, batch)
    assert relative(found[0], expected[0]) < 1e-6
    assert_gradients_agree(found[1], expected[1])
    assert relative(found[2], expected[2]) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_in_float64_every_tensor_is_pefts(kind: str) -> None:
    batch = tiny.batch("llama")
    model, theirs = ((lora(targets=CALLS) if kind == "lora" else lily()).double() for _ in range(2))
    accelerate_adapters(model, verbose=False)
    assert_same_step(model, theirs, batch)


def loss_curve(model: Any, rate: float, flip: bool = False) -> torch.Tensor:
    """Losses of 100 AdamW steps over eight batches; `flip` turns the order of the rows of each batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for i in range(100):
        batch = {name: t.flip(0) if flip else t for name, t in tiny.batch("llama", seed=i % 8).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return torch.tensor(losses, dtype=torch.float64)


def drift(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest relative difference of two curves."""
    return float(((a - b) / b).abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-4, 3e-4, 1e-3])
@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_a_hundred_steps_give_the_same_loss_curve(kind: str, rate: float) -> None:
    make = (lambda: lora(targets=CALLS)) if kind == "lora" else lily
    fast = make()
    accelerate_adapters(fast, verbose=False)
    found, expected = loss_curve(fast, rate), loss_curve(make(), rate)
    assert drift(found, expected) < 1e-4
    assert float(expected.max() - expected.min()) > 100 * 1e-4 * float(expected.max()), "a curve that moves"


@pytest.mark.slow
@pytest.mark.parametrize("rate", [3e-3, 1e-2])
@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_in_float64_the_curve_is_pefts_at_large_rates_too(kind: str, rate: float) -> None:
    fast, theirs = (lora(targets=CALLS).double() if kind == "lora" else lily().double() for _ in range(2))
    accelerate_adapters(fast, verbose=False)
    assert drift(loss_curve(fast, rate), loss_curve(theirs, rate)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate"), [("lora", 3e-3), ("lora", 1e-2), ("lily", 1e-2)])
def test_where_rounding_moves_pefts_own_curve_ours_moves_no_further(kind: str, rate: float) -> None:
    """At these rates float32 alone moves PEFT's curve by more than 1e-4: no other order of sums can be as close."""
    make = (lambda: lora(targets=CALLS)) if kind == "lora" else lily
    fast = make()
    accelerate_adapters(fast, verbose=False)
    found, theirs, turned = loss_curve(fast, rate), loss_curve(make(), rate), loss_curve(make(), rate, flip=True)
    truth = loss_curve(make().double(), rate)
    rounding = max(drift(turned, theirs), drift(turned, truth))
    assert rounding > 1e-4
    assert drift(found, theirs) < 2 * rounding
    assert drift(found, truth) < 2 * rounding


def test_it_is_reversible_and_repeatable_to_the_bit() -> None:
    model, batch = lora(), tiny.batch("llama")
    before = model(**batch).logits
    accelerate_adapters(model, verbose=False)
    fast = model(**batch).logits
    assert len(accelerate_adapters(model, verbose=False).taken) == 16
    assert torch.equal(model(**batch).logits, fast)
    assert restore_adapters(model) == 16
    assert restore_adapters(model) == 0
    assert torch.equal(model(**batch).logits, before)


def test_parameters_names_and_files_stay_pefts(tmp_path: Path) -> None:
    model, batch = lora(), tiny.batch("llama")
    names = [(n, p.data_ptr()) for n, p in model.named_parameters()]
    model.save_pretrained(tmp_path / "before")
    accelerate_adapters(model, verbose=False)
    assert [(n, p.data_ptr()) for n, p in model.named_parameters()] == names
    model.save_pretrained(tmp_path / "after")
    a, b = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("before", "after"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
    back = PeftModel.from_pretrained(tiny.model("llama"), tmp_path / "after")
    assert relative(model(**batch).logits, back(**batch).logits) < 1e-6


def test_merging_disabling_and_switching_still_work() -> None:
    model, batch = lora(), tiny.batch("llama")
    base = tiny.model("llama")(**batch).logits
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS["llama"][:2]))
    accelerate_adapters(model, verbose=False)
    first = model(**batch).logits
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, base)
    model.set_adapter("second")
    tiny.perturb(model, seed=8)
    second = model(**batch).logits
    restore_adapters(model)
    assert relative(second, model(**batch).logits) < 1e-6
    accelerate_adapters(model, verbose=False)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, first)
    model.merge_adapter()
    assert relative(model(**batch).logits, first) < 1e-6
    model.unmerge_adapter()
    assert relative(model(**batch).logits, first) < 1e-6
    mixed = model(**batch, adapter_names=["default", "second", "__base__"]).logits
    assert relative(mixed[2], base[2]) < 1e-6


@pytest.mark.parametrize("kind", ["lora", "lily"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_pefts_gradients(kind: str, reentrant: bool) -> None:
    model, batch = (lora() if kind == "lora" else lily()).train(), tiny.batch("llama")
    expected = gradients(model, batch)
    accelerate_adapters(model, verbose=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model, batch), expected, 1e-6)


@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_autocast_and_generation_go_on_working(kind: str) -> None:
    model, batch = lora() if kind == "lora" else lily(), tiny.batch("llama", rows=2)
    arguments = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected, logits = model.generate(**prompt, **arguments), model(**batch).logits
    accelerate_adapters(model, verbose=False)
    assert torch.equal(model.generate(**prompt, **arguments), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**batch)
    out.loss.backward()
    assert relative(out.logits, logits) < 0.03
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_torch_compile_gives_pefts_loss_and_gradients(kind: str) -> None:
    model, batch = (lora() if kind == "lora" else lily()).train(), tiny.batch("llama")
    expected, loss = gradients(model, batch), float(model(**batch).loss.detach())
    accelerate_adapters(model, verbose=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    found = compiled(**batch).loss
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-6)
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, expected, 1e-5)


def test_dropout_has_the_same_distribution_and_is_off_in_eval() -> None:
    model, batch = lora(dropout=0.3), tiny.batch("llama")
    plain = model(**batch).logits
    accelerate_adapters(model, verbose=False)
    assert relative(model(**batch).logits, plain) < 1e-6
    model.train()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(1, 3, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    samples = torch.stack([layer(x) for _ in range(600)])
    restore_adapters(model)
    layer.eval()
    expected = layer(x)
    error = (samples.mean(0) - expected) / (samples.std(0) / 600**0.5)
    assert float(samples.std(0).min()) > 0
    assert float(error.abs().max()) < 5


def test_what_is_not_taken_is_named_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "v_proj"]))
    report = accelerate_adapters(model)
    assert not report.taken
    assert len(report.refused) == 8
    assert "DoRA" in capsys.readouterr().out
    biased = get_peft_model(tiny.model("bert"), LoraConfig(r=4, lora_bias=True, target_modules=["query"]))
    assert "lora_B has a bias" in str(accelerate_adapters(biased, verbose=False))
    embedding = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    mixed = accelerate_adapters(embedding, verbose=False)
    assert len(mixed.taken) == 4
    assert "lora.layer.Embedding has no fused form" in str(mixed)
    other = get_peft_model(tiny.model("llama"), peft.LoHaConfig(r=4, target_modules=["q_proj"]))
    assert "loha.layer.Linear has no fused form" in str(accelerate_adapters(other, verbose=False))
    ours = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4))
    assert accelerate_adapters(ours, verbose=False).refused == {}


def test_activations_are_not_copied_to_fp32() -> None:
    base = tiny.model("llama").to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=CALLS))
    accelerate_adapters(model, verbose=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.dtype is torch.float32
    x = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
    assert not [t for t in kept if t.dtype is torch.float32 and t.numel() >= x.numel()]
    restore_adapters(model)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(x)
    assert [t for t in kept if t.dtype is torch.float32 and t.numel() >= x.numel()], "PEFT itself does copy"


# ------------------------------------------------------------------------------------------------ shared inputs


class Calls(TorchDispatchMode):
    """Counts our ops, and additions of activation-sized tensors."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.ops, self.additions = size, {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith("lowrank_fast::"):
            self.ops[name[14:]] = self.ops.get(name[14:], 0) + 1
        if name in ("aten::add", "aten::add_") and isinstance(out, torch.Tensor) and out.numel() == self.size:
            self.additions += 1
        return out


@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_q_k_v_share_one_shrink_and_one_dx(kind: str) -> None:
    """PEFT adds up six gradients of x; apart, each layer makes one; together they make one between them."""
    targets = ["q_proj", "k_proj", "v_proj"]
    for fuse, additions, reads in ((None, 5, 0), (False, 2, 3), (True, 0, 1)):
        model = lora(targets=targets) if kind == "lora" else lily(target_modules=targets)
        if fuse is not None:
            accelerate_adapters(model, fuse_inputs=fuse, verbose=False)
        attention = model.base_model.model.model.layers[0].self_attn
        x = torch.randn(2, 40, tiny.HIDDEN, requires_grad=True)
        with Calls(x.numel()) as forward:
            outputs = [p(x) for p in (attention.q_proj, attention.k_proj, attention.v_proj)]
        gradients = [torch.randn_like(y) for y in outputs]
        with Calls(x.numel()) as backward:
            torch.autograd.backward(outputs, gradients)
        assert backward.additions == additions
        assert forward.ops.get("shrink", 0) == backward.ops.get("shrink_backward", 0) == reads


def test_members_that_read_different_tensors_dissolve_their_group_and_stay_right() -> None:
    model = lora(targets=["q_proj", "k_proj", "v_proj"])
    attention = model.base_model.model.model.layers[0].self_attn
    x, memory = torch.randn(2, 5, tiny.HIDDEN), torch.randn(2, 9, tiny.HIDDEN)
    expected = [attention.q_proj(x), attention.k_proj(memory), attention.v_proj(memory)]
    accelerate_adapters(model, verbose=False)
    for _ in range(2):
        found = [attention.q_proj(x), attention.k_proj(memory), attention.v_proj(memory)]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))
    x.add_(1.0)  # the same object, another value
    assert torch.allclose(attention.q_proj(x), type(attention.q_proj).forward(attention.q_proj, x), atol=1e-6)
