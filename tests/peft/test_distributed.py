"""DistributedDataParallel on two processes: gradients are the mean over ranks, and ranks stay equal to the bit.

Ranks see different data. LoR2C merges and injects on the way; EffiLoRA's Reducer freezes heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from lowrank_fast.peft import effilora_reducer, lor2c_controller

from . import tiny
from .conftest import METHODS
from .test_every_method import wrapped

pytestmark = pytest.mark.slow


def batch_of(rank: int, step: int = 0) -> dict[str, torch.Tensor]:
    return tiny.batch("llama", seed=100 * rank + step)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {n.removeprefix("module."): p for n, p in model.named_parameters() if p.requires_grad}


def gradients(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {n: p.grad.clone() for n, p in trained(model).items() if p.grad is not None}


def adamw(model: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def plain_steps(method: str, rank: int) -> dict[str, Any]:
    """One gradient and three AdamW steps of one method."""
    model = DistributedDataParallel(wrapped(method).train())
    found: dict[str, Any] = {"gradients": gradients(model, batch_of(rank))}
    optimizer = adamw(model)
    for step in range(3):
        optimizer.zero_grad()
        model(**batch_of(rank, step)).loss.backward()
        optimizer.step()
    found["parameters"] = {n: p.detach().clone() for n, p in trained(model).items()}
    return found


def lor2c_steps(rank: int) -> dict[str, Any]:
    """A merge and an injection, and training after them."""
    fields = {"max_merges": 1, "max_injections": 1, "merge_interval": 2, "inject_interval": 3}
    inner = wrapped("lor2c", **fields).train()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = adamw(model)
    controller = lor2c_controller(inner, 8, optimizer=optimizer)
    injected: dict[str, torch.Tensor] = {}
    for step in range(1, 8):
        optimizer.zero_grad()
        model(**batch_of(rank, step)).loss.backward()
        optimizer.step()
        controller.step(step)
        if step == 3:
            home = f".layers.{controller.history[-1]['kept']}."
            injected = {
                n: p.detach().clone() for n, p in trained(model).items() if home in n and n.endswith((".up", ".down"))
            }
    after = trained(model)
    return {
        "history": controller.history,
        "parameters": {n: p.detach().clone() for n, p in after.items()},
        "injected": {n: not torch.equal(after[n], p) for n, p in injected.items()},
    }


def effilora_steps(rank: int, importance: str) -> dict[str, Any]:
    """Steps with frozen heads: which units were active, which moved."""
    inner = wrapped("effilora-3", importance=importance, interval=3, warmup=2).train()
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    reducer = effilora_reducer(inner, validation=[batch_of(rank, 50 + i) for i in range(2)])
    optimizer = adamw(model)
    active, moved = [], []
    for step in range(8):
        active.append(reducer.begin_step(step))
        before = {n: p.detach().clone() for n, p in trained(model).items()}
        optimizer.zero_grad()
        model(**batch_of(rank, step)).loss.backward()
        reducer.end_backward(step)
        optimizer.step()
        heads = [n for n, p in trained(model).items() if "effilora_B" in n and not torch.equal(before[n], p)]
        moved.append(sorted({f"layer {n.split('.layers.')[1].split('.')[0]}" for n in heads}))
    return {"active": active, "moved": moved, "parameters": {n: p.detach().clone() for n, p in trained(model).items()}}


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = {method: plain_steps(method, rank) for method in METHODS}
    found["schedule"] = lor2c_steps(rank)
    for importance in ("gradient", "suppression"):
        found[importance] = effilora_steps(rank, importance)
    torch.save(found, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(pytestconfig.rootpath))  # the processes inherit sys.path and find `tests` there
        torch.multiprocessing.spawn(_worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_mean_over_ranks_and_parameters_stay_equal(ranks: list[Any], method: str) -> None:
    first, second = (found[method] for found in ranks)
    assert same(first["gradients"], second["gradients"])
    assert same(first["parameters"], second["parameters"])
    model = wrapped(method).train()
    alone = [gradients(model, batch_of(rank)) for rank in (0, 1)]
    assert first["gradients"].keys() == alone[0].keys()
    for name, gradient in first["gradients"].items():
        assert torch.allclose(gradient, (alone[0][name] + alone[1][name]) / 2, rtol=1e-5, atol=1e-7), name


def test_lor2c_merges_and_injects_alike_and_the_injected_lora_trains(ranks: list[Any]) -> None:
    first, second = (found["schedule"] for found in ranks)
    assert [event["kind"] for event in first["history"]] == ["merge", "inject"]
    assert first["history"] == second["history"]
    assert same(first["parameters"], second["parameters"])
    assert len(first["injected"]) == 4, "A and B of q and v"
    assert all(first["injected"].values())


@pytest.mark.parametrize("importance", ["gradient", "suppression"])
def test_the_reducer_freezes_the_same_heads_on_every_rank(ranks: list[Any], importance: str) -> None:
    first, second = (found[importance] for found in ranks)
    assert first["active"] == second["active"]
    assert [len(units) for units in first["active"]] == [4, 4, 1, 1, 1, 1, 1, 1]
    for active, moved in zip(first["active"], first["moved"], strict=True):
        assert moved == sorted(active), "only active heads move, weight decay and momentum included"
    assert same(first["parameters"], second["parameters"])
