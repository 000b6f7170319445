"""One build runs every instruction set that the CPU has: each is held to the float64 reference, and can be chosen by
`LOWRANK_FAST_CPU_ISA`; one that the CPU lacks is an error that lists those it has.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from ..support.accuracy import assert_all_accurate
from ..support.problems import Halves, Problem, ResidualAdd, Routed
from ..support.process import run_python
from ..support.targets import KERNEL_DTYPES

if importlib.util.find_spec("lowrank_fast._C") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from lowrank_fast import _C, residual_add  # type: ignore[attr-defined]

REPORT = "from lowrank_fast import _C; print(_C.isa())"
ALL = frozenset(("y", "x", "A", "B", "R", "weights"))
SHAPES = [
    # (tokens, d_in, d_out, rank), experts: below a vector, at its multiples, beyond them, beyond a block
    (((1,), 1, 1, 1), 1),
    (((1,), 97, 33, 8), 2),
    (((3, 5), 15, 17, 3), 3),
    (((64,), 128, 64, 16), 4),
    (((67,), 129, 259, 17), 5),
    (((33,), 771, 1029, 8), 6),
    (((7,), 96, 64, 64), 7),
    (((300,), 132, 130, 32), 9),
    (((331,), 2180, 4100, 32), 3),  # panels too large for the caches: other blocks of rows
    (((3, 21), 70, 53, 8), 3),
    (((48,), 1024, 96, 24), 2),  # the ranks of A lie whole pages apart
]


def problems(index: int, dtype: torch.dtype, parameter_dtype: torch.dtype) -> Iterator[Problem]:
    """Every operation, routing and gradient at `SHAPES[index]`; mixed per sample with some tokens masked."""
    shape, experts = SHAPES[index]
    dropout_p = 0.2 if index % 3 == 2 else 0.0
    factors = {"needs": ALL & frozenset("yxAB"), "seed": index, "dropout_p": dropout_p}
    yield ResidualAdd(*shape, dtype, parameter_dtype, **factors)
    yield Halves(*shape, dtype, parameter_dtype, **factors)
    layouts = {"B": ("contiguous", "transposed")[index % 2], "x": ("contiguous", "padded_rows")[index % 2]}
    for routing in ("batch", "token", "static", *(["sample"] if len(shape[0]) > 1 else [])):
        yield Routed(
            *shape, dtype, parameter_dtype, needs=ALL, seed=index, dropout_p=dropout_p, layouts=layouts,
            experts=experts, routing=routing, router_input="tx"[index % 2], masked=routing == "sample",
        )  # fmt: skip


@pytest.fixture
def any_isa() -> Iterator[None]:
    """Leaves the instruction set as it was."""
    before = _C.isa()
    yield
    _C.set_isa(before)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(dtype, parameters) for dtype in KERNEL_DTYPES for parameters in dict.fromkeys((dtype, torch.float32))],
)
@pytest.mark.parametrize("index", range(len(SHAPES)), ids=[str(shape) for shape, _ in SHAPES])
def test_every_instruction_set_is_accurate_on_every_operation(any_isa, index, dtype, parameter_dtype):
    for problem in problems(index, dtype, parameter_dtype):
        expected = problem.eager(), problem.truth()
        for isa in _C.testable_isas():
            _C.set_isa(isa)
            try:
                assert_all_accurate(
                    problem.ours("cpu"), *expected, dtype, lambda name, p=problem: p.more_draws(name, "cpu")
                )
            except AssertionError as error:
                raise AssertionError(f"{isa}: {error}\n{problem}") from None


@pytest.mark.parametrize("isa", _C.testable_isas())
def test_the_environment_chooses_the_instruction_set(isa):
    result = run_python(REPORT, LOWRANK_FAST_CPU_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


def test_left_alone_the_best_instruction_set_is_in_use():
    for nothing in (None, ""):
        result = run_python(REPORT, LOWRANK_FAST_CPU_ISA=nothing)
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == [[isa for isa in _C.isas() if isa != "amx"][-1]]


def test_the_baseline_runs_everywhere_and_comes_first():
    assert _C.isas()[0] == "baseline"


def test_an_instruction_set_that_is_not_there_is_an_error_that_lists_those_that_are():
    call = "import torch, lowrank_fast; lowrank_fast.shrink(torch.ones(2, 3), torch.ones(1, 3))"
    result = run_python(call, LOWRANK_FAST_CPU_ISA="avx1024")
    assert result.returncode != 0, result.stdout
    assert "LOWRANK_FAST_CPU_ISA" in result.stderr and "avx1024" in result.stderr
    for isa in _C.isas():
        assert isa in result.stderr


@pytest.mark.parametrize("asked", ["sse9", "AVX2", "neon"])
def test_set_isa_refuses_what_the_environment_refuses_and_leaves_the_choice(asked):
    before = _C.isa()
    with pytest.raises(
        ValueError, match=rf"LOWRANK_FAST_CPU_ISA must be one of those this CPU runs .*baseline.*got {asked}"
    ):
        _C.set_isa(asked)
    assert _C.isa() == before


@pytest.fixture(params=[isa for isa in _C.isas() if isa != "amx"])
def chosen(request, any_isa):
    threads = torch.get_num_threads()
    _C.set_isa(request.param)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "rank"), [(300, 2048, 1024, 24), (9, 8192, 256, 24), (70, 1100, 40, 8)]
)
def test_a_rows_bits_depend_on_no_other_row_and_on_no_thread(chosen, rows, d_in, d_out, rank, dtype):
    torch.manual_seed(0)
    y, x = torch.randn(rows, d_out).to(dtype), torch.randn(rows, d_in).to(dtype)
    A, B = torch.randn(rank, d_in).to(dtype), torch.randn(d_out, rank).to(dtype)
    torch.set_num_threads(2)
    whole = residual_add(y, x, A, B)
    torch.set_num_threads(1)
    assert torch.equal(residual_add(y, x, A, B), whole)
    for some in (slice(0, 1), slice(2, 5), slice(1, rows)):
        assert torch.equal(residual_add(y[some], x[some], A, B), whole[some])


@pytest.mark.parametrize("d_in", [1024, 1056])
def test_an_input_gradients_bits_depend_on_no_other_row(chosen, d_in):
    """Up to 256 rows read A where it is, but many pack it where its ranks lie whole pages apart."""
    torch.manual_seed(0)
    y, x, g = torch.randn(70, 40), torch.randn(70, d_in), torch.randn(70, 40)
    A, B = torch.randn(24, d_in), torch.randn(40, 24)

    def gradient(rows):
        leaf = x[rows].clone().requires_grad_()
        return torch.autograd.grad(residual_add(y[rows], leaf, A, B), leaf, g[rows])[0]

    whole = gradient(slice(None))
    for some in (slice(0, 1), slice(2, 5), slice(1, 45), slice(30, 70)):
        assert torch.equal(gradient(some), whole[some])
