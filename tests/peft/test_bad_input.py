"""Bad input: a clear error that names what was wrong, and a model that is exactly as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lowrank_fast.methods.lor2c import MANIFEST_VERSION, read_manifest
from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, LoR2CConfig, calibrate, effilora_reducer
from lowrank_fast.peft.tuner import json_tensor

from . import tiny
from .conftest import METHODS, adapter


def fingerprint(model: nn.Module) -> list[Any]:
    """Names, values, flags, hooks and children of a model."""
    parameters = [(n, p.requires_grad, p.detach().clone()) for n, p in model.named_parameters()]
    hooks = [(n, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return [parameters, hooks]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    after = fingerprint(model)
    assert [(n, f) for n, f, _ in after[0]] == [(n, f) for n, f, _ in before[0]]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(after[0], before[0], strict=True))
    assert after[1] == before[1]


@pytest.mark.parametrize("config", [LilyConfig, EffiLoRAConfig])
def test_unknown_targets_list_the_near_names(config: Any) -> None:
    model = tiny.model("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'q_porj' matches no module of LlamaForCausalLM; did you mean 'q_proj'"):
        get_peft_model(model, config(target_modules=["q_porj", "v_proj"]))
    with pytest.raises(ValueError, match=r"'v_prj' matches no module of LlamaForCausalLM; did you mean 'v_proj'"):
        get_peft_model(model, config(target_modules=["q_proj", "v_prj"], layers_to_transform=[0, 1]))
    for regex in ("q_porj", r".*\.self_attn\.q_porj"):
        with pytest.raises(ValueError, match=r"the regex '.*q_porj' matches no module .*; did you mean 'q_proj'"):
            get_peft_model(model, config(target_modules=regex))
    assert_unchanged(model, before)


def test_unknown_projections_for_injection_list_the_near_names() -> None:
    model = tiny.model("bert")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'qeury' is not a module of BertLayer; did you mean 'query'"):
        get_peft_model(model, LoR2CConfig(max_injections=1, target_modules=["qeury", "value"]))
    with pytest.raises(ValueError, match=r"FalconMambaBlock has no query and value projections"):
        get_peft_model(tiny.model("mamba"), LoR2CConfig(max_injections=1))
    assert_unchanged(model, before)


class Mixed(nn.Module):
    """Blocks of two hidden sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d)) for d in (8, 8, 16))


def test_layer_lists_that_cannot_be_found_or_used() -> None:
    with pytest.raises(ValueError, match="no list of blocks found"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoR2CConfig())
    model = tiny.model("llama")
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"'model.layer' must name a non-empty nn.ModuleList.*'model.layers'"):
        get_peft_model(model, LoR2CConfig(layers="model.layer"))
    with pytest.raises(ValueError, match=r"blocks of one hidden size; block 0 has 8, block 2 has 16"):
        get_peft_model(Mixed(), LoR2CConfig())
    two = nn.Module()
    two.a, two.b = (nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(2)) for _ in range(2))
    with pytest.raises(ValueError, match="several lists of blocks fit: a, b"):
        get_peft_model(two, LoR2CConfig())
    assert get_peft_model(two, LoR2CConfig(layers="b")).get_base_model().b[0].lor2c is not None
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoR2CConfig(r=0), r"r must be an integer >= 1; got 0"),
        (lambda: LilyConfig(r=-1), r"r must be an integer >= 1; got -1"),
        (lambda: EffiLoRAConfig(num_B=0), r"num_B \(heads E\) must be an integer >= 1; got 0"),
        (lambda: LilyConfig(num_B=0), r"num_B must be an integer >= 2"),
        (lambda: LilyConfig(stride_A=0), r"stride_A must be an integer >= 1; got 0"),
        (lambda: LilyConfig(routing="topk"), r"routing must be one of 'token', 'sample', 'batch'; got 'topk'"),
        (lambda: EffiLoRAConfig(keep_ratio=0.0), r"keep_ratio must be in \(0, 1\]; got 0.0"),
        (lambda: EffiLoRAConfig(keep_ratio=1.5), r"keep_ratio must be in \(0, 1\]; got 1.5"),
        (lambda: EffiLoRAConfig(importance="luck"), r"importance must be one of 'suppression', 'gradient'; got 'luck'"),
        (lambda: LoR2CConfig(lora_dropout=1.0), r"lora_dropout must be in \[0, 1\); got 1.0"),
        (lambda: LoR2CConfig(lora_alpha="16"), r"lora_alpha must be a finite number; got '16'"),
        (lambda: LilyConfig(scaling=float("nan")), r"scaling must be a finite number; got nan"),
        (lambda: LoR2CConfig(target_modules="q.*"), r"target_modules must be a list"),
    ],
)
def test_configurations_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_merge_on_a_one_layer_model_and_other_impossible_plans() -> None:
    model = tiny.model("llama", num_hidden_layers=1)
    before = fingerprint(model)
    with pytest.raises(ValueError, match="max_merges=1 needs two adjacent blocks to merge; this model has 1"):
        get_peft_model(model, LoR2CConfig(max_merges=1))
    with pytest.raises(ValueError, match=r"share: group 'a' names block 7; the model has blocks 0 to 0"):
        get_peft_model(model, LoR2CConfig(share={"a": [7]}))
    with pytest.raises(ValueError, match=r"auto_threshold must be in \(0, 1\]; got 0"):
        get_peft_model(model, LoR2CConfig(auto_threshold=0.0))
    assert_unchanged(model, before)


