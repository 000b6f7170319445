"""Configurations: values that cannot be are refused at once; one that was read from a folder makes new adapters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from peft import PeftConfig, PeftModel, get_peft_model

from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, LoR2CConfig

from . import tiny

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LilyConfig(stride_A=1.5), "LilyConfig: stride_A must be an integer >= 1; got 1.5"),
        (
            lambda: LilyConfig(num_B=2.5),
            "LilyConfig: num_B must be an integer >= 2 for a router to choose from; got 2.5",
        ),
        (
            lambda: LilyConfig(num_B=True),
            "LilyConfig: num_B must be an integer >= 2 for a router to choose from; got True",
        ),
        (lambda: EffiLoRAConfig(num_B=True), r"num_B \(heads E\) must be an integer >= 1; got True"),
        (lambda: EffiLoRAConfig(warmup=-3), "EffiLoRAConfig: warmup must be an integer >= 0; got -3"),
        (lambda: EffiLoRAConfig(interval=2.5), "EffiLoRAConfig: interval must be an integer >= 1; got 2.5"),
        (lambda: EffiLoRAConfig(keep_ratio="half"), "EffiLoRAConfig: keep_ratio must be a finite number; got 'half'"),
        (lambda: LoR2CConfig(fade_steps=1.5), "LoR2CConfig: fade_steps must be an integer >= 0; got 1.5"),
        (lambda: LoR2CConfig(fade_steps=-1), "LoR2CConfig: fade_steps must be an integer >= 0; got -1"),
        (lambda: LoR2CConfig(merge_interval=0), "LoR2CConfig: merge_interval must be an integer >= 1; got 0"),
        (lambda: LoR2CConfig(inject_interval="2"), "LoR2CConfig: inject_interval must be an integer >= 1; got '2'"),
        (lambda: LoR2CConfig(sfs_k=1.5), "LoR2CConfig: sfs_k must be an integer >= 1; got 1.5"),
        (lambda: LoR2CConfig(max_span=1, max_merges="auto"), "max_span must be an integer >= 2 for a merge.*; got 1"),
        (lambda: LoR2CConfig(max_span=0), "LoR2CConfig: max_span must be an integer >= 1; got 0"),
        (lambda: LoR2CConfig(injected_alpha=NAN), "LoR2CConfig: injected_alpha must be a finite number; got nan"),
        (lambda: LoR2CConfig(injected_dropout=1.5), r"LoR2CConfig: injected_dropout must be in \[0, 1\); got 1.5"),
        (lambda: LoR2CConfig(layers_to_transform=[0]), r"layers_to_transform is not supported; got \[0\].*`layers`"),
        (lambda: LoR2CConfig(exclude_modules=["a"]), r"exclude_modules is not supported; got \{'a'\}.*`layers`"),
        (
            lambda: LilyConfig(target_modules=".*q_proj", layers_to_transform=[0]),
            r"LilyConfig: layers_to_transform=\[0\] cannot be used with a regex, target_modules='\.\*q_proj'",
        ),
        (
            lambda: get_peft_model(tiny.model("llama"), LilyConfig(target_modules="(q_proj")),
            r"target_modules: '\(q_proj' is no valid regex",
        ),
    ],
)
def test_values_that_cannot_be_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_values_at_the_edge_are_taken() -> None:
    LoR2CConfig(max_span=2, max_merges=1, merge_interval=1, fade_steps=0, injected_dropout=0.0, injected_alpha=1)
    LoR2CConfig(max_span=1)
    EffiLoRAConfig(warmup=0, keep_ratio=1)


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_layers_to_transform_limits_named_targets_and_all_linear(targets: Any) -> None:
    model = get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=targets, layers_to_transform=[1]))
    layers = {n.split("layers.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert layers == {"1"}


def test_pefts_lily_with_a_regex_and_layers_is_taken_as_peft_takes_it() -> None:
    theirs = peft.LilyConfig(r=4, target_modules=".*q_proj", layers_to_transform=[0])
    adapted = [
        sum(p.requires_grad for p in get_peft_model(tiny.model("llama"), config).parameters())
        for config in (theirs, LilyConfig.from_peft(theirs))
    ]
    assert adapted[0] == adapted[1]


@pytest.mark.parametrize("config", [LoR2CConfig, LilyConfig, EffiLoRAConfig])
def test_a_mixed_model_is_refused_by_name(config: Any) -> None:
    made = config(target_modules=None if config is LoR2CConfig else ["q_proj"])
    with pytest.raises(ValueError, match=f"{made.peft_type}.*is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny.model("llama"), made, mixed=True)
    assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == made


@pytest.mark.parametrize("read", [PeftConfig.from_pretrained, LilyConfig.from_pretrained])
def test_a_configuration_from_a_folder_makes_a_new_adapter_of_another_shape(tmp_path: Path, read: Any) -> None:
    get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    changed = read(tmp_path)
    changed.r = 8
    assert get_peft_model(tiny.model("llama"), changed).peft_config["default"].r == 8
    used = PeftModel.from_pretrained(tiny.model("llama"), tmp_path).peft_config["default"]
    model = get_peft_model(
        tiny.model("llama", num_hidden_layers=2), used
    )  # no longer about the four layers in the file
    used = copy.deepcopy(used)
    used.num_B = 3
    model.add_adapter("b", used)


def test_an_unchanged_configuration_still_guards_the_load_it_was_read_for(tmp_path: Path) -> None:
    get_peft_model(tiny.model("llama"), LilyConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path)
    config = LilyConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    base = tiny.model("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="adapter checkpoint"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert not any("lily" in name for name, _ in base.named_parameters())
