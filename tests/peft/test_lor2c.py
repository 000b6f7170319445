"""LoR2C: spans, the published code's five defects, parameter counts, resuming, in-place safety, hidden states."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lowrank_fast.methods import LoR2C, LoR2CController
from lowrank_fast.methods.lor2c_controller import find_topology
from lowrank_fast.nn.inplace import first_tensor
from lowrank_fast.peft import LoR2CConfig, lor2c_controller

from . import tiny
from .test_every_method import assert_close, gradients


def lor2c(architecture: str = "llama", noise: float = 0.1, **changes: Any) -> Any:
    """A tiny model with a LoR2C adapter that does something."""
    model = get_peft_model(tiny.model(architecture), LoR2CConfig(**{"r": 4, "lora_alpha": 8.0, **changes}))
    if noise:
        tiny.perturb(model, noise)
    return model.eval()


def train(model: Any, steps: range, optimizer: Any, controller: Any = None, architecture: str = "llama") -> list[float]:
    """Losses of plain training steps, one batch per step number."""
    model.train()
    losses = []
    for step in steps:
        loss = model(**tiny.batch(architecture, seed=100 + step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step(step)
        losses.append(float(loss.detach()))
    return losses


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)


# ------------------------------------------------------------------------------------------------ the update itself


def expected_hidden(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The forward of a LLaMA with LoR2C spelled out: h' = layer(h) + s B A h_start, without any hook."""
    topology = find_topology(model)
    settings = topology.settings
    base = model.unload().model
    h = base.embed_tokens(batch["input_ids"])
    position = torch.arange(h.shape[1])[None]
    rotary = base.rotary_emb(h, position)
    mask = torch.full((h.shape[1], h.shape[1]), float("-inf")).triu(1)[None, None]
    starts = {}
    for i, layer in enumerate(base.layers):
        starts[i] = h
        h = first_tensor(layer(h, attention_mask=mask, position_embeddings=rotary))
        for span in topology.spans:
            if span.end == i:
                slot = topology.slots[span.home]
                scale = settings.alpha / settings.r * span.gate
                h = h + scale * (starts[span.start] @ slot.down.weight.mT @ slot.up.weight.mT)
    return base.norm(h)


@pytest.mark.parametrize("merged", [False, True])
def test_the_branch_reads_the_raw_input_of_its_first_block_and_adds_to_the_raw_output_of_its_last(merged: bool) -> None:
    model, batch = lor2c(), tiny.batch("llama")
    topology = find_topology(model)
    if merged:
        topology.merge(topology.spans[1], topology.spans[2], topology.spans[2])
    hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
    assert torch.allclose(expected_hidden(model, batch), hidden, atol=1e-5)


class Places:
    """A hook that notes where outputs lie, and keeps none: it does not stop the update in place."""

    keeps_outputs = False

    def __init__(self) -> None:
        self.noted: list[int] = []

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        self.noted.append(first_tensor(output).data_ptr())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_in_place_updates_change_no_bit_of_output_or_gradient(architecture: str) -> None:
    batch = tiny.batch(architecture)
    fast, safe = lor2c(architecture, inplace=True), lor2c(architecture, inplace=False)
    for model in (fast, safe):
        topology = find_topology(model)
        topology.merge(topology.spans[1], topology.spans[2], topology.spans[1])
    before, after = Places(), Places()
    block = fast.get_submodule("base_model.model." + dict(zip(tiny.ARCHITECTURES, (
        "bert.encoder.layer.0", "roberta.encoder.layer.0", "model.layers.0", "model.layers.0", "transformer.h.0",
        "vit.layers.0", "backbone.layers.0"), strict=True))[architecture])  # fmt: skip
    block.register_forward_hook(before.note, prepend=True)
    block.register_forward_hook(after.note)
    for mode in (False, True):
        fast.train(mode)
        safe.train(mode)
        torch.manual_seed(5)
        with torch.no_grad():
            quick = fast(**batch).logits
        torch.manual_seed(5)
        with torch.no_grad():
            assert torch.equal(quick, safe(**batch).logits)
        torch.manual_seed(5)
        ours = gradients(fast, batch)
        torch.manual_seed(5)
        theirs = gradients(safe, batch)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert before.noted, "the hooks ran"
    assert before.noted == after.noted, "the output of this architecture's blocks is fresh: it can be updated in place"


