"""A PEFT LoRA model, accelerated in two lines; the seconds per training step before and after.

python examples/accelerate_peft.py [steps]
"""

from __future__ import annotations

import sys
import time

import torch
from data import model_and_tokenizer, reviews
from peft import LoraConfig, get_peft_model

from lowrank_fast.peft import accelerate_adapters, restore_adapters

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10

base, tokenizer = model_and_tokenizer()
model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", r=8, target_modules="all-linear"))
rows = reviews(32, tokenizer)
batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def seconds() -> float:
    """The fastest of `steps` forward and backward passes."""
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        model(**batch).loss.backward()
        found.append(time.perf_counter() - start)
        model.zero_grad()
    return min(found)


model.eval()  # dropout off, so that both compute the same
before, loss = seconds(), float(model(**batch).loss.detach())
accelerate_adapters(model)  # the two lines: this one and its import
after, fast_loss = seconds(), float(model(**batch).loss.detach())
print(f"PEFT {before:.3f} s, accelerated {after:.3f} s per step; loss {loss:.6f} and {fast_loss:.6f}")
restore_adapters(model)
