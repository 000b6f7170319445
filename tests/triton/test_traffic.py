"""Bytes and launches, counted from the loads and stores that the interpreter sees. Each byte counts once per
launch: what a launch reads twice comes from L2. Tensors smaller than an eighth of a pass are not activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_fast import codegen
from lowrank_fast import triton_backend as backend

from .cases import bank, parameters

pytestmark = pytest.mark.interp
T, D, RANK, EXPERTS = 2048, 96, 4, 2


def counted(call: Callable[[], Any]) -> list[Any]:
    backend.kernels("launch")
    with backend.kernels("interpreter").counting() as launches:
        call()
    return launches


def passes(launches: list[Any], tensors: list[Tensor]) -> float:
    """Bytes moved within these tensors, in units of the first one."""
    found = 0
    for tensor in tensors:
        for launch in launches:
            for store in (False, True):
                found += launch.bytes_within(tensor.data_ptr(), tensor.numel() * tensor.element_size(), store)
    return found / (tensors[0].numel() * tensors[0].element_size())


@pytest.fixture(scope="module")
def v() -> dict[str, Tensor]:
    return parameters((T,), D, D, RANK, torch.float16)


def test_forward_moves_three_passes_and_its_weights(v: dict[str, Tensor]) -> None:
    out = torch.empty_like(v["y"])
    launches = counted(lambda: backend.residual_add_out(v["y"], v["x"], v["A"], v["B"], 0.5, 0.0, None, False, out=out))
    assert len(launches) <= 2
    assert passes(launches, [out, v["x"], v["y"]]) == 3.0
    everything = sum(launch.dram for launch in launches)
    hidden = 2 * 4 * T * RANK  # one partial of t (D is one tile), written and read
    assert everything == 3 * out.numel() * 2 + hidden + 2 * D * RANK * 2


def test_long_forward_is_one_launch_that_writes_t_once() -> None:
    long = parameters((2064,), 48, 32, RANK, torch.float16)
    launches = counted(lambda: backend.residual_add(long["y"], long["x"], long["A"], long["B"], 0.5, 0.0, None, True))
    moved = 2064 * (48 + 2 * 32) * 2 + 4 * 2064 * RANK + (48 + 32) * RANK * 2
    assert [launch.name for launch in launches] == ["residual_add_kernel"]
    assert launches[0].dram == moved


@pytest.mark.parametrize("small", [1, 64, 128])
def test_small_forward_is_one_launch(small: int) -> None:
    w = parameters((small,), D, 300, RANK, torch.float16)
    launches = counted(lambda: backend.residual_add(w["y"], w["x"], w["A"], w["B"], 0.5, 0.0, None, True))
    assert [launch.name for launch in launches] == ["residual_add_kernel"]


@pytest.mark.parametrize("small", [1, 64, 128])
@pytest.mark.parametrize("routing", ["batch", "sample", "static", "token"])
def test_small_routed_forward_is_one_launch(routing: str, small: int) -> None:
    w, b = parameters((1, small), D, 300, RANK, torch.float16), bank(EXPERTS, D, 300, RANK, "t", torch.float16)
    router, weights = (None, b["weights"]) if routing == "static" else (b["R"], None)
    arguments = (w["y"], w["x"], w["A"], b["B"], router, weights, None, 0.5, routing, "t", 0.0, None)
    launches = counted(lambda: backend.routed_projection(*arguments))
    assert [launch.name for launch in launches] == ["routed_small_kernel"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [32, 128])
@pytest.mark.parametrize("routing", ["batch", "token"])
def test_small_routed_forward_with_dropout_is_one_launch(routing: str, rank: int, dtype: torch.dtype) -> None:
    w, b = parameters((1, 128), D, 64, rank, dtype), bank(EXPERTS, D, 64, rank, "x", dtype)
    seed = torch.tensor([3, 0])
    arguments = (w["y"], w["x"], w["A"], b["B"], b["R"], None, None, 0.5, routing, "x", 0.1, seed)
    launches = counted(lambda: backend.routed_projection(*arguments))
    assert [launch.name for launch in launches] == ["routed_small_kernel"]


def test_backward_reads_g_and_x_once_and_writes_dx_once(v: dict[str, Tensor]) -> None:
    results: list[Any] = []
    needs = (True, True, True)
    launches = counted(
        lambda: results.append(
            backend.residual_add_backward(v["g"], v["x"], v["t"], v["A"], v["B"], 0.5, 0.0, None, *needs)
        )
    )
    assert [launch.name for launch in launches] == ["up_kernel", "down_kernel", "reduce_kernel"]
    assert passes(launches, [v["g"], v["x"], results[0][0]]) == 3.0


def test_wide_backward_counts_g_once_for_its_row_and_column_programs() -> None:
    w = parameters((256,), 64, 64, 64, torch.float16)
    results: list[Any] = []
    launches = counted(
        lambda: results.append(
            backend.residual_add_backward(w["g"], w["x"], w["t"], w["A"], w["B"], 0.5, 0.0, None, True, True, True)
        )
    )
    assert [launch.name for launch in launches] == ["up_kernel", "down_kernel", "reduce_kernel"]
    assert passes(launches, [w["g"], w["x"], results[0][0]]) == 3.0


@pytest.mark.parametrize("rank", [8, 16, 32, 64, 128])
def test_everything_a_backward_moves_is_at_most_four_passes(rank: int) -> None:
    """Partials, factors and gradients of the factors included, by formula: the counts above leave them out."""
    recorded = launched("residual", "backward", 8192, rank)
    assert len(recorded) == 3
    assert sum(backend.kernels("model").dram_bytes(one) for one in recorded) <= 4 * 8192 * 4096 * 2


def test_the_second_reader_of_g_comes_while_l2_holds_it() -> None:
    """Programs start in the order of their runs: what the machine holds at once spans at most 36 MB of g."""
    up = launched("residual", "backward", 8192, 64)[0]
    assert up.constants["BY_ROWS"]
    columns, runs, _ = up.grid
    bytes_per_run = up.args[up.kernel.arg_names.index("rows_per_split")] * 4096 * 2
    resident = 2 * backend.kernels("table").PROCESSORS["sm_90"]
    assert runs > 1 and -(-resident // columns) * bytes_per_run <= 36 << 20


def launched(op: str, direction: str, T: int, rank: int) -> list[Any]:
    return codegen.launches(codegen._config(op, direction, T, rank), "sm_90")


def test_backward_with_frozen_factors_moves_two_passes_in_one_launch(v: dict[str, Tensor]) -> None:
    results: list[Any] = []
    launches = counted(
        lambda: results.append(
            backend.residual_add_backward(v["g"], None, v["B"], v["A"], v["B"], 0.5, 0.0, None, True, False, False)
        )
    )
    assert len(launches) == 1
    assert passes(launches, [v["g"], results[0][0]]) == 2.0
    assert launches[0].dram == 2 * v["g"].numel() * 2 + 2 * D * RANK * 2


@pytest.mark.parametrize("routing", ["batch", "static", "token"])
def test_routed_forward_moves_three_passes_in_two_launches(v: dict[str, Tensor], routing: str) -> None:
    b = bank(EXPERTS, D, D, RANK, "t", torch.float16)
    static = routing == "static"
    results: list[Any] = []
    launches = counted(
        lambda: results.append(
            backend.routed_projection(
                v["y"], v["x"], v["A"], b["B"], None if static else b["R"], b["weights"] if static else None, None, 0.5,
                routing, "t", 0.0, None,
            )
        )
    )  # fmt: skip
    assert [launch.name for launch in launches] == ["shrink_kernel", "expand_kernel"]
    assert passes(launches, [results[0][0], v["x"], v["y"]]) == 3.0


@pytest.mark.parametrize(
    ("tokens", "rank", "experts"), [(T, RANK, EXPERTS), (256, 64, 2), (256, 64, 5), (256, 128, 2), (256, 3, 17)]
)
@pytest.mark.parametrize("routing", ["batch", "token"])
def test_routed_backward_in_three_launches_and_three_passes(routing: str, tokens: int, rank: int, experts: int) -> None:
    """Also where the partials of `u` would cost a pass (ranks from 64 on) and where one product is too narrow for the
    bank (experts times rank above 128)."""
    v, b = parameters((tokens,), D, D, rank, torch.float16), bank(experts, D, D, rank, "t", torch.float16)
    p = torch.softmax(torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)), -1)
    results: list[Any] = []
    launches = counted(
        lambda: results.append(
            backend.routed_projection_backward(
                v["g"], v["x"], v["t"], p, p.mean(0), v["A"], b["B"], b["R"], None, None, 0.5, routing, "t", 0.0, None,
                [True, True, True, True, False],
            )
        )
    )  # fmt: skip
    assert [launch.name for launch in launches] == ["up_kernel", "down_kernel", "reduce_kernel"]
    assert passes(launches, [v["g"], v["x"], results[0][0]]) == 3.0


def test_inactive_experts_cost_no_reads_of_their_weights_or_partials(v: dict[str, Tensor]) -> None:
    """Token routing, dB alone: with every expert inactive nothing is read, and the gradient is written as zeros."""
    b = bank(EXPERTS, D, D, RANK, "t", torch.float16)
    p = torch.full((T, EXPERTS), 0.5)
    active = torch.zeros(EXPERTS, dtype=torch.bool)
    results: list[Any] = []
    launches = counted(
        lambda: results.append(
            backend.routed_projection_backward(
                v["g"], None, v["t"], p, p[0], v["A"], b["B"], b["R"], None, active, 0.5, "token", "t", 0.0, None,
                [False, False, True, False, False],
            )
        )
    )  # fmt: skip
    assert passes(launches, [v["g"]]) == 0.0
    assert not results[0][2].any()