def test_an_output_that_autograd_saved_is_updated_out_of_place() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.linear(self.norm(x)))

    model = nn.Sequential()
    model.layers = nn.ModuleList(Block() for _ in range(3))
    model.forward = lambda x: model.layers[2](model.layers[1](model.layers[0](x)))
    adapter = LoR2C(model, r=2)
    tiny.perturb(adapter)
    x = torch.randn(4, 8, requires_grad=True)
    model.forward(x).sum().backward()
    assert x.grad is not None
    adapter.remove()
    assert not any(block._forward_hooks for block in model.layers)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_hidden_states_hold_the_update_also_when_they_were_recorded_before(architecture: str) -> None:
    base, batch = tiny.model(architecture), tiny.batch(architecture)
    plain = base(**batch, output_hidden_states=True).hidden_states  # installs the recorder's hooks before ours
    model = get_peft_model(base, LoR2CConfig(r=4))
    tiny.perturb(model)
    states = model(**batch, output_hidden_states=True).hidden_states
    blocks = [b for b in model.modules() if hasattr(b, "lor2c")]
    seen: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda m, a, o: seen.append(first_tensor(o).detach().clone()))
    model(**batch)
    first = 0 if architecture == "mamba" else 1  # Falcon-Mamba's list starts with the output of block 0
    assert first == 0 or torch.equal(states[0], plain[0])
    assert not torch.equal(states[first], plain[first])
    for state, out in zip(states[first:-1], seen, strict=False):
        assert torch.equal(state, out)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "vit"])
def test_merged_spans_survive_gradient_checkpointing(architecture: str, reentrant: bool) -> None:
    model, batch = lor2c(architecture).train(), tiny.batch(architecture)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    topology = find_topology(model)
    topology.merge(topology.spans[0], topology.spans[1], topology.spans[0])
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if architecture != "vit":
        model.enable_input_require_grads()
    checkpointed = gradients(model, batch)
    if (
        reentrant and architecture == "vit"
    ):  # pixel inputs cannot require grad: reentrant mode loses block 0, ours or not
        checkpointed = {n: g for n, g in checkpointed.items() if n in plain}
    assert_close(checkpointed, plain, 1e-6)


def test_a_span_inside_reentrant_checkpointing_of_whole_calls_is_a_clear_error() -> None:
    from torch.utils.checkpoint import checkpoint

    model = tiny.model("llama")
    adapter = LoR2C(model, r=4)
    topology = adapter.topology
    topology.merge(topology.spans[0], topology.spans[1], topology.spans[0])
    tiny.perturb(adapter)
    x = torch.randn(2, 5, tiny.HIDDEN, requires_grad=True)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])

    def run(h: torch.Tensor, reentrant: bool) -> torch.Tensor:
        for layer in model.model.layers[:2]:
            h = first_tensor(checkpoint(layer, h, position_embeddings=rotary, use_reentrant=False)
                             if not reentrant else checkpoint(lambda t, b=layer: b(t, position_embeddings=rotary), h,
                                                              use_reentrant=True))  # fmt: skip
        return h

    run(x, False).sum().backward()
    assert all(p.grad is not None for p in topology.slots[0].parameters())
    with pytest.raises(RuntimeError, match=r"would lose its gradient.*use_reentrant"):
        run(x, True).sum().backward()


# ------------------------------------------------------------------------------------------------ the five defects


