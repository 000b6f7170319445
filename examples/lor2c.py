"""LoR2C on MiniLM and film reviews, with the number of merges and injections chosen from the SFS values.

python examples/lor2c.py [steps]
"""

from __future__ import annotations

import logging
import sys

from data import model_and_tokenizer, reviews, trainer
from peft import PeftModel, get_peft_model

from lowrank_fast.peft import LoR2CConfig, lor2c_controller

logging.basicConfig(level=logging.WARNING)
logging.getLogger("lowrank_fast.lor2c").setLevel(logging.INFO)
steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100

base, tokenizer = model_and_tokenizer()
config = LoR2CConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, max_merges="auto", max_injections="auto")
model = get_peft_model(base, config)
model.print_trainable_parameters()

controller = lor2c_controller(model)
run = trainer(
    model,
    reviews(32 * steps, tokenizer),
    reviews(400, tokenizer, seed=1),
    steps,
    [controller.callback()],
)
run.train()
print(run.evaluate())
for event in controller.history:
    print(event)

model.save_pretrained("build/examples/lor2c")
again = PeftModel.from_pretrained(model_and_tokenizer()[0], "build/examples/lor2c")
print("saved, and loaded again with", len(controller.topology.spans), "branches:", type(again).__name__)