def test_non_linear_targets_are_refused() -> None:
    model = tiny.model("llama")
    before = fingerprint(model)
    for config in (LilyConfig, EffiLoRAConfig):
        with pytest.raises(ValueError, match=r"adapts linear layers; model.layers.0.input_layernorm is a LlamaRMSNorm"):
            get_peft_model(model, config(target_modules=["q_proj", "input_layernorm"]))
    assert_unchanged(model, before)


def test_suppression_needs_validation_batches_and_calibration_needs_data() -> None:
    model = get_peft_model(tiny.model("llama"), EffiLoRAConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="needs validation batches"):
        effilora_reducer(model)
    lily = get_peft_model(tiny.model("llama"), LilyConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(lily, [])


def test_lor2c_refuses_to_merge_into_the_weights() -> None:
    model = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4))
    with pytest.raises(NotImplementedError, match="parallel to a whole block"):
        model.merge_and_unload()
    with pytest.raises(NotImplementedError, match="parallel to a whole block"):
        model.merge_adapter()


# ------------------------------------------------------------------------------------------------ checkpoints


def spoil(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if name.endswith("weight"))


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[first(tensors)]


def extra(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors).replace("layers.0", "layers.9")] = torch.zeros(3)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][:, :-1].contiguous()


SPOILS = {"is missing": drop, "does not belong there": extra, "must be": reshape}


@pytest.mark.parametrize("problem", list(SPOILS))
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_with_missing_extra_or_wrong_shaped_tensors(tmp_path: Path, method: str, problem: str) -> None:
    model = get_peft_model(tiny.model("llama"), adapter(method, "llama"))
    model.save_pretrained(tmp_path)
    spoil(tmp_path, SPOILS[problem])
    base = tiny.model("llama")
    before = fingerprint(base)
    with pytest.raises(ValueError, match=problem):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    tiny.perturb(model)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=problem):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_unchanged(model, before)


def test_aliases_that_disagree_are_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)

    def alias(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if "layers.0" in n and "lily_B" in n)
        tensors[name.replace("layers.0", "layers.1")] = tensors[name] + 1

    spoil(tmp_path, alias)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"layers.1.*lily_B.*must equal .*layers.0"):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_unchanged(model, before)


def manifest_key(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("lor2c_manifest"))


def newer(tensors: dict[str, torch.Tensor]) -> None:
    manifest = read_manifest(tensors[manifest_key(tensors)])
    tensors[manifest_key(tensors)] = json_tensor({**manifest, "version": MANIFEST_VERSION + 1})


def other_depth(tensors: dict[str, torch.Tensor]) -> None:
    manifest = read_manifest(tensors[manifest_key(tensors)])
    tensors[manifest_key(tensors)] = json_tensor({**manifest, "layers": 9})


def unreadable(tensors: dict[str, torch.Tensor]) -> None:
    tensors[manifest_key(tensors)] = torch.tensor([200, 201], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer, f"version {MANIFEST_VERSION + 1} is newer than {MANIFEST_VERSION}.*upgrade lowrank_fast"),
        (other_depth, "made for 9 blocks; this model has 4"),
        (unreadable, "manifest: not readable"),
    ],
)
def test_a_manifest_that_cannot_be_this_adapters(tmp_path: Path, change: Any, message: str) -> None:
    model = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4))
    model.save_pretrained(tmp_path)
    spoil(tmp_path, change)
    base = tiny.model("llama")
    before = fingerprint(base)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    assert_unchanged(model, before)


def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").exists()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle.*safe_serialization=True"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)


def test_unknown_configuration_fields_of_a_newer_release_are_reported(tmp_path: Path) -> None:
    model = get_peft_model(tiny.model("llama"), LoR2CConfig(r=4))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        PeftModel.from_pretrained(tiny.model("llama"), tmp_path)
