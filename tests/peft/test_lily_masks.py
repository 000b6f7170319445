"""Lily's padding mask belongs to one forward: checkpointing, calls without a mask, flattened inputs, hooks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_fast.peft import LilyConfig

from . import tiny
from .test_bad_input import assert_unchanged, fingerprint


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(self.norm(h))))


class Blocks(nn.Module):
    """A model with checkpoints of its own; `reentrant` is None for none."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(d) for _ in range(3))
        self.reentrant: bool | None = None

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def plain(routing: str, reentrant: bool | None) -> tuple[Any, Callable[[Any, int], Tensor]]:
    model = get_peft_model(Blocks(), LilyConfig(r=3, num_B=3, routing=routing, target_modules=["up", "down"])).double()
    tiny.perturb(model, 0.3)
    model.get_base_model().reentrant = reentrant

    def loss(model: Any, kept: int) -> Tensor:
        x = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(kept)).requires_grad_()
        return model(x, attention_mask=mask_of(kept)).square().sum()

    return model, loss


def llama(routing: str, reentrant: bool | None) -> tuple[Any, Callable[[Any, int], Tensor]]:
    config = LilyConfig(r=3, num_B=3, routing=routing, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    model = get_peft_model(tiny.model("llama"), config).double().train()
    tiny.perturb(model, 0.3)
    model.enable_input_require_grads()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    def loss(model: Any, kept: int) -> Tensor:
        ids = tiny.batch("llama", rows=2, tokens=6, seed=kept)["input_ids"]
        return model(input_ids=ids, attention_mask=mask_of(kept), labels=ids).loss

    return model, loss


def mask_of(kept: int) -> Tensor:
    """A mask of two rows and six columns whose second row ends after `kept`."""
    return torch.stack([torch.ones(6, dtype=torch.long), (torch.arange(6) < kept).long()])


def gradients(model: Any, run: Callable[[], Tensor]) -> Tensor:
    model.zero_grad()
    run().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def two_forwards(model: Any, loss: Callable[[Any, int], Tensor]) -> Tensor:
    return loss(model, 3) + loss(model, 5)


def eval_between(model: Any, loss: Callable[[Any, int], Tensor]) -> Tensor:
    out = loss(model, 3)
    with torch.no_grad():
        loss(model, 5)
    return out


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # the forward without gradients
@pytest.mark.parametrize("between", [two_forwards, eval_between])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("routing", ["batch", "sample"])
@pytest.mark.parametrize("make", [plain, llama])
def test_a_recomputation_has_the_mask_of_its_own_forward(
    make: Any, routing: str, reentrant: bool, between: Any
) -> None:
    found, expected = (
        gradients(model, lambda model=model, loss=loss: between(model, loss))
        for model, loss in (make(routing, reentrant), make(routing, None))
    )
    assert float((found - expected).norm() / expected.norm()) < 1e-12


def test_inputs_that_come_back_as_copies_do_not_matter() -> None:
    (model, loss), (reference, _) = plain("batch", False), plain("batch", None)
    expected = gradients(reference, lambda: two_forwards(reference, loss))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):  # save_on_cpu, on a GPU
        assert torch.allclose(gradients(model, lambda: two_forwards(model, loss)), expected)


def test_one_input_under_two_masks() -> None:
    x = torch.randn(2, 6, 8, dtype=torch.float64)

    def both(model: Any) -> Tensor:
        return model(x, attention_mask=mask_of(3)).sum() - model(x, attention_mask=mask_of(5)).square().sum()

    found, expected = (gradients(m, lambda m=m: both(m)) for m in (plain("batch", r)[0] for r in (False, None)))
    assert torch.allclose(found, expected, rtol=1e-12)


def test_a_recomputation_whose_mask_is_not_known_is_an_error() -> None:
    model, _ = plain("batch", False)
    inner: list[Tensor] = []
    model.get_base_model().blocks[1].register_forward_hook(lambda module, args, output: inner.append(output))
    model(torch.randn(2, 6, 8, dtype=torch.float64), attention_mask=mask_of(3))
    with pytest.raises(RuntimeError, match="did not begin at an output of the model"):
        inner[0].sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_of_a_forward_is_kept_after_its_graph(reentrant: bool) -> None:
    model, _ = plain("batch", reentrant)
    mask = mask_of(3)
    kept = weakref.ref(mask)
    out = model(torch.randn(2, 6, 8, dtype=torch.float64).requires_grad_(), attention_mask=mask)
    del mask
    assert kept() is not None
    out.sum().backward()
    del out
    assert kept() is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_an_encoder_and_decoder_has_no_mask_and_is_recomputed_all_the_same(reentrant: bool) -> None:
    """Two streams of tokens, of which one mask says nothing: see `LilyModel`."""
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=tiny.VOCAB, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    ids = tiny.batch("llama", rows=2, tokens=6)["input_ids"]
    vectors = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(
            transformers.T5ForConditionalGeneration(config),
            LilyConfig(r=3, num_B=3, routing="batch", target_modules=["q", "v"]),
        )
        tiny.perturb(model, 0.3)
        model.train().enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        vectors.append(gradients(model, lambda m=model: m(input_ids=ids, attention_mask=mask_of(3), labels=ids).loss))
    assert torch.allclose(*vectors, rtol=1e-4, atol=1e-6)


