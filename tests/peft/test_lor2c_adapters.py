"""Several LoR2C adapters on one model: none changes another; each is saved by itself; the last can be replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lowrank_fast.methods.lor2c_controller import find_topology
from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, LoR2CConfig, effilora_reducer, lor2c_controller

from . import tiny


def injected(architecture: str = "llama", targets: list[str] | None = None, **changes: Any) -> Any:
    """A model whose adapter has an injected block."""
    config = LoR2CConfig(r=4, max_injections=1, target_modules=targets)
    model = get_peft_model(tiny.model(architecture, **changes), config)
    inject(model, "default")
    return model.eval()


def inject(model: Any, name: str) -> None:
    topology = find_topology(model, name)
    topology.inject(topology.spans[1])
    tiny.perturb(model, 0.3)


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=32, d_ff=48, num_layers=3, num_heads=4, d_kv=8, vocab_size=tiny.VOCAB, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("targets", [["k_proj", "v_proj"], ["v_proj", "q_proj"]])
def test_an_adapter_with_other_projections_leaves_the_first_as_it_was(targets: list[str], heads: int) -> None:
    model, batch = injected(num_key_value_heads=heads), tiny.batch("llama")
    expected = model(**batch).logits
    model.add_adapter("b", LoR2CConfig(r=4, max_injections=1, target_modules=targets))
    assert torch.equal(model(**batch).logits, expected)
    model.set_adapter("b")
    inject(model, "b")
    other = model(**batch).logits
    alone = injected(targets=targets, num_key_value_heads=heads)
    alone.load_state_dict(
        {k.replace(".b.", ".default."): v for k, v in model.state_dict().items() if ".default." not in k}
    )
    assert torch.allclose(other, alone(**batch).logits, atol=1e-6)
    model.set_adapter("default")
    assert torch.equal(model(**batch).logits, expected)
    model.delete_adapter("b")
    assert torch.equal(model(**batch).logits, expected)


def test_a_name_can_be_used_again_with_other_projections() -> None:
    model, batch = injected(), tiny.batch("llama")
    model.add_adapter("b", LoR2CConfig(r=4, max_injections=1))
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    model.delete_adapter("default")
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks - 2 * tiny.LAYERS
    model.add_adapter("default", LoR2CConfig(r=4, max_injections=1, target_modules=["k_proj", "v_proj"]))
    model.set_adapter("default")
    inject(model, "default")
    model(**batch).loss.backward()
    block = model.get_base_model().model.layers[1]
    assert [len(m._forward_hooks) for m in (block.self_attn.q_proj, block.self_attn.k_proj)] == [1, 1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "bert"])
def test_a_second_adapter_does_not_take_the_firsts_lora_for_the_models_projections(architecture: str) -> None:
    model = injected(architecture)
    model.add_adapter("b", LoR2CConfig(r=4, max_injections=1))
    shapes = [find_topology(model, name).slots[0].shapes for name in ("default", "b")]
    assert shapes[0] == shapes[1]


def test_the_only_adapter_can_be_deleted_and_another_added() -> None:
    model, batch = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4)), tiny.batch("llama")
    base = tiny.model("llama")(**batch).logits
    model.delete_adapter("default")
    bare = model.base_model.model  # the PeftModel itself cannot run without an adapter
    assert torch.equal(bare(**batch).logits, base)
    assert not hasattr(bare.model.layers[0].lor2c, "weight")
    model.add_adapter("z", LoR2CConfig(r=4))
    model.set_adapter("z")
    tiny.perturb(model)
    assert not torch.equal(model(**batch).logits, base)


def test_encoder_and_decoder_have_an_adapter_each_and_both_are_saved(tmp_path: Path) -> None:
    model = get_peft_model(t5(), LoR2CConfig(r=4, layers="encoder.block"), adapter_name="enc")
    tiny.perturb(model)
    model.add_adapter("dec", LoR2CConfig(r=4, layers="decoder.block"))
    model.set_adapter("dec")
    tiny.perturb(model, seed=4)
    lor2c_controller(model, 10)
    batch = tiny.batch("llama")
    expected = {}
    for name in ("enc", "dec"):
        model.set_adapter(name)
        expected[name] = model(**batch).logits
        assert find_topology(model) is find_topology(model, name)
    model.save_pretrained(tmp_path)
    for name, logits in expected.items():
        back = PeftModel.from_pretrained(t5(), tmp_path / name)
        assert torch.equal(back(**batch).logits, logits), name
    with pytest.raises(ValueError, match="no LoR2C adapter 'x'; there are 'enc', 'dec'"):
        find_topology(model, "x")


def test_a_controller_names_the_model_it_cannot_drive() -> None:
    plain = tiny.model("llama")
    lily = get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=["q_proj"]))
    lora = get_peft_model(tiny.model("llama"), LoraConfig(r=4, target_modules=["q_proj"]))
    effilora = get_peft_model(tiny.model("llama"), EffiLoRAConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match=r"lor2c_controller: needs a PEFT model.*got LlamaForCausalLM"):
        lor2c_controller(plain, 10)
    with pytest.raises(TypeError, match=r"effilora_reducer: needs a PEFT model.*got LlamaForCausalLM"):
        effilora_reducer(plain)
    for model, kind in ((lily, "LilyConfig"), (lora, "LoraConfig"), (effilora, "EffiLoRAConfig")):
        with pytest.raises(
            TypeError, match=f"lor2c_controller: adapter 'default' must be one of LoR2CConfig; it is one of {kind}"
        ):
            lor2c_controller(model, 10)
    with pytest.raises(
        TypeError, match="effilora_reducer: adapter 'default' must be one of EffiLoRAConfig; it is one of LilyC"
    ):
        effilora_reducer(lily)
    with pytest.raises(ValueError, match="no adapter 'nope'; the model has 'default'"):
        effilora_reducer(effilora, adapter_name="nope")
