"""Residual add and its two halves: Triton kernels in the interpreter against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lowrank_fast import reference
from lowrank_fast import triton_backend as backend

from .arena import Arena
from .cases import close, eager_residual, error, parameters, truth

pytestmark = pytest.mark.interp
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SEED = torch.tensor([-0x123456789ABCDEF, 0x7EDCBA987], dtype=torch.int64)
# T in each of the three forms: one launch that splits d_out, split-K, one launch by rows.
SHAPES = [(1, 40, 33, 3), (37, 96, 80, 4), (130, 200, 72, 8), (2051, 40, 24, 16)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_against_float64(arena: Arena, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    T, d_in, d_out, rank = shape
    v = parameters((T,), d_in, d_out, rank, dtype)
    y, x, A, B = (arena.place(v[name]) for name in "yxAB")
    out, t = backend.residual_add(y, x, A, B, 0.7, 0.0, None, True)
    expected, hidden = truth("residual_add", y, x, A, B, 0.7, 0.0, None, True)
    close(out, expected, eager_residual(y, x, A, B, 0.7), "out")
    assert t.dtype is torch.float32 and error(t, hidden) < 1e-5
    backend.residual_add_(y, x, A, B, 0.7, 0.0, None, False)
    assert torch.equal(y, out), "in place gives other bits"


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("rank", [4, 33], ids=["r4", "r33"])
def test_backward_for_every_combination_of_needs(arena: Arena, rank: int, needs: tuple[bool, bool, bool]) -> None:
    v = parameters((71,), 136, 150, rank, torch.float32)
    g, x, t, A, B = (arena.place(v[name]) for name in "gxtAB")
    arguments = (g, x if needs[1] else None, t, A, B, 0.7, 0.0, None, *needs)
    got = backend.residual_add_backward(*arguments)
    for name, value, expected in zip(("dx", "dA", "dB"), got, truth("residual_add_backward", *arguments), strict=True):
        close(value, expected, what=name)


@pytest.mark.parametrize("parameter", [None, torch.float32], ids=["same", "fp32 parameters"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_backward_in_16_bits(arena: Arena, dtype: torch.dtype, parameter: torch.dtype | None) -> None:
    v = parameters((70,), 136, 100, 16, dtype, parameter)
    g, x, t, A, B = (arena.place(v[name]) for name in "gxtAB")
    got = backend.residual_add_backward(g, x, t, A, B, 0.7, 0.0, None, True, True, True)
    expected = truth("residual_add_backward", g, x, t, A, B, 0.7, 0.0, None, True, True, True)
    u = 0.7 * (g @ B.to(dtype))
    plain = (u @ A.to(dtype), (u.T @ x).to(A.dtype), (0.7 * g.T @ t.to(dtype)).to(B.dtype))
    for name, value, wanted, eager in zip(("dx", "dA", "dB"), got, expected, plain, strict=True):
        assert value.dtype is (dtype if name == "dx" else A.dtype)
        limit = 2.0 * error(eager, wanted) + torch.finfo(dtype).eps
        assert error(value, wanted) <= limit, f"{name}: {error(value, wanted):.2e} over {limit:.2e}"


def test_wide_rank_takes_u_from_a_row_kernel_and_agrees(arena: Arena) -> None:
    v = parameters((45,), 70, 60, 70, torch.float32)
    g, x, t, A, B = (arena.place(v[name]) for name in "gxtAB")
    got = backend.residual_add_backward(g, x, t, A, B, 0.7, 0.0, None, True, True, True)
    expected = truth("residual_add_backward", g, x, t, A, B, 0.7, 0.0, None, True, True, True)
    for name, value, wanted in zip(("dx", "dA", "dB"), got, expected, strict=True):
        close(value, wanted, what=name)


@pytest.mark.parametrize("rank", [130, 300])
def test_any_rank(arena: Arena, rank: int) -> None:
    v = parameters((19,), 40, 36, rank, torch.float32)
    y, x, g, t, A, B = (arena.place(v[name]) for name in ("y", "x", "g", "t", "A", "B"))
    out, hidden = backend.residual_add(y, x, A, B, 0.7, 0.0, None, True)
    expected, wanted = truth("residual_add", y, x, A, B, 0.7, 0.0, None, True)
    close(out, expected, what="out")
    close(hidden, wanted, what="t")
    for needs in ((True, True, True), (True, False, False)):
        got = backend.residual_add_backward(g, x, t, A, B, 0.7, 0.0, None, *needs)
        for name, value, right in zip(
            ("dx", "dA", "dB"), got, truth("residual_add_backward", g, x, t, A, B, 0.7, 0.0, None, *needs), strict=True
        ):
            close(value, right, what=name)


@pytest.mark.parametrize("T", [3, 140])
def test_the_two_halves(arena: Arena, T: int) -> None:
    v = parameters((2, T), 70, 66, 5, torch.float32)
    y, x, g, A, B = (arena.place(v[name]) for name in "yxgAB")
    t = backend.shrink(x, A, 0.0, None)
    close(t, truth("shrink", x, A, 0.0, None), what="t")
    out = backend.expand_add(y, t, B, 0.7)
    assert torch.equal(out, backend.residual_add(y, x, A, B, 0.7, 0.0, None, False)[0]), "halves and whole differ"
    for needs in ((True, True), (True, False), (False, True)):
        for value, wanted in zip(
            backend.expand_add_backward(g, t, B, 0.7, *needs),
            truth("expand_add_backward", g, t, B, 0.7, *needs),
            strict=True,
        ):
            close(value, wanted)
        got = backend.shrink_backward(t, x, A, 0.2, SEED, torch.float32, *needs)
        for value, wanted in zip(got, truth("shrink_backward", t, x, A, 0.2, SEED, torch.float64, *needs), strict=True):
            close(value, wanted)


@pytest.mark.parametrize("d_in", [64, 200])
def test_dropout_keeps_exactly_what_the_reference_keeps(arena: Arena, d_in: int) -> None:
    x, A = arena.place(torch.ones(19, d_in)), arena.place(torch.eye(d_in))
    kept = torch.cat([backend.shrink(x, A[i : i + 32], 0.3, SEED) for i in range(0, d_in, 32)], 1) != 0
    assert torch.equal(kept, reference.dropout_mask(SEED, 19, d_in, 0.3))
    dx, _ = backend.shrink_backward(arena.place(torch.ones(19, 1)), None, arena.place(torch.ones(1, d_in)), 0.3, SEED,
                                    torch.float32, True, False)  # fmt: skip
    assert torch.equal(dx != 0, kept)


@pytest.mark.parametrize("T", [37, 140, 2050])
def test_dropout_forward_and_backward(arena: Arena, T: int) -> None:
    v = parameters((T,), 72, 40, 6, torch.float32)
    y, x, g, A, B = (arena.place(v[name]) for name in "yxgAB")
    out, t = backend.residual_add(y, x, A, B, 0.7, 0.2, SEED, True)
    close(out, truth("residual_add", y, x, A, B, 0.7, 0.2, SEED, True)[0])
    for needs in ((True, True, True), (True, False, False)):
        got = backend.residual_add_backward(g, x, t, A, B, 0.7, 0.2, SEED, *needs)
        for value, wanted in zip(
            got, truth("residual_add_backward", g, x, t, A, B, 0.7, 0.2, SEED, *needs), strict=True
        ):
            close(value, wanted)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    T=st.sampled_from([0, 1, 15, 16, 33, 129, 300]),
    d_in=st.integers(1, 150),
    d_out=st.integers(1, 150),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    pad=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_any_shape_and_stride(
    arena: Arena, T: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype, pad: int, transposed: bool
) -> None:
    v = parameters((T,), d_in + pad, d_out + pad, rank, dtype)
    y, x, g = (
        arena.place(v[name])[:, : d_out if name != "x" else d_in] for name in "yxg"
    )  # row strides beyond the width
    A, B = arena.place(v["A"])[:, :d_in], arena.place(v["B"])[:d_out]
    if transposed:
        A, B = arena.place(A.T.contiguous()).T, arena.place(B.T.contiguous()).T
    out, t = backend.residual_add(y, x, A, B, 0.7, 0.0, None, True)
    close(out, truth("residual_add", y, x, A, B, 0.7, 0.0, None, True)[0])
    got = backend.residual_add_backward(g, x, t, A, B, 0.7, 0.0, None, True, True, True)
    for value, wanted in zip(
        got, truth("residual_add_backward", g, x, t, A, B, 0.7, 0.0, None, True, True, True), strict=True
    ):
        close(value, wanted)


def test_expanded_gradients_and_overlapping_rows_are_read_in_place() -> None:
    v = parameters((40,), 48, 64, 4, torch.float32)
    row = v["g"][:1].expand(40, 64)
    scalar = torch.full((1, 1), 0.5).expand(40, 64)
    for g in (row, scalar):
        got = backend.residual_add_backward(g, v["x"], v["t"], v["A"], v["B"], 0.7, 0.0, None, True, True, True)
        wanted = truth("residual_add_backward", g, v["x"], v["t"], v["A"], v["B"], 0.7, 0.0, None, True, True, True)
        for value, expected in zip(got, wanted, strict=True):
            close(value, expected)


def test_output_that_has_no_row_view_is_still_written() -> None:
    v = parameters((3, 5), 20, 24, 4, torch.float32)
    wide = torch.zeros(3, 7, 24)
    out = wide[:, 1:6]
    backend.residual_add_out(v["y"], v["x"], v["A"], v["B"], 0.7, 0.0, None, False, out=out)
    close(out, truth("residual_add", v["y"], v["x"], v["A"], v["B"], 0.7, 0.0, None, False)[0])
    assert not wide[:, 0].any() and not wide[:, 6].any()


def test_offsets_beyond_two_billion_elements() -> None:
    rows, stride = (
        3,
        (1 << 31) // 2 + 64,
    )  # the third row starts past 2^31 elements: untouched pages of a sparse mapping
    storage = torch.UntypedStorage(2 * (rows - 1) * stride + 2 * 64)
    x = torch.empty(0, dtype=torch.float16).set_(storage, 0, (rows, 64), (stride, 1))
    v = parameters((rows,), 64, 32, 4, torch.float16)
    x.copy_(v["x"])
    out, _ = backend.residual_add(v["y"], x, v["A"], v["B"], 0.7, 0.0, None, False)
    assert torch.equal(out, backend.residual_add(v["y"], v["x"], v["A"], v["B"], 0.7, 0.0, None, False)[0])


def test_same_input_same_bits() -> None:
    v = parameters((150,), 100, 90, 8, torch.float16)
    runs = []
    for _ in range(2):
        out, t = backend.residual_add(v["y"], v["x"], v["A"], v["B"], 0.7, 0.1, SEED, True)
        runs.append(
            (
                out,
                t,
                *backend.residual_add_backward(v["g"], v["x"], t, v["A"], v["B"], 0.7, 0.1, SEED, True, True, True),
            )
        )
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_does_not_depend_on_how_many_rows_there_are(dtype: torch.dtype) -> None:
    v = parameters((2052,), 264, 24, 8, dtype)
    whole, t = backend.residual_add(v["y"], v["x"], v["A"], v["B"], 0.7, 0.0, None, True)
    du = backend.residual_add_backward(v["g"], v["x"], t, v["A"], v["B"], 0.7, 0.0, None, True, True, True)[0]
    for T in (1, 17, 130):
        out, part = backend.residual_add(v["y"][:T], v["x"][:T], v["A"], v["B"], 0.7, 0.0, None, True)
        assert torch.equal(part, t[:T]) and torch.equal(out, whole[:T])
        dx = backend.residual_add_backward(
            v["g"][:T], v["x"][:T], part, v["A"], v["B"], 0.7, 0.0, None, True, True, True
        )[0]
        assert torch.equal(dx, du[:T])
