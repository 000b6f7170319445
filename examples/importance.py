"""Does the Reducer's free gradient signal rank the units as suppressing them does? Rank correlations while training.

    python examples/importance.py [--steps 80] [--every 20] [--unit module] [--seeds 3] [--held-out 128]

EffiLoRA on MiniLM and film reviews, all units trained. Every so many steps, on the same held-out reviews, each unit is
scored twice: by the signal -<dB, B> of one backward, and by how much the loss rises when the unit's update alone is
scaled by 0.25 (a forward per unit). Printed is Spearman's correlation of the two over the units: 18 query, key and
value layers with --unit module, 6 transformer layers with --unit layer.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from data import model_and_tokenizer, reviews
from peft import get_peft_model

from lowrank_fast.methods.reducer import Reducer
from lowrank_fast.peft import EffiLoRAConfig, effilora_reducer


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `reviews` as one batch."""
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def spearman(a: list[float], b: list[float]) -> float:
    """Correlation of the ranks."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def scores(model: torch.nn.Module, reducer: Reducer, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[float]]:
    """Signal and effect of suppression of every unit, on one batch, in eval mode."""
    model.eval()
    model(**batch).loss.backward()
    signals = reducer.signals()
    model.zero_grad()
    with torch.no_grad():
        undisturbed = float(model(**batch).loss)
        effects = {unit: reducer.suppressed_loss([unit], batch) - undisturbed for unit in reducer.units}
    model.train()
    return [signals[unit] for unit in reducer.units], [effects[unit] for unit in reducer.units]


def correlations(seed: int, arguments: argparse.Namespace) -> dict[int, float]:
    """Step -> correlation, in one run."""
    base, tokenizer = model_and_tokenizer()
    torch.manual_seed(seed)
    config = EffiLoRAConfig(
        task_type="SEQ_CLS", r=8, num_B=2, target_modules=["query", "key", "value"], importance="gradient"
    )
    model = get_peft_model(base, config)
    reducer = effilora_reducer(
        model, unit=arguments.unit
    )  # asked for scores only: it never begins a step, so all units train
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    train = reviews(32 * arguments.steps, tokenizer, seed=seed)
    held_out = batch_of(reviews(arguments.held_out, tokenizer, seed=1000 + seed))
    found = {}
    for step in range(arguments.steps):
        model(**batch_of(train[32 * step : 32 * step + 32])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % arguments.every == 0:
            found[step + 1] = spearman(*scores(model, reducer, held_out))
            print(f"seed {seed}  step {step + 1:4d}  {found[step + 1]:6.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--unit", choices=("module", "layer"), default="module")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=128)
    arguments = parser.parse_args()
    print(f"Spearman correlation of signal and suppression over the units ({arguments.unit})")
    runs = [correlations(seed, arguments) for seed in range(arguments.seeds)]
    for step in runs[0]:
        print(f"mean    step {step:4d}  {statistics.mean(run[step] for run in runs):6.3f}")


if __name__ == "__main__":
    main()
