"""Same inputs, same bits: run to run, and for each row whatever other rows are in the call."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import functional, use_backend

from ..support.accuracy import assert_same_bits
from ..support.problems import Halves, ResidualAdd, Routed
from ..support.targets import KERNEL_DTYPES, device_of, interpreted

dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
RUNS = 20
ALL = frozenset(("y", "x", "A", "B", "R", "weights"))


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _problems(dtype: torch.dtype, small: bool):
    """Large enough to be split over threads, with tails."""
    shape = ((2, 11), 70, 53, 8) if small else ((2, 300), 259, 390, 8)
    yield ResidualAdd(*shape, dtype, dtype, needs=ALL & frozenset("yxAB"))
    yield Halves(*shape, dtype, torch.float32, needs=ALL & frozenset("yxAB"))
    for routing in ("batch", "sample", "token", "static"):
        yield Routed(*shape, dtype, dtype, needs=ALL, experts=4, routing=routing)
    yield Routed(*shape, dtype, dtype, needs=ALL, experts=4, routing="token", router_input="x")


@dtypes
def test_twenty_runs_give_the_same_bits(kernel_backend, dtype, threads):
    for problem in _problems(dtype, interpreted(kernel_backend)):
        first = problem.ours(kernel_backend)
        for _ in range(1 if interpreted(kernel_backend) else RUNS - 1):  # an interpreter runs programs in one order
            for name, value in problem.ours(kernel_backend).items():
                assert_same_bits(value, first[name], f"{type(problem).__name__} {name}")


# ------------------------------------------------------------------------------------------------ rows

ROWS = ((0, 1), (5, 6), (0, 2), (3, 7), (0, 16), (7, 40), (1, 65), (63, 130), (0, 299), (298, 299))


def _rowwise(op: str, tensors: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Output and gradient of `x` (or of `t`) for some rows of the activations."""
    y, x, g = (tensors[name][rows] for name in ("y", "x", "g"))
    A, B, R = tensors["A"], tensors["B"], tensors["R"]
    x = x.clone().requires_grad_()
    if op == "residual_add":
        out = functional.residual_add(y, x, A, B[0], 0.7)
    elif op == "shrink":
        out = functional.shrink(x, A)
        g = tensors["t"][rows]
    elif op == "expand_add":
        x = tensors["t"][rows].clone().requires_grad_()
        out = functional.expand_add(y, x, B[0], 0.7)
    elif op == "static":
        out = functional.routed_projection(y, x, A, B, routing="static", weights=R[:, 0].float())
    else:
        router_input = op[-1]
        R = R if router_input == "x" else R[:, : A.shape[0]]
        out = functional.routed_projection(y, x, A, B, R, 0.7, routing="token", router_input=router_input)
    (gradient,) = torch.autograd.grad(out, x, g)
    return {"out": out.detach(), "gradient": gradient}


# the last one is wide enough for one row to be shared by two threads
WIDTHS = [(70, 53, 3), (256, 384, 8), (256, 384, 16), (771, 130, 33), (2180, 4100, 32), (4160, 256, 32)]


@pytest.mark.parametrize(("d_in", "d_out", "rank"), WIDTHS)
@pytest.mark.parametrize("op", ["residual_add", "shrink", "expand_add", "static", "token on t", "token on x"])
@dtypes
def test_the_bits_of_a_row_do_not_depend_on_the_rows_beside_it(kernel_backend, dtype, op, d_in, d_out, rank):
    rows = 299
    if interpreted(kernel_backend):
        if (d_in, rank) != (256, 16):
            pytest.skip(
                "one width of two tiles is enough for the interpreter; the others are for the C++ kernels' blocks"
            )
        rows = 140  # one launch up to 128, two from there on
    problem = Routed((rows,), d_in, d_out, rank, dtype, dtype, experts=4, router_input="x")
    device = device_of(kernel_backend)
    inputs, g = problem.tensors(device)
    tensors = {**inputs, "g": g, "t": torch.randn(rows, rank, generator=torch.Generator().manual_seed(1)).to(device)}
    with use_backend(kernel_backend):
        everything = _rowwise(op, tensors, slice(None))
        for begin, end in [(0, 1), (7, 40)] if interpreted(kernel_backend) else ROWS:
            for name, value in _rowwise(op, tensors, slice(begin, end)).items():
                assert_same_bits(value, everything[name][begin:end], f"{name} of rows {begin}:{end}")


@dtypes
def test_the_bits_of_a_row_do_not_depend_on_the_shape_of_the_leading_dimensions(kernel_backend, dtype):
    problem = ResidualAdd((60,), 70, 53, 8, dtype, dtype)
    inputs, _ = problem.tensors(device_of(kernel_backend))
    y, x, A, B = inputs.values()
    with use_backend(kernel_backend):
        flat = functional.residual_add(y, x, A, B)
        for lead in ((60, 1), (3, 20), (2, 3, 5, 2)):
            shaped = functional.residual_add(y.view(*lead, -1), x.view(*lead, -1), A, B)
            assert_same_bits(shaped.view(60, -1), flat, str(lead))


@dtypes
def test_outputs_and_input_gradients_have_the_same_bits_at_one_and_two_threads(kernel_backend, dtype):
    """Rows are independent; only the sums over rows (dA, dB) may be split differently."""
    before = torch.get_num_threads()
    try:
        for problem in _problems(dtype, interpreted(kernel_backend)):
            if isinstance(problem, Routed) and problem.routing in ("batch", "sample"):
                continue
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results.append(problem.ours(kernel_backend))
            for name in ("out", "dx", "dy"):
                assert_same_bits(results[0][name], results[1][name], f"{type(problem).__name__} {name}")
    finally:
        torch.set_num_threads(before)
