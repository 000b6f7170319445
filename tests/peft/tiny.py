"""Tiny random-init models of every architecture in the tests, and small batches for them."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers

logging.getLogger("transformers").setLevel(logging.ERROR)
VOCAB, HIDDEN, LAYERS = 64, 32, 4
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
ARCHITECTURES = ("bert", "roberta", "llama", "qwen", "gpt2", "vit", "mamba")
CAUSAL = ("llama", "qwen", "gpt2", "mamba")


def config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model."""
    t = transformers
    if name == "bert":
        return t.BertConfig(**{**_COMMON, "num_labels": 3, **changes})
    if name == "roberta":
        return t.RobertaConfig(**{**_COMMON, "num_labels": 3, "max_position_embeddings": 40, **changes})
    if name == "llama":
        return t.LlamaConfig(**{**_COMMON, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **changes})
    if name == "qwen":
        return t.Qwen2Config(**{**_COMMON, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, **changes})
    if name == "gpt2":
        fields = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
        return t.GPT2Config(**{**fields, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **changes})
    if name == "vit":
        fields = {k: v for k, v in _COMMON.items() if k not in ("vocab_size", "pad_token_id")}
        return t.ViTConfig(**{**fields, "image_size": 16, "patch_size": 4, "num_labels": 3, **changes})
    if name == "mamba":
        fields = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "state_size": 4}
        return t.FalconMambaConfig(
            **{**fields, "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, **changes}
        )
    raise ValueError(name)


_CLASSES = {
    "bert": "BertForSequenceClassification",
    "roberta": "RobertaForSequenceClassification",
    "llama": "LlamaForCausalLM",
    "qwen": "Qwen2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "vit": "ViTForImageClassification",
    "mamba": "FalconMambaForCausalLM",
}


def model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A tiny model with seeded weights, in eval mode."""
    torch.manual_seed(seed)
    return getattr(transformers, _CLASSES[name])(config(name, **changes)).eval()


def batch(name: str, rows: int = 3, tokens: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs and labels."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {
            "pixel_values": torch.randn(rows, 3, 16, 16, generator=generator),
            "labels": torch.randint(0, 3, (rows,), generator=generator),
        }
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    labels = ids if name in CAUSAL else torch.randint(0, 3, (rows,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def perturb(module: torch.nn.Module, scale: float = 0.1, seed: int = 3) -> None:
    """Give every trainable parameter noise, so that adapters with B = 0 do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.numel():
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
