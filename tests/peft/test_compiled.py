"""Under `torch.compile`: merged spans, injected LoRA, and Reducer masks that change without a recompilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lowrank_fast.methods import LoR2CController
from lowrank_fast.peft import effilora_reducer

from . import tiny
from .test_effilora import adamw, effilora, heads
from .test_every_method import assert_close, gradients
from .test_lor2c import lor2c

pytestmark = pytest.mark.slow


def compiled(model: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=False)


def test_merged_and_injected_structures_compile_to_the_same_gradients() -> None:
    model, batch = lor2c(max_merges=1, max_injections=1).train(), tiny.batch("llama")
    LoR2CController(model, max_merges=1, max_injections=1, merge_interval=1, inject_interval=1).step(1)
    tiny.perturb(model, seed=5)
    plain = gradients(model, batch)
    model.zero_grad()
    compiled(model)(**batch).loss.backward()
    assert_close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, plain, 1e-5)


@pytest.mark.parametrize("a_grad", ["all", "active"])
def test_reducer_masks_change_without_recompiling_and_freeze_the_same_heads(a_grad: str) -> None:
    eager, model = (effilora(num_B=2, a_grad=a_grad, interval=3, warmup=1) for _ in range(2))
    fast = compiled(model)
    parts = [(call, effilora_reducer(m), adamw(m)) for m, call in ((eager, eager), (model, fast))]
    for n in range(4):
        stance = "default" if n == 0 else "fail_on_recompile"
        before = [p.detach().clone() for ps in heads(model).values() for p in ps]
        for call, reducer, optimizer in parts:
            active = reducer.begin_step(n)
            with torch.compiler.set_stance(stance):
                call(**tiny.batch("llama", seed=n)).loss.backward()
            reducer.end_backward(n)
            optimizer.step()
            optimizer.zero_grad()
        after = [p for ps in heads(model).values() for p in ps]
        units = [unit for unit, ps in heads(model).items() for _ in ps]
        assert {u for u, a, b in zip(units, before, after, strict=True) if not torch.equal(a, b)} == set(active)
    for (name, a), b in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4), name
