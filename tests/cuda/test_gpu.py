"""What only a GPU can show: the kernels on real hardware, CUDA graphs, streams, in-place work, bits that repeat."""

from __future__ import annotations

import pytest
import torch

import lowrank_fast
from lowrank_fast import fallback

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _problem(tokens: int, d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(tokens + rank)

    def made(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * scale).to(dtype)

    return (
        made(tokens, d_out),
        made(tokens, d_in),
        made(rank, d_in, scale=d_in**-0.5),
        made(d_out, rank, scale=rank**-0.5),
    )


def _close(got: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((got.double() - truth).norm() <= BOUND[dtype] * truth.norm())


@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096, 16), (77, 1000, 520, 5), (4097, 4096, 4096, 16), (1025, 768, 3072, 64)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sanitizer_forward_and_backward(shape, dtype):
    y, x, A, B = _problem(*shape, dtype)
    out, t = torch.ops.lowrank_fast.residual_add(y, x, A, B, 0.7, 0.0, None, True)
    exact = [v.double() for v in (y, x, A, B)]
    truth, t_truth = fallback.residual_add(*exact, 0.7, 0.0, None, True)
    assert _close(out, truth, dtype) and _close(t, t_truth, dtype)
    got = torch.ops.lowrank_fast.residual_add_backward(y, x, t, A, B, 0.7, 0.0, None, True, True, True)
    true = fallback.residual_add_backward(
        exact[0], exact[1], t_truth, exact[2], exact[3], 0.7, 0.0, None, True, True, True
    )
    assert all(_close(g, v, dtype) for g, v in zip(got, true, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit(dtype):
    y, x, A, B = _problem(3000, 2048, 2048, 16, dtype)
    t = x.float() @ A.float().T
    first = torch.ops.lowrank_fast.residual_add_backward(y, x, t, A, B, 0.7, 0.0, None, True, True, True)
    for _ in range(20):
        again = torch.ops.lowrank_fast.residual_add_backward(y, x, t, A, B, 0.7, 0.0, None, True, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_cuda_graph_replays_with_new_inputs():
    y, x, A, B = _problem(64, 1024, 1024, 16, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        lowrank_fast.residual_add(y, x, A, B)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = lowrank_fast.residual_add(y, x, A, B)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, lowrank_fast.residual_add(y, x, A, B))


def test_work_runs_on_the_current_stream():
    y, x, A, B = _problem(4096, 4096, 4096, 16, torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        x.mul_(2.0)
        out = lowrank_fast.residual_add(y, x, A, B)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(out, lowrank_fast.residual_add(y, x, A, B))


@pytest.mark.parametrize("rank", [129, 300])
def test_a_rank_above_the_kernels_takes_the_fallback(rank):
    y, x, A, B = _problem(33, 256, 128, rank, torch.float32)
    truth = fallback.residual_add(*(v.double() for v in (y, x, A, B)), 1.0, 0.0, None, False)[0]
    assert _close(lowrank_fast.residual_add(y, x, A, B), truth, torch.float32)
