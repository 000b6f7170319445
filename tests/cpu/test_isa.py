"""One build runs every instruction set that the CPU has: each is chosen by `LOWRANK_FAST_CPU_ISA` in a process of its
own and held to the float64 reference; one that the CPU lacks is an error that lists those it has.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ..support.process import run_python

if importlib.util.find_spec("lowrank_fast._C") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from lowrank_fast import _C, residual_add  # type: ignore[attr-defined]

SUITE = "import runpy; runpy.run_module('tests.support.isa_suite', run_name='__main__')"
REPORT = "from lowrank_fast import _C; print(_C.isa())"


@pytest.mark.parametrize("isa", _C.testable_isas())
def test_every_instruction_set_is_accurate_on_every_operation(isa):
    result = run_python(SUITE, LOWRANK_FAST_CPU_ISA=isa, LOWRANK_FAST_BACKEND=None)
    assert result.returncode == 0, result.stderr[-3000:]
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
def chosen(request):
    before, threads = _C.isa(), torch.get_num_threads()
    _C.set_isa(request.param)
    yield
    _C.set_isa(before)
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
