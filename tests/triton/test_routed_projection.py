"""Routed projection: Triton kernels in the interpreter against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowrank_fast import triton_backend as backend

from .arena import Arena
from .cases import bank, close, parameters, truth

pytestmark = pytest.mark.interp
SEED = torch.tensor([-0x123456789ABCDEF, 0x7EDCBA987], dtype=torch.int64)
ROUTINGS = [
    ("static", "t"),
    ("batch", "t"),
    ("batch", "x"),
    ("sample", "t"),
    ("sample", "x"),
    ("token", "t"),
    ("token", "x"),
]
NAMES = ("dx", "dA", "dB", "dR", "dweights")


def check(
    v: dict[str, Tensor], routing: str, router_input: str, *, needs: list[bool], token_mask: Tensor | None = None,
    active: Tensor | None = None, dropout: float = 0.0, what: str = "",
) -> None:  # fmt: skip
    """Forward and backward of one problem against float64."""
    _, t, p, w = check_forward(v, routing, router_input, token_mask=token_mask, dropout=dropout, what=what)
    R, seed = None if routing == "static" else v["R"], SEED if dropout else None
    need_x = needs[1] or (needs[3] and router_input == "x")
    backward = (
        v["g"], v["x"] if need_x else None, t, p, w, v["A"], v["B"], R, token_mask, active, 0.7, routing, router_input,
        dropout, seed, needs,
    )  # fmt: skip
    results: Any = backend.routed_projection_backward(*backward)
    for name, value, expected in zip(NAMES, results, truth("routed_projection_backward", *backward), strict=True):
        close(value, expected, what=f"{what} {name}", dtype=v["x"].dtype)


def check_forward(
    v: dict[str, Tensor], routing: str, router_input: str, *, token_mask: Tensor | None = None, dropout: float = 0.0,
    what: str = "",
) -> tuple[Tensor, ...]:  # fmt: skip
    """Forward of one problem against float64; its results."""
    R, weights = (None, v["weights"]) if routing == "static" else (v["R"], None)
    seed = SEED if dropout else None
    forward = (v["y"], v["x"], v["A"], v["B"], R, weights, token_mask, 0.7, routing, router_input, dropout, seed)
    got, wanted = backend.routed_projection(*forward), truth("routed_projection", *forward)
    for name, value, expected in zip(("out", "t", "p", "w"), got, wanted, strict=True):
        close(value, expected, what=f"{what} {name}", dtype=v["x"].dtype)
    return got


def problem(arena: Arena, routing: str, router_input: str, dtype: torch.dtype, **sizes: int) -> dict[str, Tensor]:
    shape = {"S": 2, "L": 19, "d_in": 72, "d_out": 50, "rank": 4, "E": 3} | sizes
    v = parameters((shape["S"], shape["L"]), shape["d_in"], shape["d_out"], shape["rank"], dtype)
    v |= bank(shape["E"], shape["d_in"], shape["d_out"], shape["rank"], router_input, dtype)
    return {name: arena.place(value) for name, value in v.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("routing", "router_input"), ROUTINGS)
def test_forward_and_backward(arena: Arena, routing: str, router_input: str, dtype: torch.dtype) -> None:
    v = problem(arena, routing, router_input, dtype)
    static = routing == "static"
    check(v, routing, router_input, needs=[True, True, True, not static, static])


@pytest.mark.parametrize("L", [1, 19, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("routing", "router_input"), ROUTINGS)
def test_forward_of_few_and_more_rows(
    arena: Arena, routing: str, router_input: str, dtype: torch.dtype, L: int
) -> None:
    """One launch up to 128 rows, two beyond; a mask and dropout where they go."""
    v = problem(arena, routing, router_input, dtype, L=L)
    mask = torch.arange(2 * L).reshape(2, L) % 3 != 0
    dropout = 0.2 if dtype is torch.float32 else 0.0
    check_forward(v, routing, router_input, token_mask=None if routing == "static" else mask, dropout=dropout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("routing", "router_input"), ROUTINGS)
def test_few_rows_of_the_widest_rank_with_dropout(
    arena: Arena, routing: str, router_input: str, dtype: torch.dtype
) -> None:
    """Several blocks of rows for one mean; in float32 half of the ranks in one product."""
    v = problem(arena, routing, router_input, dtype, L=40, rank=128)
    mask = None if routing == "static" else torch.arange(80).reshape(2, 40) % 3 != 0
    check_forward(v, routing, router_input, token_mask=mask, dropout=0.2)


@pytest.mark.parametrize(
    ("routing", "router_input", "rank", "experts", "dtype"),
    [
        ("static", "t", 4, 3, torch.float32),
        ("static", "t", 128, 2, torch.float16),
        ("token", "t", 4, 3, torch.float32),
        ("token", "x", 40, 5, torch.float16),
        ("token", "t", 40, 3, torch.float32),
        ("token", "t", 70, 2, torch.float32),
        ("static", "t", 128, 2, torch.float32),
        ("token", "x", 128, 2, torch.float32),
    ],
)
def test_a_row_does_not_depend_on_how_many_rows_there_are(
    routing: str, router_input: str, rank: int, experts: int, dtype: torch.dtype
) -> None:
    v = parameters((1, 133), 200, 70, rank, dtype) | bank(experts, 200, 70, rank, router_input, dtype)
    R, weights = (None, v["weights"]) if routing == "static" else (v["R"], None)

    def rows(first: int, last: int) -> Tensor:
        y, x = v["y"][:, first:last], v["x"][:, first:last]
        return backend.routed_projection(y, x, v["A"], v["B"], R, weights, None, 0.7, routing, router_input, 0.0, None)[
            0
        ]

    whole = rows(0, 133)
    for first, last in ((0, 1), (5, 45), (3, 131)):
        assert torch.equal(rows(first, last), whole[:, first:last])


@pytest.mark.parametrize(("routing", "router_input"), ROUTINGS)
def test_mask_active_and_dropout_together(arena: Arena, routing: str, router_input: str) -> None:
    v = problem(arena, routing, router_input, torch.float32)
    mask = torch.arange(38).reshape(2, 19) % 3 != 0
    active = torch.tensor([False, True, False])
    static = routing == "static"
    needs = [True, True, True, not static, static]
    check(v, routing, router_input, needs=needs, token_mask=None if static else mask, active=active, dropout=0.2)


@pytest.mark.parametrize(("routing", "router_input"), [("batch", "t"), ("batch", "x"), ("token", "t"), ("token", "x")])
def test_each_gradient_alone(arena: Arena, routing: str, router_input: str) -> None:
    v = problem(arena, routing, router_input, torch.float32)
    for index in range(4):
        check(v, routing, router_input, needs=[i == index for i in range(5)], what=NAMES[index])


def test_a_sample_with_no_kept_token_gets_weights_of_zero(arena: Arena) -> None:
    v = problem(arena, "sample", "t", torch.float32)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[0] = False
    check(v, "sample", "t", needs=[True, True, True, True, False], token_mask=mask)


@pytest.mark.parametrize(
    ("routing", "rank", "experts"),
    [("token", 40, 5), ("token", 4, 17), ("batch", 70, 2), ("batch", 40, 7), ("sample", 70, 3), ("static", 128, 5)]
    + [(routing, 130, 2) for routing in ("batch", "sample", "token", "static")],
)
def test_banks_wider_than_one_product(arena: Arena, routing: str, rank: int, experts: int) -> None:
    v = problem(arena, routing, "t", torch.float32, rank=rank, E=experts)
    static = routing == "static"
    check(v, routing, "t", needs=[True, True, True, not static, static], active=v["active"])


def test_transposed_bank_is_read_where_it_lies(arena: Arena) -> None:
    """PEFT stores Lily's bank as `[E r, d_out]`."""
    v = problem(arena, "batch", "t", torch.float16)
    stored = v["B"].transpose(1, 2).reshape(-1, v["B"].shape[1]).contiguous()
    v["B"] = arena.place(stored).view(3, 4, 50).transpose(1, 2)
    check(v, "batch", "t", needs=[True, True, True, True, False])


