"""Spans over several blocks where checkpoints recompute blocks, hooks included: the right `t`, or a clear error."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_fast.methods import LoR2C

D = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Net(nn.Module):
    """Three blocks, run by `run(blocks, h)`."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.run = run

    def forward(self, h: Tensor) -> Tensor:
        return self.run(self.blocks, h)


def plain(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in blocks:
        h = block(h)
    return h


def each_block(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in blocks:
        h = checkpoint(block, h, use_reentrant=False)
    return h


def first_two_together(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return blocks[2](checkpoint(lambda x: blocks[1](blocks[0](x)), h, use_reentrant=False))


def last_two_together(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return checkpoint(lambda x: blocks[2](blocks[1](x)), blocks[0](h), use_reentrant=False)


def each_within_all(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return checkpoint(lambda x: each_block(blocks, x), h, use_reentrant=False)


def all_reentrant(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return checkpoint(lambda x: plain(blocks, x), h, use_reentrant=True)


def with_something_before(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in blocks:
        h = checkpoint(lambda x, b=block: b(2.0 * x), h, use_reentrant=False)
    return h


def adapted(run: Callable[[nn.ModuleList, Tensor], Tensor], last: int = 1) -> tuple[Net, LoR2C]:
    """A frozen net and its adapter, with one span over blocks 0 to `last`."""
    torch.manual_seed(0)
    net = Net(run).requires_grad_(False)
    adapter = LoR2C(net, r=4)
    topology = adapter.topology
    for _ in range(last):
        topology.merge(topology.spans[0], topology.spans[1], topology.spans[0])
    topology.retire_unused()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return net, adapter


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 5, D, generator=generator).unbind()
    return x.requires_grad_(), y.requires_grad_()


def two_forwards(net: Net) -> Tensor:
    x, y = inputs()
    return net(x).square().sum() + net(y).square().sum()


def evaluation_between(net: Net) -> Tensor:
    x, y = inputs()
    loss = net(x).square().sum()
    with torch.no_grad():
        net(y)
    return loss


def gradients(adapter: LoR2C, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [two_forwards, evaluation_between])
@pytest.mark.parametrize(
    "run", [each_block, first_two_together, last_two_together, each_within_all, all_reentrant],
)  # fmt: skip
@pytest.mark.parametrize("last", [1, 2])
def test_a_recomputed_block_finds_the_t_of_its_own_forward(
    last: int, run: Callable[[nn.ModuleList, Tensor], Tensor], loss: Callable[[Net], Tensor]
) -> None:
    net, adapter = adapted(plain, last)
    expected = gradients(adapter, loss(net))
    net, adapter = adapted(run, last)
    found = gradients(adapter, loss(net))
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6), name


def test_a_block_recomputed_from_another_tensor_is_a_clear_error_and_no_wrong_gradient() -> None:
    net, _ = adapted(with_something_before)
    with pytest.raises(RuntimeError, match=r"from block 0 to 1 would lose its gradient.*another tensor"):
        two_forwards(net).backward()


def test_a_span_whose_first_block_was_skipped_is_a_clear_error() -> None:
    net, _ = adapted(lambda blocks, h: blocks[2](blocks[1](h)))
    with pytest.raises(RuntimeError, match="block 0 must run before block 1"):
        net(inputs()[0])


@pytest.mark.parametrize("run", [plain, each_block, first_two_together, each_within_all, all_reentrant])
def test_what_is_carried_goes_with_the_tensors_of_its_forward(run: Callable[[nn.ModuleList, Tensor], Tensor]) -> None:
    net, adapter = adapted(run)
    carried = adapter.topology.carried
    x = inputs()[0]
    with torch.no_grad():
        net(x)
    assert carried.held() == 0
    loss = net(x).square().sum()
    if run is each_block:
        assert carried.held() > 0, "blocks are still to be recomputed"
        assert copy.deepcopy(carried).held() == 0
    loss.backward()
    del loss, x
    gc.collect()
    assert carried.held() == 0