def test_no_mask_outlives_its_forward_even_one_that_fails() -> None:
    model = get_peft_model(tiny.model("llama"), LilyConfig(r=4, routing="batch", target_modules=["up_proj"])).eval()
    tiny.perturb(model, 0.3)
    inner, ids = model.get_base_model().model, tiny.batch("llama", rows=2, tokens=6)["input_ids"]
    expected = inner(ids).last_hidden_state
    assert not torch.equal(model(ids, mask_of(3), output_hidden_states=True).hidden_states[-1], expected)
    assert torch.equal(inner(ids).last_hidden_state, expected)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 6), attention_mask=mask_of(3))
    assert torch.equal(inner(ids).last_hidden_state, expected)


def test_copies_have_masks_of_their_own_and_unloading_leaves_no_hook() -> None:
    base = tiny.model("llama")
    base.requires_grad_(False)
    before = fingerprint(base)
    model = get_peft_model(base, LilyConfig(r=4, routing="batch", target_modules=["q_proj", "up_proj"]))
    model.add_adapter("b", LilyConfig(r=4, routing="sample", target_modules=["down_proj"]))
    assert len(model.get_base_model()._forward_pre_hooks) == 1, "once for both adapters"
    twin = copy.deepcopy(model)
    assert twin.base_model.padding is not model.base_model.padding
    for each in (model, twin):
        unloaded = each.unload()
        unloaded.requires_grad_(False)
        assert_unchanged(unloaded, before)


# ------------------------------------------------------------------------------------------ flattened and 2-D inputs


def opt(routing: str, **fields: Any) -> Any:
    config = transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=tiny.VOCAB,
        max_position_embeddings=32, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(
        transformers.OPTForCausalLM(config), LilyConfig(r=4, routing=routing, target_modules=["fc1", "fc2"], **fields)
    )
    tiny.perturb(model, 0.3)
    return model.eval()


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_padding_stays_out_of_the_flat_inputs_of_opt(routing: str) -> None:
    model, ids = opt(routing), tiny.batch("llama", rows=2, tokens=6)["input_ids"]
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        padded = torch.cat([ids, torch.full((2, 5), 7)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 5, dtype=ids.dtype)], 1)
        assert torch.allclose(model(input_ids=padded, attention_mask=mask).logits[:, :6], alone, atol=1e-5)
        if routing == "sample":  # a mean over a sample, not over the batch
            one = model(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1])).logits
            assert torch.allclose(one, alone[:1], atol=1e-5)


@pytest.mark.parametrize("routing", ["batch", "sample"])
def test_flat_inputs_are_recomputed_as_they_were_also_where_padding_counts(routing: str) -> None:
    def loss(model: Any, kept: int) -> Tensor:
        ids = tiny.batch("llama", rows=2, tokens=6, seed=kept)["input_ids"]
        return model(input_ids=ids, attention_mask=mask_of(kept), labels=ids).loss

    vectors = []
    for checkpointed in (False, True):
        model = opt(routing, use_attention_mask=False).double().train()
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable()
        vectors.append(gradients(model, lambda model=model: two_forwards(model, loss)))
    assert float((vectors[1] - vectors[0]).norm() / vectors[0].norm()) < 1e-12


def test_rows_that_are_not_the_tokens_of_the_mask_are_not_taken_for_them() -> None:
    model, _ = plain("batch", None)
    layer = model.get_base_model().blocks[0].up
    seen = []
    for rows in (2, 6, 11, 12):
        x = torch.randn(rows, 8, dtype=torch.float64)
        handle = (
            model.get_base_model()
            .blocks[0]
            .register_forward_pre_hook(lambda module, args, x=x: seen.append(layer.padding.folded(x)))
        )
        model(torch.randn(2, 6, 8, dtype=torch.float64), attention_mask=mask_of(3))
        handle.remove()
    assert seen == [None, None, None, (2, 6)]


@pytest.mark.parametrize("architecture", ["bert", "vit"])
def test_sample_routing_takes_a_two_dimensional_input_as_one_token_per_sample(architecture: str) -> None:
    model = get_peft_model(tiny.model(architecture), LilyConfig(r=4, routing="sample", target_modules="all-linear"))
    tiny.perturb(model, 0.3)
    model.eval()
    batch = tiny.batch(architecture)
    whole = model(**batch).logits
    single = model(**{name: tensor[:1] for name, tensor in batch.items()}).logits
    assert torch.allclose(whole[:1], single, atol=1e-5)
    model(**batch).loss.backward()


# ------------------------------------------------------------------------------------------ adapters that come and go


def test_a_failed_adapter_after_the_last_one_is_deleted_leaves_the_next_its_mask() -> None:
    config = {"r": 4, "routing": "batch"}
    model = get_peft_model(tiny.model("llama"), LilyConfig(**config, target_modules=["up_proj"]))
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="did you mean 'up_proj'"):
        model.add_adapter("b", LilyConfig(**config, target_modules=["upproj"]))
    model.add_adapter("c", LilyConfig(**config, target_modules=["up_proj"]))
    model.set_adapter("c")
    tiny.perturb(model, 0.3)
    model.eval()
    ids = tiny.batch("llama", rows=2, tokens=6)["input_ids"]
    alone = model(ids[:, :3], attention_mask=torch.ones(2, 3)).logits
    mask = (torch.arange(6) < 3).long().expand(2, 6)
    assert torch.allclose(model(ids, attention_mask=mask).logits[:, :3], alone, atol=1e-5)
