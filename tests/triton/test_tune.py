"""The offline tuner on tensors without memory, with times from the model: everything but the GPU's clock."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lowrank_fast import triton_backend as backend


def test_the_tuned_table_holds_the_fastest_tile_that_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from triton.runtime.errors import OutOfResources  # not at the top: where Triton is missing, tests are skipped

    tune, table, launch = (backend.kernels(name) for name in ("tune", "table", "launch"))
    monkeypatch.setattr(tune, "LENGTHS", (128, 1 << 62))
    monkeypatch.setattr(tune, "RANKS", (16, 64))
    timed: list[tuple[int, int]] = []

    def timer(call: Callable[[], object]) -> float:
        """Two stages and four warps are fast; eight warps do not fit."""
        seen = []
        with launch.observing(lambda one: seen.append(one) or True, "sm_90"):
            call()
        if any(one.warps == 8 for one in seen):
            raise OutOfResources(300 << 10, 227 << 10, "shared memory")
        timed.append((seen[0].stages, seen[0].warps))
        return sum(one.stages + one.constants.get("BM", 0) / 1e3 for one in seen)

    with launch.observing(lambda one: True, "sm_90"):
        found = tune.tune(1024, torch.bfloat16, "meta", timer)
    assert found.keys() == {"sm_90"} and timed
    rows = found["sm_90"]
    assert {name for name, sizes in rows.items() if sizes["2"]} == {
        "residual_add", "shrink", "expand", "up", "up_rows", "down",
    }  # fmt: skip
    best = table.Tile(*rows["expand"]["2"][0][2])
    assert (best.warps, best.stages, best.rows) == (4, 2, 16)

    file = tmp_path / "table.json"
    file.write_text(json.dumps(found))
    monkeypatch.setenv(table.ENVIRONMENT, str(file))
    for cached in (table._tuned, table._row):
        cached.cache_clear()
    try:
        assert table.row("expand", "sm_90", 2, 16, 100) == best
        assert table.row("expand", "sm_80", 2, 16, 100) != best
        inner = {table.row(name, "sm_90", 2, 16, T).inner for name in ("residual_add", "shrink") for T in (1, 5000)}
        assert len(inner) == 1, "the tile of D must not be tuned"
    finally:
        monkeypatch.undo()
        for cached in (table._tuned, table._row):
            cached.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tune = backend.kernels("tune")
    monkeypatch.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "table.json")])
    with pytest.raises(SystemExit, match="tune: needs a GPU: PyTorch finds none"):
        tune.main()
