"""Two processes with different data and slightly different weights take the same decisions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from lowrank_fast.methods import LoR2CController, Reducer
from lowrank_fast.methods.lor2c import Settings, Slot, Topology
from lowrank_fast.nn import RoutedLinear


def _layers() -> dict[str, RoutedLinear]:
    torch.manual_seed(0)
    layers = {f"blocks.{i}.proj": RoutedLinear(nn.Linear(8, 8), r=2, experts=2, router_input="x") for i in range(8)}
    for layer in layers.values():
        layer.base.requires_grad_(False)
        nn.init.normal_(layer.bank.weight, std=0.3)
    return layers


def _reducer_choices(importance: str, rank: int) -> list[list[str]]:
    layers = _layers()
    model = nn.Sequential(*layers.values())
    data = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(rank))
    reducer = Reducer(
        model, layers, importance=importance, interval=2, warmup=2, validation=list(data),
        loss=lambda m, x: (m(x) - 1).square().mean(),
    )  # fmt: skip
    choices = []
    for n in range(8):
        choices.append(reducer.begin_step(n))
        (model(data[n % 4]) - 1).square().mean().backward()
        reducer.end_backward(n)
        model.zero_grad()
    return choices


def _lor2c_events(rank: int) -> list[dict[str, object]]:
    slots = [Slot(16, Settings(r=4), None, None) for _ in range(6)]
    for i, slot in enumerate(slots):
        generator = torch.Generator().manual_seed(10 * i + rank)  # weights that differ between ranks
        for parameter in slot.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
    controller = LoR2CController(Topology(slots, Settings(r=4), False), max_merges=3, merge_interval=1)
    for step in (1, 2, 3):
        controller.step(step)
    return controller.history


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    found = [_reducer_choices("gradient", rank), _reducer_choices("suppression", rank), _lor2c_events(rank)]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_decide_alike(tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath))  # the processes inherit sys.path and find `tests` there
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    alone = [_reducer_choices("gradient", 1), _reducer_choices("suppression", 1), _lor2c_events(1)]
    assert json.loads(json.dumps(alone)) != second, "without the exchange rank 1 would have decided otherwise"
