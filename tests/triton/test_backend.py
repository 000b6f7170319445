"""The backend says in one line why it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lowrank_fast import triton_backend as backend

from .cases import parameters

ROOT = Path(__file__).resolve().parents[2]


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = backend.unavailable_reason()
    assert reason is not None and reason.startswith("Triton is not installed") and "\n" not in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    reason = backend.unavailable_reason()
    assert reason is not None and "TRITON_INTERPRET" in reason and "\n" not in reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver without a device" in (backend.unavailable_reason() or "")


def test_interpreted_is_available() -> None:
    assert backend.unavailable_reason() is None


def test_cpu_tensors_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    v = parameters((4,), 8, 6, 2, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="runs CPU tensors only in Triton's interpreter"):
        backend.residual_add(v["y"], v["x"], v["A"], v["B"], 1.0, 0.0, None, False)


def test_mixed_devices() -> None:
    v = parameters((4,), 8, 6, 2, torch.float32)
    with pytest.raises(ValueError, match="residual_add: all tensors must be on cpu; got one on meta"):
        backend.residual_add(v["y"], v["x"], v["A"].to("meta"), v["B"], 1.0, 0.0, None, False)


def test_float64_runs_elsewhere() -> None:
    v = parameters((4,), 8, 6, 2, torch.float64)
    with pytest.raises(RuntimeError, match="float64 runs on 'reference' only"):
        backend.residual_add(v["y"], v["x"], v["A"], v["B"], 1.0, 0.0, None, False)


def test_unsupported_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = backend.kernels("launch")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(RuntimeError, match=r"need compute capability 8.0 \(Ampere\) or newer; Tesla T4 has 7.5"):
        launch._detect(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_89"),
    ],
)
def test_the_rows_of_nvidia_cards(capability: tuple[int, int], row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert backend.kernels("launch")._detect(torch.device("cuda", 0)) == row


@pytest.mark.parametrize("name", ["gfx90a:sramecc+:xnack-", "gfx942:sramecc+:xnack-", "gfx950", "gfx1100", "gfx908"])
def test_rocm_cards_are_told_apart(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(gcnArchName=name, name="A card")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    detect = backend.kernels("launch")._detect
    if name in ("gfx1100", "gfx908"):
        message = rf"need one of AMD's Instinct GPUs \(gfx90a, gfx942, gfx950\); A card is {name}$"
        with pytest.raises(RuntimeError, match=message):
            detect(torch.device("cuda", 0))
    else:
        assert detect(torch.device("cuda", 0)) == "gfx942"


def test_importing_the_kernels_touches_no_driver() -> None:
    code = (
        "import lowrank_fast.triton_backend as b; "
        "names = ('plan', 'plan_backward', 'norm', 'machine', 'model'); [b.kernels(name) for name in names]; "
        "import torch; assert not torch.cuda.is_initialized(); "
        "from triton.runtime.driver import driver; assert not vars(driver).get('_active')"
    )
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, check=True)


def test_a_tuned_table_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    table = backend.kernels("table")
    file = tmp_path / "table.json"
    file.write_text('{"sm_90": {"expand": {"2": [[16, 4096, [64, 0, 128, 8, 4]]]}}}')
    shipped = table.row("expand", "sm_90", 2, 16, 8192)
    monkeypatch.setenv(table.ENVIRONMENT, str(file))
    table._tuned.cache_clear()
    table._row.cache_clear()
    try:
        assert table.row("expand", "sm_90", 2, 16, 4000) == table.Tile(64, 0, 128, 8, 4)
        assert table.row("expand", "sm_90", 2, 16, 8192) == shipped
        file.write_text("{")
        table._tuned.cache_clear()
        table._row.cache_clear()
        with pytest.raises(RuntimeError, match="LOWRANK_FAST_TRITON_TABLE must name a table"):
            table.row("expand", "sm_90", 2, 16, 4000)
    finally:
        monkeypatch.undo()
        table._tuned.cache_clear()
        table._row.cache_clear()


def test_the_tile_of_d_is_the_same_for_every_length() -> None:
    table = backend.kernels("table")
    for size in (2, 4):
        for width in (16, 32, 64, 128):
            inner = {
                table.row(kernel, arch, size, width, T).inner
                for kernel in ("residual_add", "shrink")
                for arch in table.ARCHITECTURES
                for T in (1, 128, 129, 2048, 4096, 100000)
            }
            assert len(inner) == 1, (size, width, inner)