def test_defect_1_a_merged_module_keeps_training_with_its_own_adam_state() -> None:
    model = lor2c(max_merges=1, merge_interval=2)
    optimizer = adamw(model)
    controller = lor2c_controller(model, 8, optimizer=optimizer)
    train(model, range(1, 3), optimizer, controller)
    (event,) = controller.history
    kept = find_topology(model).slots[event["kept"]]
    weight, moment = kept.up.weight.detach().clone(), optimizer.state[kept.up.weight]["exp_avg"].clone()
    assert float(optimizer.state[kept.up.weight]["step"]) == 2
    train(model, range(3, 5), optimizer, controller)
    assert not torch.equal(kept.up.weight, weight)
    assert not torch.equal(optimizer.state[kept.up.weight]["exp_avg"], moment)
    assert float(optimizer.state[kept.up.weight]["step"]) == 4


@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2", "vit"])
def test_defect_2_injected_lora_trains_from_its_injection_to_the_end(architecture: str) -> None:
    model = lor2c(architecture, max_injections=1, inject_interval=2)
    optimizer = adamw(model)
    controller = lor2c_controller(model, 20, optimizer=optimizer)
    train(model, range(1, 3), optimizer, controller, architecture)
    (event,) = controller.history
    slot = find_topology(model).slots[event["kept"]]
    for step in range(3, 8):
        ups = [slot.lora(role)[1].detach().clone() for role, _, _ in slot.shapes]
        train(model, range(step, step + 1), optimizer, controller, architecture)
        for before, (role, _, _) in zip(ups, slot.shapes, strict=True):
            assert slot.lora(role)[1].requires_grad
            assert not torch.equal(slot.lora(role)[1], before), (step, role)


def concentrate(model: Any, blocks: set[int]) -> None:
    """Rank-one updates (SFS 0) in `blocks`, updates that use their rank of 8 evenly in the others."""
    for i, slot in enumerate(find_topology(model).slots):
        basis = torch.linalg.qr(torch.randn(tiny.HIDDEN, 8, generator=torch.Generator().manual_seed(i))).Q
        slot.down.weight.data.copy_(basis.mT)
        slot.up.weight.data.copy_(basis * (torch.tensor([1.0] + [1e-4] * 7) if i in blocks else torch.ones(8)))


def test_auto_injects_into_concentrated_branches_and_into_no_other() -> None:
    model = lor2c(noise=0.0, r=8, max_injections="auto")
    concentrate(model, {1, 2})
    controller = lor2c_controller(model, 400)
    events = [event for step in range(1, 401) for event in controller.step(step)]
    assert [(event["kind"], event["blocks"]) for event in events] == [("inject", [[1, 1]]), ("inject", [[2, 2]])]


def test_defect_3_the_pair_with_the_least_information_merges_not_the_most() -> None:
    model = lor2c(noise=0.0, r=8, max_merges=1, merge_interval=1)
    concentrate(model, {2, 3})
    (event,) = lor2c_controller(model, 4).step(1)
    assert event["blocks"] == [[2, 2], [3, 3]]
    assert max(event["sfs"]) < 0.01


def test_defect_4_scores_are_those_of_the_weights_at_the_event_not_of_an_older_snapshot() -> None:
    model = lor2c(max_merges=1, merge_interval=3)
    optimizer = adamw(model)
    controller = lor2c_controller(model, 12, optimizer=optimizer)
    train(model, range(1, 3), optimizer, controller)
    stale = controller.scores()
    train(model, range(3, 4), optimizer)  # the step's update, then the event
    fresh = controller.scores()
    (event,) = controller.step(3)
    assert event["sfs"] == [fresh[b[0]] for b in event["blocks"]]
    assert event["sfs"] != [stale[b[0]] for b in event["blocks"]]


