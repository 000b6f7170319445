"""Lily on MiniLM and film reviews: train with token routing, calibrate the routers, export an ordinary LoRA.

python examples/lily.py [steps]
"""

from __future__ import annotations

import sys

import torch
from data import model_and_tokenizer, reviews, trainer
from peft import get_peft_model

from lowrank_fast.peft import LilyConfig, calibrate, export_lora

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100

base, tokenizer = model_and_tokenizer()
config = LilyConfig(
    task_type="SEQ_CLS", r=16, num_B=3, stride_A=2, scaling=2.0, routing="token", target_modules=["query", "value"]
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

test = reviews(400, tokenizer, seed=1)
run = trainer(model, reviews(32 * steps, tokenizer), test, steps, [])
run.train()
print(run.evaluate())

held_out = reviews(128, tokenizer, seed=2)
batches = [
    {name: torch.tensor([row[name] for row in held_out[i : i + 32]]) for name in ("input_ids", "attention_mask")}
    for i in range(0, 128, 32)
]
print(calibrate(model, batches))
print("with fixed weights:", run.evaluate())
export_lora(model, "build/examples/lily-as-lora")
print("build/examples/lily-as-lora loads with PEFT alone")
