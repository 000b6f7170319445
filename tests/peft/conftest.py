"""Fixtures of the PEFT tests: one adapter configuration per method, and quiet libraries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lowrank_fast.peft import EffiLoRAConfig, LilyConfig, LoR2CConfig

METHODS = ("lor2c", "lor2c-share", "lily-token", "lily-sample", "lily-batch", "effilora-1", "effilora-3")

# Targets with a shared input, one with a bias where the architecture has one, and one of another width.
TARGETS = {
    "bert": ["query", "key", "value", "output.dense"],
    "roberta": ["query", "value", "intermediate.dense"],
    "llama": ["q_proj", "k_proj", "v_proj", "down_proj"],
    "qwen": ["q_proj", "k_proj", "v_proj", "up_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "vit": ["q_proj", "v_proj", "fc2"],
    "mamba": ["in_proj"],
}


def adapter(method: str, architecture: str, **changes: Any) -> Any:
    """A small configuration of `method` for `architecture`."""
    kind, _, variant = method.partition("-")
    if kind == "lor2c":
        return LoR2CConfig(**{"r": 4, "lora_alpha": 8.0, "share": variant == "share", **changes})
    targets = {"target_modules": list(TARGETS[architecture])}
    if kind == "lily":
        fields = {"r": 4, "num_B": 3, "stride_A": 3, "scaling": 2.0, "routing": variant}
        return LilyConfig(**{**fields, **targets, **changes})
    fields = {"r": 4, "lora_alpha": 8.0, "num_B": int(variant), "importance": "gradient"}
    return EffiLoRAConfig(**{**fields, **targets, **changes})


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    """No warnings from the libraries about each other, and one thread: the models are too small for two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    torch.set_num_threads(before)
