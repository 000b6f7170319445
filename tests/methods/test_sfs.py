"""SFS, the auto rule and the schedule of LoR2C's controller, on plain slots."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast.methods import LoR2CController, sfs
from lowrank_fast.methods.lor2c import Settings, Slot, Topology
from lowrank_fast.methods.lor2c_controller import default_k


def with_spectrum(values: list[float], d: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with `B A` of the given singular values."""
    g = torch.Generator().manual_seed(seed)
    r = len(values)
    u = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, r, generator=g, dtype=torch.float64)).Q
    mix = torch.randn(r, r, generator=g, dtype=torch.float64)  # B M^-1 M A: the factors are not orthogonal
    return torch.linalg.inv(mix) @ v.mT, u * torch.tensor(values, dtype=torch.float64) @ mix


def topology_of(spectra: list[list[float] | None], r: int = 4, d: int = 24) -> Topology:
    """One span per spectrum; None for a branch with B = 0."""
    settings = Settings(r=r, alpha=8.0, lora_r=r // 2)
    slots = [Slot(d, settings, None, None) for _ in spectra]
    for i, (slot, values) in enumerate(zip(slots, spectra, strict=True)):
        if values is not None:
            A, B = with_spectrum(values, d, i)
            slot.down.weight.data.copy_(A)
            slot.up.weight.data.copy_(B)
    return Topology(slots, settings, False)


def spread(x: float) -> list[float]:
    """A spectrum of four with SFS(k=2) = x."""
    return [(1 - x) / 2, (1 - x) / 2, x / 2, x / 2]


@pytest.mark.parametrize("values", [[5.0, 3.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
def test_sfs_is_one_minus_the_share_of_the_largest_singular_values_of_the_full_matrix(values: list[float]) -> None:
    A, B = with_spectrum(values)
    full = torch.linalg.svdvals(B @ A)
    for k in (1, 2, 3):
        assert sfs(A, B, k) == pytest.approx(1 - float(full[:k].sum() / full.sum()), abs=1e-12)


def test_sfs_is_undefined_for_a_branch_that_has_not_moved() -> None:
    A, B = with_spectrum([1.0, 1.0])
    assert sfs(A, torch.zeros_like(B), 1) is None


def test_k_is_two_for_rank_eight_and_half_the_rank_otherwise() -> None:
    assert [default_k(r) for r in (1, 2, 4, 8, 16, 64)] == [1, 1, 2, 2, 8, 32]


def test_the_pair_with_the_lowest_sum_merges_and_the_member_with_the_higher_sfs_survives() -> None:
    topology = topology_of([spread(x) for x in (0.40, 0.10, 0.20, 0.35, 0.30)])
    controller = LoR2CController(topology, max_merges=1, merge_interval=1)
    (event,) = controller.step(1)
    assert event["blocks"] == [[1, 1], [2, 2]]
    assert event["sfs"] == pytest.approx([0.1, 0.2], abs=1e-5)
    assert event["kept"] == 2
    assert [(s.start, s.end, s.home) for s in topology.steady()] == [(0, 0, 0), (1, 2, 2), (3, 3, 3), (4, 4, 4)]


def test_a_tie_goes_to_the_lower_block() -> None:
    topology = topology_of([spread(0.2)] * 4)
    for slot in topology.slots:
        slot.load_state_dict(topology.slots[0].state_dict())
    (event,) = LoR2CController(topology, max_merges=1, merge_interval=1).step(1)
    assert (event["blocks"], event["kept"]) == ([[0, 0], [1, 1]], 0)


def test_merged_spans_merge_again_and_max_span_stops_them() -> None:
    topology = topology_of([spread(x) for x in (0.05, 0.06, 0.07, 0.4)])
    controller = LoR2CController(topology, max_merges=3, merge_interval=1)
    for step in (1, 2, 3):
        controller.step(step)
    assert [(s.start, s.end) for s in topology.steady()] == [(0, 3)]
    limited = topology_of([spread(x) for x in (0.05, 0.06, 0.07, 0.4)])
    controller = LoR2CController(limited, max_merges=3, merge_interval=1, max_span=2)
    for step in (1, 2, 3):
        controller.step(step)
    assert [(s.start, s.end) for s in limited.steady()] == [(0, 1), (2, 3)]


def test_a_branch_that_has_not_moved_is_neither_merged_nor_a_neighbour() -> None:
    topology = topology_of([spread(0.1), None, spread(0.2), None])
    assert LoR2CController(topology, max_merges=2, merge_interval=1).step(1) == []
    assert len(topology.spans) == 4


@pytest.mark.parametrize(("wanted", "total"), [(1, 100), (2, 100), (4, 64), (6, 240)])
def test_events_come_at_the_papers_interval(wanted: int, total: int) -> None:
    topology = topology_of([spread(0.01 * (i + 1)) for i in range(12)])
    controller = LoR2CController(topology, total, max_merges=wanted)
    steps = [event["step"] for step in range(1, total + 1) for event in controller.step(step)]
    interval = int(total / (4 * wanted)) + 1
    assert steps == [interval * (i + 1) for i in range(wanted)]


def test_auto_merges_concentrated_branches_and_leaves_spread_ones_alone() -> None:
    # flat spectrum at r = 4, k = 2: SFS 0.5; threshold 0.25
    topology = topology_of([spread(x) for x in (0.45, 0.10, 0.12, 0.45, 0.20, 0.48)])
    controller = LoR2CController(topology, 400, max_merges="auto")
    for step in range(1, 401):
        controller.step(step)
    assert [(s.start, s.end) for s in topology.steady()] == [(0, 0), (1, 2), (3, 3), (4, 4), (5, 5)]
    even = topology_of([spread(0.45) for _ in range(6)])
    controller = LoR2CController(even, 400, max_merges="auto")
    assert not [event for step in range(1, 401) for event in controller.step(step)]


def test_auto_has_eight_event_points_in_the_first_quarter() -> None:
    topology = topology_of([spread(0.1) for _ in range(12)])
    controller = LoR2CController(topology, 800, max_merges="auto")
    steps = [event["step"] for step in range(1, 801) for event in controller.step(step)]
    assert steps == [26 * (i + 1) for i in range(8)]


def test_the_step_that_ends_a_fade_can_be_the_next_event() -> None:
    topology = topology_of([spread(0.1 * (i + 1)) for i in range(4)])
    controller = LoR2CController(topology, max_merges=2, merge_interval=2, fade_steps=2)
    steps = [event["step"] for step in range(1, 9) for event in controller.step(step)]
    assert steps == [2, 4]
    assert len(topology.steady()) == 2


def test_freed_tensors_leave_the_optimizers_state_but_not_its_groups() -> None:
    topology = topology_of([spread(0.1), spread(0.2), spread(0.4)])
    parameters = [p for slot in topology.slots for p in slot.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = topology.slots[1]
    moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in kept.parameters()}
    LoR2CController(topology, max_merges=1, merge_interval=1, optimizer=optimizer, sfs_k=2).step(1)
    freed = list(topology.slots[0].parameters())
    assert all(p not in optimizer.state and p.numel() == 0 and p.grad is None for p in freed)
    assert [p for group in optimizer.param_groups for p in group["params"]] == parameters
    for p, state in moments.items():
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in state.items())


def test_the_controller_asks_for_what_it_needs() -> None:
    topology = topology_of([spread(0.1), spread(0.2)])
    with pytest.raises(ValueError, match="total_steps must be given"):
        LoR2CController(topology, max_merges=1).step(1)
    with pytest.raises(ValueError, match="no dormant q/v LoRA"):
        LoR2CController(topology, 10, max_injections=1)
    with pytest.raises(ValueError, match=r"sfs_k must be in \[1, r=4\)"):
        LoR2CController(topology, 10, max_merges=1, sfs_k=4)
    with pytest.raises(ValueError, match=r"max_merges must be 'auto' or an integer >= 0; got -1"):
        LoR2CController(topology, 10, max_merges=-1)
    with pytest.raises(ValueError, match="at most the number of blocks, 2"):
        LoR2CController(topology, 10, max_merges=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_interval": 0}, r"merge_interval must be an integer >= 1; got 0"),
        ({"inject_interval": 2.5}, r"inject_interval must be an integer >= 1; got 2.5"),
        ({"fade_steps": 1.5}, r"fade_steps must be an integer >= 0; got 1.5"),
        ({"fade_steps": -1}, r"fade_steps must be an integer >= 0; got -1"),
        ({"max_span": 1}, r"max_span must be an integer >= 2 for a merge, of two blocks; got 1"),
        ({"max_span": True}, r"max_span must be an integer >= 2 for a merge, of two blocks; got True"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_at_once(settings: dict[str, object], message: str) -> None:
    topology = topology_of([spread(0.1), spread(0.2)])
    with pytest.raises(ValueError, match=message):
        LoR2CController(topology, 10, max_merges=1, **settings)  # type: ignore[arg-type]