def test_defect_5_a_merged_and_injected_structure_loads_whole_or_not_at_all(tmp_path: Path) -> None:
    model = lor2c(max_merges=1, max_injections=1, merge_interval=1, inject_interval=2)
    optimizer = adamw(model)
    controller = lor2c_controller(model, 8, optimizer=optimizer)
    train(model, range(1, 4), optimizer, controller)
    assert [event["kind"] for event in controller.history] == ["merge", "inject"]
    batch = tiny.batch("llama")
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
    assert torch.equal(back(**batch).logits, expected)
    assert find_topology(back).manifest() == find_topology(model).manifest()


def test_share_with_merge_scores_every_block() -> None:
    """In the published code a shared A hides all blocks but one from the scores, and nothing ever merges."""
    model = lor2c(share=True, max_merges=2, merge_interval=1)
    controller = lor2c_controller(model, 8)
    assert sorted(controller.scores()) == [0, 1, 2, 3]
    shared = find_topology(model).slots[0].down
    controller.step(1)
    controller.step(2)
    assert len(find_topology(model).spans) == 2
    assert shared.weight.numel() == 4 * tiny.HIDDEN


# ------------------------------------------------------------------------------------------------ counts


def meta_model(config: Any, kind: str = "AutoModel") -> Any:
    with torch.device("meta"):
        return getattr(transformers, kind).from_config(config)


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_parameter_counts_of_the_paper_on_roberta_base() -> None:
    config = transformers.RobertaConfig()
    assert trainable(get_peft_model(meta_model(config), LoraConfig(r=8, target_modules=["query", "value"]))) == 294_912
    assert trainable(get_peft_model(meta_model(config), LoR2CConfig(r=8))) == 147_456
    assert trainable(get_peft_model(meta_model(config), LoR2CConfig(r=8, share=True))) == 79_872
    assert trainable(get_peft_model(meta_model(config), LoR2CConfig(r=8, max_injections=3))) == 147_456


def test_each_merge_frees_12288_parameters_and_an_injection_none_on_roberta_base() -> None:
    config = transformers.RobertaConfig(vocab_size=64, intermediate_size=64, max_position_embeddings=40)
    model = get_peft_model(transformers.RobertaModel(config), LoR2CConfig(r=8, max_merges=3, max_injections=2))
    tiny.perturb(model)
    controller = LoR2CController(model, max_merges=3, max_injections=2, merge_interval=1, inject_interval=4)
    counts = [trainable(model)]
    for step in (1, 2, 3, 4, 8):
        controller.step(step)
        counts.append(trainable(model))
    assert counts == [147_456, 135_168, 122_880, 110_592, 110_592, 110_592]
    assert [e["kind"] for e in controller.history] == ["merge"] * 3 + ["inject"] * 2
    assert [e["parameters_after"] for e in controller.history] == counts[1:]


# ------------------------------------------------------------------------------------------------ fades, logs, resuming


def test_a_fade_starts_where_the_hard_switch_has_not_happened_and_ends_where_it_has() -> None:
    batch = tiny.batch("llama")
    hard, soft = lor2c(max_merges=1), lor2c(max_merges=1)
    before = hard(**batch).logits
    LoR2CController(hard, max_merges=1, merge_interval=1).step(1)
    controller = LoR2CController(soft, max_merges=1, merge_interval=1, fade_steps=4)
    controller.step(1)
    assert torch.allclose(soft(**batch).logits, before, atol=1e-6)
    gates = []
    for step in (2, 3, 4, 5):
        controller.step(step)
        gates.append(sorted(span.gate for span in find_topology(soft).spans))
    assert gates[0] == [0.25, 0.75, 0.75, 1.0, 1.0]
    assert gates[-1] == [1.0, 1.0, 1.0]
    assert torch.allclose(soft(**batch).logits, hard(**batch).logits, atol=1e-6)
    assert trainable(soft) == trainable(hard)


