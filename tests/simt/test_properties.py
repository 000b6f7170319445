"""What the harness counts and what must not depend on anything: traffic, bank conflicts, schedules, row counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .harness import Simt

BF16 = torch.bfloat16


def _random(*shape: int, seed: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _forward(simt: Simt, tokens: int, d: int, rank: int, dtype: torch.dtype = BF16) -> tuple[Tensor, Tensor]:
    y, x = _random(tokens, d, seed=1, dtype=dtype), _random(tokens, d, seed=2, dtype=dtype)
    A, B = _random(rank, d, seed=3, dtype=dtype) / d**0.5, _random(d, rank, seed=4, dtype=dtype)
    return simt.residual_add(y, x, A, B, 0.5, 0.0, None, True)


def _backward(simt: Simt, tokens: int, d: int, rank: int) -> tuple[Tensor, ...]:
    g, x, t = _random(tokens, d, seed=1), _random(tokens, d, seed=2), _random(tokens, rank, seed=5, dtype=torch.float32)
    A, B = _random(rank, d, seed=3) / d**0.5, _random(d, rank, seed=4)
    return simt.residual_add_backward(g, x, t, A, B, 0.5, 0.0, None, True, True, True)


def _routed(
    simt: Simt, routing: str, tokens: int = 21, d: int = 136, rank: int = 4, experts: int = 3
) -> tuple[dict[str, float], dict[str, float]]:
    """Forward and backward over two samples; the passes over the activations that each took."""
    y, x, g = (_random(2, tokens, d, seed=s) for s in (1, 2, 6))
    A, B = _random(rank, d, seed=3) / d**0.5, _random(experts, d, rank, seed=4)
    mixed = routing == "static"
    R, weights = (None, torch.rand(experts)) if mixed else (_random(experts, rank, seed=7), None)
    _, t, p, w = simt.routed_projection(y, x, A, B, R, weights, None, 0.7, routing, "t", 0.0, None)
    forward = _passes(simt, "x y out", 2 * tokens, d)
    needs = [True, True, True, not mixed, mixed]
    simt.routed_projection_backward(g, x, t, p, w, A, B, R, None, None, 0.7, routing, "t", 0.0, None, needs)
    return forward, _passes(simt, "g x dx", 2 * tokens, d)


def _passes(simt: Simt, names: str, tokens: int, d: int) -> dict[str, float]:
    """Bytes moved to or from each activation, in units of one pass over `[tokens, d]` in bfloat16."""
    return {name: sum(simt.traffic[name]) / (tokens * d * 2) for name in names.split()}


def test_forward_reads_x_and_y_once_and_writes_out_once():
    simt, (tokens, d) = Simt(), (256, 512)
    _forward(simt, tokens, d, 16)
    assert _passes(simt, "x y out", tokens, d) == {"x": 1.0, "y": 1.0, "out": 1.0}


@pytest.mark.parametrize("tokens", [1, 5, 128])
def test_small_forward_is_one_launch(tokens):
    simt = Simt()
    _forward(simt, tokens, 512, 16)
    assert simt.counters["launches"] == 1


def test_sm90_backward_reads_g_and_x_once_and_writes_dx_once():
    simt, (tokens, d) = Simt(clusters=True), (128, 1024)
    _backward(simt, tokens, d, 16)
    assert _passes(simt, "g x dx", tokens, d) == {"g": 1.0, "x": 1.0, "dx": 1.0}
    assert simt.counters["launches"] == 3


@pytest.mark.parametrize("rank", [64, 128])
def test_sm90_backward_of_a_high_rank_takes_three_passes_too(rank):
    simt, (tokens, d) = Simt(clusters=True), (128, 1024)
    _backward(simt, tokens, d, rank)
    assert _passes(simt, "g x dx", tokens, d) == {"g": 1.0, "x": 1.0, "dx": 1.0}


@pytest.mark.parametrize(
    ("routing", "rank"), [("batch", 16), ("sample", 64), ("token", 8), ("token", 16), ("static", 16), ("static", 64)]
)
def test_sm90_backward_of_every_routing_takes_three_passes(routing, rank):
    _, backward = _routed(Simt(clusters=True), routing, tokens=64, d=512, rank=rank)
    assert backward == {"g": 1.0, "x": 1.0, "dx": 1.0}


@pytest.mark.parametrize(("rank", "reads_of_g"), [(16, 1.0), (32, 1.0), (64, 2.0)])
def test_sm80_backward_takes_at_most_four_passes(rank, reads_of_g):
    simt, (tokens, d) = Simt(), (256, 512)
    _backward(simt, tokens, d, rank)
    passes = _passes(simt, "g x dx", tokens, d)
    assert passes == {"g": reads_of_g, "x": 1.0, "dx": 1.0}
    slices = d / 256 if rank <= 32 else 0  # partial u, fp32: written and read once per column slice
    assert sum(passes.values()) + slices * 2 * 4 * rank / (2 * d) <= 4.0


@pytest.mark.parametrize(("routing", "rank"), [("batch", 16), ("sample", 16), ("token", 8), ("token", 16)])
def test_routed_projection_takes_three_passes_forward_and_at_most_four_backward(routing, rank):
    forward, backward = _routed(Simt(), routing, tokens=64, d=512, rank=rank)
    assert forward == {"x": 1.0, "y": 1.0, "out": 1.0}
    fused = rank * (3 if routing == "token" else 1) <= 32  # g is read once where u and the sums of dB share its tiles
    assert backward == {"g": 1.0 if fused else 2.0, "x": 1.0, "dx": 1.0}


@pytest.mark.parametrize("clusters", [False, True])
def test_ldmatrix_has_no_bank_conflicts(clusters):
    simt = Simt(clusters=clusters)
    for run in (
        lambda: _forward(simt, 70, 200, 16),
        lambda: _backward(simt, 70, 200, 16),
        lambda: _backward(simt, 40, 200, 30),
        lambda: _backward(simt, 40, 300, 60),
    ):
        run()
        assert simt.counters["ldmatrix_phases"] == simt.counters["ldmatrix_ideal"] > 0


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("rank", [8, 40])
def test_a_row_has_the_same_bits_whatever_the_number_of_rows(dtype, rank):
    whole = _forward(Simt(), 300, 264, rank, dtype)
    for tokens in (1, 16, 17, 70):
        y, x = (_random(300, 264, seed=s, dtype=dtype)[:tokens].contiguous() for s in (1, 2))
        A, B = _random(rank, 264, seed=3, dtype=dtype) / 264**0.5, _random(264, rank, seed=4, dtype=dtype)
        part = Simt().residual_add(y, x, A, B, 0.5, 0.0, None, True)
        for got, expected in zip(part, whole, strict=True):
            assert torch.equal(got, expected[:tokens])


@pytest.mark.parametrize(("clusters", "rank"), [(False, 12), (True, 12), (True, 40)])
def test_gradients_have_the_same_bits_under_every_schedule(clusters, rank):
    expected = _backward(Simt(seed=0, clusters=clusters), 293, 264, rank)
    for seed in range(1, 4):
        for got, first in zip(
            _backward(Simt(seed=seed, preempt=0.002, clusters=clusters), 293, 264, rank), expected, strict=True
        ):
            assert torch.equal(got, first)


@pytest.mark.slow
@pytest.mark.parametrize("preempt", [0.0, 0.01])
@pytest.mark.parametrize("seed", range(30))
def test_no_false_reports_in_sixty_seeded_runs(seed, preempt):
    for clusters in (False, True):
        simt = Simt(seed=seed, preempt=preempt, clusters=clusters)
        _forward(simt, 37, 200, 12)
        _backward(simt, 69, 200, 12)
        for routing in ("batch", "sample", "token", "static"):
            _routed(simt, routing)