@pytest.mark.parametrize("rank", [3, 130])
@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_no_tokens(routing: str, rank: int) -> None:
    v = parameters((2, 0), 8, 6, rank, torch.float32) | bank(2, 8, 6, rank, "t", torch.float32)
    check(v, routing, "t", needs=[True, True, True, True, False])


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.sampled_from(ROUTINGS),
    S=st.integers(1, 3),
    L=st.sampled_from([1, 2, 17, 65]),
    d_in=st.integers(1, 90),
    d_out=st.integers(1, 90),
    rank=st.integers(1, 20),
    E=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_shape(
    arena: Arena, case: tuple[str, str], S: int, L: int, d_in: int, d_out: int, rank: int, E: int, dtype: torch.dtype
) -> None:
    v = problem(arena, *case, dtype, S=S, L=L, d_in=d_in, d_out=d_out, rank=rank, E=E)
    check(v, *case, needs=[True, True, True, False, False], active=v["active"])


def test_same_input_same_bits() -> None:
    v = parameters((2, 40), 72, 50, 4, torch.float16) | bank(3, 72, 50, 4, "x", torch.float16)
    runs = []
    for _ in range(2):
        out, t, p, w = backend.routed_projection(
            v["y"], v["x"], v["A"], v["B"], v["R"], None, None, 0.7, "batch", "x", 0.1, SEED
        )
        grads = backend.routed_projection_backward(
            v["g"], v["x"], t, p, w, v["A"], v["B"], v["R"], None, None, 0.7, "batch", "x", 0.1, SEED,
            [True, True, True, True, False],
        )  # fmt: skip
        runs.append((out, t, p, w, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