def test_an_injection_can_fade_too() -> None:
    model = lor2c(max_injections=1)
    controller = LoR2CController(model, max_injections=1, inject_interval=1, fade_steps=2)
    before = model(**tiny.batch("llama")).logits
    (event,) = controller.step(1)
    assert torch.equal(model(**tiny.batch("llama")).logits, before)
    controller.step(2)
    topology = find_topology(model)
    assert topology.injected == {event["kept"]: 0.5}
    controller.step(3)
    assert topology.injected == {event["kept"]: 1.0}
    assert event["kept"] not in [span.home for span in topology.spans]


def test_what_the_controller_did_and_why_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lowrank_fast.lor2c")
    controller = LoR2CController(lor2c(max_merges=1), max_merges=1, merge_interval=1)
    (event,) = controller.step(1)
    (record,) = caplog.records
    for part in ("step 1: merge", str(event["blocks"]), f"{event['sfs'][0]:.3f}", "parameters 1024 -> 768"):
        assert part in record.getMessage()


@pytest.mark.parametrize("fade_steps", [0, 3])
def test_a_plain_loop_resumes_in_mid_schedule_bit_for_bit(tmp_path: Path, fade_steps: int) -> None:
    fields = {"max_merges": 2, "max_injections": 1, "merge_interval": 3, "inject_interval": 4, "lora_dropout": 0.1}

    def fresh() -> tuple[Any, Any, Any, Any]:
        model = lor2c(**fields, fade_steps=fade_steps)
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
        return model, optimizer, scheduler, lor2c_controller(model, 10, optimizer=optimizer)

    def go(parts: tuple[Any, Any, Any, Any], steps: range) -> list[float]:
        losses = []
        for step in steps:
            torch.manual_seed(step)
            losses += train(parts[0], range(step, step + 1), parts[1], parts[3])
            parts[2].step()
        return losses

    whole = fresh()
    straight = go(whole, range(1, 11))
    part = fresh()
    go(part, range(1, 5))
    part[0].save_pretrained(tmp_path)
    states = part[1].state_dict(), part[2].state_dict()
    resumed = fresh()
    resumed[0].load_adapter(tmp_path, "default", is_trainable=True)
    resumed[1].load_state_dict(states[0])
    resumed[2].load_state_dict(states[1])
    assert go(resumed, range(5, 11)) == straight[4:]
    assert resumed[3].history == whole[3].history
    a, b = dict(whole[0].named_parameters()), dict(resumed[0].named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_loading_an_earlier_checkpoint_brings_merged_spans_back(tmp_path: Path) -> None:
    model, batch = lor2c(max_merges=1, max_injections=1), tiny.batch("llama")
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    LoR2CController(model, max_merges=1, max_injections=1, merge_interval=1, inject_interval=1).step(1)
    assert not torch.equal(model(**batch).logits, expected)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(model(**batch).logits, expected)


def trainer(model: Any, folder: Path, steps: int, resume: str | None = None) -> Any:
    data = [{k: v[0] for k, v in tiny.batch("llama", rows=1, seed=i).items()} for i in range(32)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, save_steps=5, learning_rate=3e-3,
        report_to=[], disable_tqdm=True, seed=7, use_cpu=True, dataloader_num_workers=0, logging_steps=100,
    )  # fmt: skip
    made = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[lor2c_controller(model).callback()]
    )
    made.train(resume_from_checkpoint=resume)
    return made


def test_the_trainer_runs_the_schedule_saves_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    fields = {"max_merges": 1, "max_injections": 1, "merge_interval": 3, "inject_interval": 7, "lora_dropout": 0.1}
    whole = lor2c(**fields)
    trainer(whole, tmp_path / "a", 10)
    assert [e["kind"] for e in find_topology(whole).progress.history] == ["merge", "inject"]
    resumed = lor2c(**fields)
    trainer(resumed, tmp_path / "b", 10, resume=str(tmp_path / "a" / "checkpoint-5"))
    assert find_topology(resumed).progress == find_topology(whole).progress
    a, b = dict(whole.named_parameters()), dict(resumed.named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)
