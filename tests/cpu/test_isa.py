"""One build runs every instruction set that the CPU has: each is chosen by `LOWRANK_FAST_CPU_ISA` in a process of its
own and held to the float64 reference; one that the CPU lacks is an error that lists those it has.
"""

from __future__ import annotations

import importlib.util

import pytest

from ..support.process import run_python

if importlib.util.find_spec("lowrank_fast._C") is None:
    pytest.skip("the C++ extension is not built", allow_module_level=True)

from lowrank_fast import _C  # type: ignore[attr-defined]

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


@pytest.mark.parametrize("asked", ["avx1024", "AVX2", "neon"])
def test_an_instruction_set_that_is_not_there_is_an_error_that_lists_those_that_are(asked):
    call = "import torch, lowrank_fast; lowrank_fast.shrink(torch.ones(2, 3), torch.ones(1, 3))"
    result = run_python(call, LOWRANK_FAST_CPU_ISA=asked)
    assert result.returncode != 0, result.stdout
    assert "LOWRANK_FAST_CPU_ISA" in result.stderr and asked in result.stderr
    for isa in _C.isas():
        assert isa in result.stderr


def test_set_isa_refuses_what_the_environment_refuses_and_leaves_the_choice():
    before = _C.isa()
    with pytest.raises(
        ValueError, match=r"LOWRANK_FAST_CPU_ISA must be one of those this CPU runs .*baseline.*got sse9"
    ):
        _C.set_isa("sse9")
    assert _C.isa() == before
