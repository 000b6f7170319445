"""The most memory a training step has allocated at any time, ours against PEFT's for the same adapter.

Counted by PyTorch's allocator, tensor by tensor, so it does not depend on the machine. A LLaMA-shaped model of two
layers with proportions as in `examples/overhead.py`, which measures the resident set of the whole process.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from peft import get_peft_model
from torch.profiler import ProfilerActivity, profile

from lowrank_fast.peft import LilyConfig, LoR2CConfig, accelerate_adapters

from .test_lily import CALLS

WIDTH, ROWS, TOKENS = 192, 4, 128


def base(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config).to(dtype).requires_grad_(False)


def peak_bytes(model: Any, dtype: torch.dtype) -> int:
    """Allocated bytes at the worst moment of a forward and backward, above those before it."""
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=dtype, requires_grad=True)

    def step() -> None:
        model(inputs_embeds=x).last_hidden_state.float().square().sum().backward()
        x.grad = None
        model.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 10 * x.nbytes
    return peak


def peft_model(kind: str, dtype: torch.dtype) -> Any:
    lora = peft.LoraConfig(r=8, target_modules=CALLS)
    lily = peft.LilyConfig(r=8, num_B=4, stride_A=2, target_modules=CALLS)
    return get_peft_model(base(dtype), lora if kind == "lora" else lily).train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "lily"])
def test_a_step_peaks_below_pefts(kind: str, dtype: torch.dtype) -> None:
    model = peft_model(kind, dtype)
    theirs = peak_bytes(model, dtype)
    accelerate_adapters(model, verbose=False)
    assert peak_bytes(model, dtype) < theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_methods_own_adapters_peak_below_pefts_too(dtype: torch.dtype) -> None:
    lily = LilyConfig(r=8, num_B=4, stride_A=2, target_modules=CALLS, routing="batch")
    for kind, config in (("lora", LoR2CConfig(r=8)), ("lily", lily)):
        ours = peak_bytes(get_peft_model(base(dtype), config).train(), dtype)
        assert ours < peak_bytes(peft_model(kind, dtype), dtype), kind
