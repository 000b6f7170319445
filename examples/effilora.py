"""EffiLoRA on MiniLM and film reviews: one A for all layers, a Reducer that updates a quarter of the heads per step.

python examples/effilora.py [steps] [gradient | suppression]
"""

from __future__ import annotations

import sys

import torch
from data import model_and_tokenizer, reviews, trainer
from peft import get_peft_model

from lowrank_fast.peft import EffiLoRAConfig, effilora_reducer

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
importance = sys.argv[2] if len(sys.argv) > 2 else "gradient"

base, tokenizer = model_and_tokenizer()
config = EffiLoRAConfig(
    task_type="SEQ_CLS",
    r=8,
    num_B=2,
    target_modules=["query", "key", "value"],
    importance=importance,
    keep_ratio=0.25,
    a_grad="active",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

held_out = reviews(64, tokenizer, seed=2)
validation = [
    {name: torch.tensor([row[name] for row in held_out[i : i + 16]]) for name in held_out[0]} for i in range(0, 64, 16)
]
reducer = effilora_reducer(model, validation=validation)
run = trainer(model, reviews(32 * steps, tokenizer), reviews(400, tokenizer, seed=1), steps, [reducer.callback()])
run.train()
print(run.evaluate())
print("importance:", {unit: round(score, 3) for unit, score in reducer.scores.items()})
print(f"entropy of the selection: {reducer.entropy():.3f} of its largest value")
