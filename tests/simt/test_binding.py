"""The torch bindings of the CUDA kernels (csrc/cuda/cuda_*ops.cpp), registered for CPU tensors with the harness behind.

What reaches a GPU is then code that has run: strides, workspaces, in-place and strided results, the way out to the
fallback, and the checks of arguments that would otherwise be memory errors on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import fallback

from ..support.problems import Halves, ResidualAdd, Routed
from . import build

pytestmark = pytest.mark.slow  # compiling torch's headers takes most of a minute
BF16 = torch.bfloat16
ops = torch.ops.lowrank_fast


@pytest.fixture(scope="module")
def binding():
    return build.binding()


@pytest.fixture
def bound(binding):
    """CPU tensors take the CUDA bindings while the test runs."""
    binding.register("CPU")
    yield binding
    binding.unregister()


def _random(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _launched(binding, run) -> int:
    before = binding.launches()
    run()
    return binding.launches() - before


@pytest.mark.parametrize("parameter", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "padded_rows", "transposed_leading", "inner_stride", "expanded"])
@pytest.mark.parametrize("name", ["y", "x", "g"])
def test_residual_add_in_every_layout(bound, name, layout, parameter):
    problem = ResidualAdd((4, 9), 64, 80, 8, BF16, parameter, needs=frozenset("yxAB"), layouts={name: layout})
    assert _launched(bound, lambda: problem.assert_solved_by("cpu")) >= 2


@pytest.mark.parametrize("needs", ["x", "A", "B", "xA", "xB", "AB"])
def test_every_mask_of_needed_gradients(bound, needs):
    ResidualAdd((5,), 24, 40, 4, BF16, BF16, needs=frozenset(needs), dropout_p=0.2).assert_solved_by("cpu")


def test_the_two_halves(bound):
    assert _launched(
        bound, lambda: Halves((2, 5), 24, 40, 4, BF16, BF16, needs=frozenset("yxAB")).assert_solved_by("cpu")
    )


@pytest.mark.parametrize(
    ("routing", "router_input"), [("batch", "t"), ("sample", "x"), ("token", "t"), ("token", "x"), ("static", "t")]
)
def test_routed_projection(bound, routing, router_input):
    needs = frozenset({"y", "x", "A", "B", "weights" if routing == "static" else "R"})
    problem = Routed((3, 7), 24, 40, 4, BF16, torch.float32, needs=needs, routing=routing, router_input=router_input)
    problem = problem.but(masked=routing in ("batch", "sample"), active=(True, False, True, True), experts=4)
    assert _launched(bound, lambda: problem.assert_solved_by("cpu")) >= 2
    problem.but(layouts={"B": "transposed"}).assert_solved_by("cpu")


@pytest.mark.parametrize("rows", ["contiguous", "padded", "transposed"])
def test_in_place_and_out_write_their_target_and_nothing_beside_it(bound, rows):
    buffer = _random(4, 9, 83)
    target = {"contiguous": buffer[..., :80].contiguous(), "padded": buffer[..., :80], "transposed": None}[rows]
    if target is None:
        target = _random(9, 4, 80).transpose(0, 1)
    x, A, B = _random(4, 9, 24, seed=1), _random(8, 24, seed=2), _random(80, 8, seed=3)
    truth = fallback.residual_add(*(v.double() for v in (target, x, A, B)), 0.5, 0.0, None, True)
    before, out = buffer.clone(), torch.empty_strided(target.shape, target.stride(), dtype=BF16)
    t = ops.residual_add_out(target, x, A, B, 0.5, 0.0, None, True, out=out)
    ops.residual_add_(target, x, A, B, 0.5, 0.0, None, False)
    assert torch.equal(out, target)
    for got, expected in ((target, truth[0]), (t, truth[1])):
        assert (got.double() - expected).norm() <= 1e-2 * expected.norm()
    assert torch.equal(buffer[..., 80:], before[..., 80:])


@pytest.mark.parametrize(("tokens", "rank", "dtype"), [(5, 129, BF16), (5, 4, torch.float64), (0, 4, BF16)])
def test_what_no_kernel_takes_goes_to_the_fallback(bound, tokens, rank, dtype):
    y, x, A, B = (_random(*s, dtype=dtype) for s in ((tokens, 40), (tokens, 24), (rank, 24), (40, rank)))
    arguments = (y, x, A, B, 0.5, 0.0, None, True)
    got = []
    assert _launched(bound, lambda: got.extend(ops.residual_add(*arguments))) == 0
    for value, expected in zip(got, fallback.residual_add(*arguments), strict=True):
        assert torch.equal(value, expected)
    arguments = (y, x, got[1], A, B, 0.5, 0.0, None, True, True, True)
    gradients = ops.residual_add_backward(*arguments)
    for value, expected in zip(gradients, fallback.residual_add_backward(*arguments), strict=True):
        assert torch.equal(value, expected)
    bank = _random(2, 40, rank, dtype=dtype)
    routed = (y, x, A, bank, _random(2, rank, dtype=dtype), None, None, 0.5, "token", "t", 0.0, None)
    for value, expected in zip(ops.routed_projection(*routed), fallback.routed_projection(*routed), strict=True):
        assert torch.equal(value, expected)


Y, X, A_, B_ = (5, 40), (5, 24), (4, 24), (40, 4)


@pytest.mark.parametrize(
    ("shapes", "named"),
    [
        ((Y, X, (4, 25), B_), "A"),
        ((Y, X, A_, (41, 4)), "B"),
        ((Y, X, A_, (40, 5)), "B"),
        (((4, 40), X, A_, B_), "y"),
    ],
)
def test_sizes_that_do_not_fit_are_errors_and_not_memory_accesses(bound, shapes, named):
    with pytest.raises(RuntimeError, match=f"lowrank_fast: {named} must be"):
        ops.residual_add(*(_random(*shape) for shape in shapes), 0.5, 0.0, None, True)


def test_wrong_dtypes_are_errors(bound):
    y, x, A, B = (_random(*shape) for shape in (Y, X, A_, B_))
    with pytest.raises(RuntimeError, match="lowrank_fast: y must be"):
        ops.residual_add(y.half(), x, A, B, 0.5, 0.0, None, True)
    with pytest.raises(RuntimeError, match="lowrank_fast: A must be"):
        ops.residual_add(y, x, A.half(), B, 0.5, 0.0, None, True)


def test_backward_checks_what_it_reads(bound):
    y, x, A, B = (_random(*shape) for shape in (Y, X, A_, B_))
    t = _random(5, 4, dtype=torch.float32)
    wrong_t, wrong_x = t[:4], x[:4]
    with pytest.raises(RuntimeError, match="lowrank_fast: t must be"):
        ops.residual_add_backward(y, x, wrong_t, A, B, 0.5, 0.0, None, True, True, True)
    with pytest.raises(RuntimeError, match="lowrank_fast: x must be"):
        ops.residual_add_backward(y, wrong_x, t, A, B, 0.5, 0.0, None, True, True, True)
    with pytest.raises(RuntimeError, match="lowrank_fast: x must be"):
        ops.residual_add_backward(y, None, t, A, B, 0.5, 0.0, None, True, True, True)


def test_routed_projection_checks_what_it_reads(bound):
    y, x, A = (_random(*shape) for shape in (Y, X, A_))
    bank, R = _random(3, 40, 4), _random(3, 4)
    mask = torch.ones(5, dtype=torch.bool)
    good = dict(y=y, x=x, A=A, B=bank, R=R, weights=None, token_mask=mask)
    wrong = dict(
        A=_random(4, 25), B=_random(3, 41, 4), R=_random(3, 5), token_mask=mask[:4], y=_random(4, 40),
    )  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(RuntimeError, match=f"lowrank_fast: {name} must be"):
            ops.routed_projection(*(good | {name: value}).values(), 0.5, "batch", "t", 0.0, None)
    with pytest.raises(RuntimeError, match="lowrank_fast: weights must be"):
        ops.routed_projection(y, x, A, bank, None, torch.ones(2), None, 0.5, "static", "t", 0.0, None)
    with pytest.raises(RuntimeError, match="lowrank_fast: routing must be"):
        ops.routed_projection(y, x, A, bank, R, None, None, 0.5, "tokens", "t", 0.0, None)
