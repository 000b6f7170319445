"""EffiLoRA: the shared A, masked heads, the Reducer's two signals, exact merging, what is kept for backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from lowrank_fast.methods import Reducer
from lowrank_fast.methods.reducer import BETA
from lowrank_fast.nn import RoutedLinear
from lowrank_fast.peft import EffiLoRAConfig, effilora_reducer, export_lora
from lowrank_fast.peft.effilora import EffiLoRALayer

from . import tiny
from .test_lily import CALLS, llama3_8b, relative
from .test_lor2c import meta_model, trainable


def effilora(noise: float = 0.1, layers: int = tiny.LAYERS, **fields: Any) -> Any:
    config = EffiLoRAConfig(**{"r": 4, "lora_alpha": 8.0, "importance": "gradient", "target_modules": CALLS, **fields})
    model = get_peft_model(tiny.model("llama", num_hidden_layers=layers), config)
    if noise:
        tiny.perturb(model, noise)
    return model.eval()


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def step(model: Any, reducer: Any, optimizer: Any, n: int) -> list[str]:
    active = reducer.begin_step(n)
    model(**tiny.batch("llama", seed=n)).loss.backward()
    reducer.end_backward(n)
    optimizer.step()
    optimizer.zero_grad()
    return active


def heads(model: Any) -> dict[str, list[torch.Tensor]]:
    """Layer number -> its banks and routers."""
    found: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if "effilora_B" in name or "effilora_router" in name:
            found.setdefault(f"layer {name.split('.layers.')[1].split('.')[0]}", []).append(parameter)
    return found


@pytest.mark.parametrize(("share_A", "count"), [("in_features", 44_630_016), ("slice", 44_498_944)])
def test_parameter_counts_on_llama3_8b(share_A: str, count: int) -> None:
    outputs = 4096 + 2 * 1024 + 4096 + 2 * 14_336 + 4096
    widths = 4096 + 14_336 if share_A == "in_features" else 14_336
    assert count == 32 * (widths + 32 * outputs)
    model = get_peft_model(meta_model(llama3_8b()), EffiLoRAConfig(r=32, share_A=share_A, target_modules=CALLS))
    assert trainable(model) == count
    inputs = 4 * 4096 + 2 * 4096 + 14_336
    assert 32 * 32 * (inputs + outputs) == 83_886_080  # LoRA r 32 on the same targets


def test_one_a_serves_every_layer_of_one_input_width() -> None:
    layers = [m for m in effilora().modules() if isinstance(m, EffiLoRALayer)]
    assert len({id(m.effilora_A["default"]) for m in layers}) == len({m.in_features for m in layers}) == 2
    sliced = [m for m in effilora(share_A="slice").modules() if isinstance(m, EffiLoRALayer)]
    assert len({id(m.effilora_A["default"]) for m in sliced}) == 1
    per_target = [m for m in effilora(share_A="target").modules() if isinstance(m, EffiLoRALayer)]
    assert len({id(m.effilora_A["default"]) for m in per_target}) == len(CALLS)


@pytest.mark.parametrize("share_A", ["in_features", "slice"])
def test_the_update_is_the_hydralora_forward(share_A: str) -> None:
    model = effilora(num_B=3, share_A=share_A)
    layer = next(m for m in model.modules() if isinstance(m, EffiLoRALayer))
    x = torch.randn(2, 5, tiny.HIDDEN, generator=torch.Generator().manual_seed(2))
    A = layer.effilora_A["default"].weight[:, : tiny.HIDDEN]
    w = torch.softmax(x @ layer.effilora_router["default"].weight.mT, -1)
    expected = layer.base_layer(x)
    for e, B in enumerate(layer.effilora_B["default"].bank):
        expected = expected + w[..., e : e + 1] * (x @ A.mT @ B.mT) * 2.0
    assert torch.allclose(layer(x), expected, atol=1e-6)


@pytest.mark.parametrize("experts", [1, 3])
def test_inactive_heads_keep_their_bits_through_adamw_with_momentum_and_weight_decay(experts: int) -> None:
    model = effilora(num_B=experts)
    optimizer = adamw(model)
    reducer = effilora_reducer(model)
    for n in range(10):  # the warm-up gives every head momentum
        step(model, reducer, optimizer, n)
    before = {unit: [p.detach().clone() for p in ps] for unit, ps in heads(model).items()}
    counts = {unit: [float(optimizer.state[p]["step"]) for p in ps] for unit, ps in heads(model).items()}
    active = reducer.begin_step(11)
    assert len(active) == 1
    model(**tiny.batch("llama")).loss.backward()
    gradients = {unit: [p.grad for p in ps] for unit, ps in heads(model).items()}
    reducer.end_backward(11)
    optimizer.step()
    for unit, ps in heads(model).items():
        for p, old, grad, count in zip(ps, before[unit], gradients[unit], counts[unit], strict=True):
            if unit in active:
                assert not torch.equal(p, old)
            else:
                assert grad is None, "the backward computed no gradient"
                assert torch.equal(p, old)
                assert float(optimizer.state[p]["step"]) == count
    assert all(p.requires_grad for ps in heads(model).values() for p in ps)


@pytest.mark.parametrize("a_grad", ["all", "active"])
def test_freezing_heads_changes_neither_the_output_nor_what_flows_through(a_grad: str) -> None:
    model, batch = effilora(num_B=3, a_grad=a_grad), tiny.batch("llama")
    model.enable_input_require_grads()
    embeddings = model.get_base_model().model.embed_tokens
    caught: list[torch.Tensor] = []

    def catch(module: Any, args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        caught.append(output)

    embeddings.register_forward_hook(catch)
    full = model(**batch)
    full.loss.backward()
    shared = [p for n, p in model.named_parameters() if "effilora_A" in n]
    a_full = [p.grad.clone() for p in shared]
    model.zero_grad()
    for m in model.modules():
        if isinstance(m, EffiLoRALayer):
            m.active["default"] = False
    frozen = model(**batch)
    frozen.loss.backward()
    assert torch.equal(frozen.logits, full.logits)
    assert torch.allclose(caught[0].grad, caught[1].grad, atol=1e-7)
    if a_grad == "all":
        assert all(torch.allclose(p.grad, g, atol=1e-7) for p, g in zip(shared, a_full, strict=True))
    else:
        assert all(p.grad is None for p in shared)


def saved_bytes(layer: EffiLoRALayer, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward of one layer, parameters aside."""
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in parameters:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("experts", [1, 3])
def test_x_is_kept_only_where_a_is_trained(experts: int) -> None:
    x = torch.randn(64, tiny.HIDDEN)
    for fields, inactive_keeps_x in (
        ({"a_grad": "all"}, True),
        ({"a_grad": "active"}, False),
        ({"freeze_A": True}, False),
    ):
        model = effilora(num_B=experts, fuse_inputs=False, **fields)
        layer = next(m for m in model.modules() if isinstance(m, EffiLoRALayer))
        layer.active["default"] = False
        x.requires_grad_(True)
        kept = saved_bytes(layer, x)
        assert (kept >= x.nbytes) == inactive_keeps_x, (fields, kept)


def test_a_frozen_a_stays_as_it_was() -> None:
    model = effilora(freeze_A=True)
    assert not [n for n, p in model.named_parameters() if "effilora_A" in n and p.requires_grad]
    model.set_adapter("default")
    assert not [n for n, p in model.named_parameters() if "effilora_A" in n and p.requires_grad]


# ------------------------------------------------------------------------------------------------ Reducer


def suppression_effect(model: Any, reducer: Any, batch: dict[str, torch.Tensor]) -> dict[str, float]:
    """Unit -> by how much the loss rises when that unit alone is suppressed."""
    with torch.no_grad():
        base = float(model(**batch).loss)
        found = {}
        for unit in reducer.units:
            found[unit] = reducer.suppressed_loss([unit], batch) - base
    return found


def spearman(a: list[float], b: list[float]) -> float:
    ranks = [torch.tensor(v).argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def test_the_free_gradient_signal_ranks_layers_as_suppression_does() -> None:
    """After some training, on the same batch: Spearman correlation over 12 layers, mean over three seeds."""
    correlations = []
    for seed in range(3):
        model = effilora(noise=0.0, layers=12, keep_ratio=1.0)
        optimizer = adamw(model)
        for i in range(25):
            model(**tiny.batch("llama", seed=1000 * seed + i % 4)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        reducer = effilora_reducer(model)
        batch = tiny.batch("llama", rows=8, seed=77 + seed)
        model(**batch).loss.backward()
        signal, effect = reducer.signals(), suppression_effect(model, reducer, batch)
        correlations.append(spearman([signal[u] for u in reducer.units], [effect[u] for u in reducer.units]))
    assert sum(correlations) / 3 > 0.8, correlations


def test_the_signal_is_minus_the_derivative_of_the_loss_by_the_layers_own_scale() -> None:
    model, batch = effilora(num_B=3), tiny.batch("llama")
    reducer = effilora_reducer(model)
    model(**batch).loss.backward()
    for unit, layers in reducer.units.items():
        losses = []
        for factor in (1.0 - 1e-2, 1.0 + 1e-2):
            for layer in layers:
                layer.set_suppression(factor)
            with torch.no_grad():
                losses.append(float(model(**batch).loss.double()))
        for layer in layers:
            layer.set_suppression(1.0)
        derivative = (losses[1] - losses[0]) / 2e-2
        assert reducer.signals()[unit] == pytest.approx(-derivative, rel=0.05, abs=2e-5)


def test_suppression_scales_the_update_and_puts_everything_back() -> None:
    model, batch = effilora(num_B=3).train(), tiny.batch("llama")
    model.model.model.embed_tokens.eval()
    modes = [m.training for m in model.modules()]
    before = model(**batch).logits
    reducer = effilora_reducer(model)
    reducer.importance, reducer._validation = "suppression", [batch]
    calls: list[float] = []
    layer = next(m for m in model.modules() if isinstance(m, EffiLoRALayer))
    layer.register_forward_pre_hook(lambda m, a: calls.append(m.suppression["default"]))
    reducer.begin_step(10)
    assert len(calls) == 3
    assert set(calls) <= {BETA, 1.0}
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model(**batch).logits, before)
    assert any(reducer.scores.values())


def test_suppression_updates_scores_by_the_published_rule() -> None:
    """Losses 1, 2, 3 for three trials: R = exp(-loss) - mean; I -= 10 R q (1 - q) for the suppressed units."""
    model = effilora()
    losses = iter([1.0, 2.0, 3.0])
    reducer = effilora_reducer(model, validation=[None], loss=lambda m, b: torch.tensor(next(losses)))
    reducer.importance = "suppression"
    trials: list[list[str]] = []
    original = reducer.suppressed_loss
    reducer.suppressed_loss = lambda names, batch: (trials.append(names), original(names, batch))[1]  # type: ignore
    reducer.begin_step(10)
    rewards = torch.exp(-torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    rewards = rewards - rewards.mean()
    expected = dict.fromkeys(reducer.units, 0.0)
    for reward, names in zip(rewards.tolist(), trials, strict=True):
        assert len(names) == len(set(names)) == 2
        for name in names:
            q = float(torch.sigmoid(torch.tensor(-expected[name], dtype=torch.float64)))
            expected[name] -= 10 * reward * q * (1 - q)
    assert reducer.scores == pytest.approx(expected)


def test_the_most_important_layers_are_chosen_most_often_and_top_takes_the_best() -> None:
    model = effilora(layers=8)
    reducer = effilora_reducer(model)
    reducer.state.scores.update({unit: 3.0 if unit in ("layer 2", "layer 5") else -3.0 for unit in reducer.units})
    counts = dict.fromkeys(reducer.units, 0)
    for n in range(11, 411):
        if n % 10:
            for unit in reducer.begin_step(n):
                counts[unit] += 1
    assert min(counts["layer 2"], counts["layer 5"]) > 2 * max(
        v for u, v in counts.items() if u not in ("layer 2", "layer 5")
    )
    assert 0 < reducer.entropy() < 0.9
    reducer.selection = "top"
    assert sorted(reducer.begin_step(11)) == ["layer 2", "layer 5"]


def test_warm_up_keeps_all_active_and_keep_one_always_does() -> None:
    model = effilora()
    reducer = effilora_reducer(model)
    assert [len(reducer.begin_step(n)) for n in (0, 9, 11)] == [4, 4, 1]
    always = effilora_reducer(effilora(keep_ratio=1.0))
    assert [len(always.begin_step(n)) for n in (0, 11, 20)] == [4, 4, 4]


@pytest.mark.parametrize(("interval", "warmup"), [(0, None), (2.5, None), (3, -3), (3, 1.5)])
def test_counts_of_steps_that_cannot_be_are_refused(interval: Any, warmup: Any) -> None:
    layers = {"layers.0.proj": RoutedLinear(nn.Linear(8, 8), r=2, experts=2)}
    with pytest.raises(ValueError, match=r"Reducer: (interval|warmup) must be an integer >= [01]; got"):
        Reducer(nn.Module(), layers, importance="gradient", interval=interval, warmup=warmup)


def test_every_rank_and_every_rerun_choose_the_same() -> None:
    choices = []
    for _ in range(2):
        model = effilora()
        reducer, optimizer = effilora_reducer(model), adamw(model)
        torch.manual_seed(len(choices))  # the global generator plays no part
        choices.append([step(model, reducer, optimizer, n) for n in range(24)])
    assert choices[0] == choices[1]


@pytest.mark.parametrize("importance", ["gradient", "suppression"])
def test_a_run_resumes_bit_for_bit(tmp_path: Path, importance: str) -> None:
    fields = {"importance": importance, "interval": 3, "num_B": 2}
    validation = [tiny.batch("llama", seed=i) for i in (50, 51)]

    def fresh() -> tuple[Any, Any, Any]:
        model = effilora(**fields)
        return model, effilora_reducer(model, validation=validation), adamw(model)

    whole = fresh()
    straight = [step(*whole, n) for n in range(12)]
    part = fresh()
    for n in range(7):
        step(*part, n)
    part[0].save_pretrained(tmp_path)
    resumed = fresh()
    resumed[0].load_adapter(tmp_path, "default", is_trainable=True)
    resumed[2].load_state_dict(part[2].state_dict())
    assert [step(*resumed, n) for n in range(7, 12)] == straight[7:]
    a, b = dict(whole[0].named_parameters()), dict(resumed[0].named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_trainer_drives_the_reducer(tmp_path: Path) -> None:
    model = effilora(interval=2, warmup=2)
    reducer = effilora_reducer(model)
    chosen: list[int] = []
    original = reducer.begin_step
    reducer.begin_step = lambda n: (chosen.append(len(original(n))), reducer.active)[1]  # type: ignore[method-assign]
    data = [{k: v[0] for k, v in tiny.batch("llama", rows=1, seed=i).items()} for i in range(12)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[reducer.callback()]).train()
    assert chosen == [4, 4, 1, 1, 1, 1]
    assert any(reducer.scores.values())


@pytest.mark.parametrize("importance", ["gradient", "suppression"])
def test_the_trainer_resumes_in_mid_schedule_bit_for_bit(tmp_path: Path, importance: str) -> None:
    fields = {"importance": importance, "interval": 2, "warmup": 2, "num_B": 2, "lora_dropout": 0.1}
    data = [{k: v[0] for k, v in tiny.batch("llama", rows=1, seed=i).items()} for i in range(32)]
    validation = [tiny.batch("llama", seed=i) for i in (50, 51)]

    def train(folder: str, resume: str | None = None) -> tuple[Any, Any]:
        model = effilora(**fields)
        reducer = effilora_reducer(model, validation=validation)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder), max_steps=11, per_device_train_batch_size=2, save_steps=5, seed=7,
            learning_rate=3e-3, weight_decay=0.1, report_to=[], disable_tqdm=True, use_cpu=True,
        )  # fmt: skip
        callbacks = [reducer.callback()]
        transformers.Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks).train(
            resume_from_checkpoint=resume
        )
        return model, reducer

    whole, straight = train("whole")
    resumed, again = train("resumed", str(tmp_path / "whole" / "checkpoint-5"))
    assert again.scores == straight.scores
    assert any(straight.scores.values())
    a, b = dict(whole.named_parameters()), dict(resumed.named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------------------------ merging


def test_one_head_merges_exactly_and_exports_as_a_plain_lora(tmp_path: Path) -> None:
    model, batch = effilora(), tiny.batch("llama")
    expected = model(**batch).logits
    export_lora(model, tmp_path)
    assert relative(PeftModel.from_pretrained(tiny.model("llama"), tmp_path)(**batch).logits, expected) < 1e-6
    model.merge_adapter()
    assert relative(model(**batch).logits, expected) < 1e-6
    model.unmerge_adapter()
    assert torch.equal(model(**batch).logits, expected)
    assert relative(model.merge_and_unload()(**batch).logits, expected) < 1e-6


def test_several_heads_refuse_to_merge() -> None:
    model = effilora(num_B=3)
    with pytest.raises(RuntimeError, match="num_B=3 heads mixed per token"):
        model.merge_and_unload()
