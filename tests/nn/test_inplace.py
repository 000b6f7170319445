"""Where the plain modules must not write in place: what hooks have kept, under tracers, and without memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.module import register_module_forward_hook

from lowrank_fast.methods import LoR2C
from lowrank_fast.nn import ResidualAdapter, RoutedLinear
from lowrank_fast.nn.inplace import hooked, may_update

from .test_plain_modules import Model, filled, x_of


def routed(bias: bool = True, routing: str = "token", experts: int = 3) -> RoutedLinear:
    """On a frozen base, 8 to 6."""
    layer = filled(RoutedLinear(nn.Linear(8, 6, bias), r=2, experts=experts, routing=routing))
    layer.base.requires_grad_(False)
    return layer


class Keeping:
    """A forward hook that keeps what it sees, and a copy to compare it with."""

    def __init__(self) -> None:
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self.seen.append((output, output.detach().clone()))

    def untouched(self) -> bool:
        return len(self.seen) > 0 and all(torch.equal(output, value) for output, value in self.seen)


@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_routed_linear_leaves_alone_what_a_hook_on_its_base_kept(bias: bool, experts: int, everywhere: bool) -> None:
    layer, x, keeping = routed(bias, experts=experts), x_of(2, 5, 8), Keeping()
    expected = layer(x)
    handle = register_module_forward_hook(keeping) if everywhere else layer.base.register_forward_hook(keeping)
    try:
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(layer(x), expected, atol=1e-6)
    finally:
        handle.remove()
    assert keeping.untouched()


def test_hooks_are_found_at_any_depth_and_only_while_they_are_there() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)))
    assert not hooked(model)
    handle = model[1][0].register_forward_hook(Keeping())
    assert hooked(model)
    assert not hooked(model[0])
    handle.remove()
    assert not hooked(model)
    model[0].register_forward_pre_hook(lambda module, args: None)
    assert not hooked(model), "a pre-hook has not seen the output"


class Normed(nn.Module):
    """Like Model, but a block ends in a LayerNorm, as BERT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)
        )
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["inside", "on the block", "on the block, later", "everywhere"])
def test_lor2c_leaves_alone_what_a_hook_kept(where: str, grad: bool) -> None:
    model, x, keeping = Normed(), x_of(2, 5, 8), Keeping()
    last = model.blocks[2]
    if where == "on the block":
        handle = last.register_forward_hook(keeping)
    adapter = filled(LoR2C(model, r=2, layers="blocks"))
    with torch.set_grad_enabled(grad):
        expected = model(x)  # also looks for hooks, and finds none inside
    if where == "inside":
        handle = last[3].register_forward_hook(keeping)
    elif where == "everywhere":
        handle = register_module_forward_hook(keeping)
    elif where == "on the block, later":
        handle = last.register_forward_hook(keeping, prepend=True)
    with torch.set_grad_enabled(grad):
        found = model(x)
    handle.remove()
    assert keeping.untouched()
    assert torch.equal(found, expected)
    assert adapter.enabled


def test_hooks_that_run_after_ours_see_the_update_and_cost_nothing() -> None:
    model, x, keeping = Normed(), x_of(2, 5, 8), Keeping()
    filled(LoR2C(model, r=2, layers="blocks"))
    model.blocks[2].register_forward_hook(keeping)
    with torch.no_grad():
        found = model(x)
    assert keeping.seen[0][0] is found
    hooks = next(iter(model.blocks[2]._forward_hooks.values())).__self__
    assert not hooks.watched(model.blocks[2])


def test_an_injected_projection_leaves_alone_what_a_hook_kept() -> None:
    model, x, keeping = Model(), x_of(6, 8), Keeping()
    adapter = LoR2C(model, r=4, injections=True)
    topology = adapter.topology
    topology.inject(topology.spans[1])
    filled(adapter)
    q = model.blocks[1].q_proj
    before = q(x)
    q.register_forward_hook(keeping, prepend=True)
    with torch.no_grad():
        assert torch.equal(q(x), before)
    assert keeping.untouched()
    assert not torch.equal(keeping.seen[0][0], before)


def test_a_copied_model_looks_for_its_own_hooks() -> None:
    model = Normed()
    model.adapter = filled(LoR2C(model, r=2, layers="blocks"))
    x, keeping = x_of(2, 5, 8), Keeping()
    with torch.no_grad():
        model(x)
        twin = copy.deepcopy(model)
        twin.blocks[2][3].register_forward_hook(keeping)
        assert torch.equal(twin(x), model(x))
    assert keeping.untouched()
    assert len(keeping.seen) == 1


# ------------------------------------------------------------------------------------------------ tracers, no memory


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_jit_trace_follows_the_output(bias: bool, experts: int) -> None:
    layer, x = routed(bias, experts=experts), x_of(2, 5, 8)
    with torch.no_grad():
        traced = torch.jit.trace(layer, (torch.zeros(2, 5, 8),), check_trace=False)
        assert torch.allclose(traced(x), layer(x), atol=1e-6)


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_make_fx_follows_the_output(bias: bool, grad: bool, mode: str) -> None:
    layer, x = routed(bias), x_of(2, 5, 8)
    with torch.set_grad_enabled(grad):
        traced = make_fx(layer, tracing_mode=mode, _allow_non_fake_inputs=True)(torch.zeros(2, 5, 8))
    assert torch.allclose(traced(x), layer(x), atol=1e-6)


def functorch(seen: list[bool]) -> Callable[[torch.Tensor], torch.Tensor]:
    def probe(y: torch.Tensor) -> torch.Tensor:
        seen.append(may_update(y, y + 1))
        return y

    return probe


def test_tensors_without_memory_of_their_own_are_never_updated_in_place() -> None:
    seen: list[bool] = []
    torch.vmap(functorch(seen))(x_of(2, 8))
    torch.func.functionalize(functorch(seen))(x_of(2, 8))
    seen.append(may_update(torch.empty(2, 8, device="meta"), torch.empty(2, 8, device="meta")))
    with FakeTensorMode():
        seen.append(may_update(torch.empty(2, 8), torch.empty(2, 8)))
        assert routed()(torch.empty(2, 5, 8)).shape == (2, 5, 6)
        with torch.no_grad():
            assert ResidualAdapter(8)(torch.empty(2, 8), torch.empty(2, 8)).shape == (2, 8)
    assert seen == [False] * 4


@pytest.mark.parametrize("routing", ["token", "batch"])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 0, 8)])
def test_one_vector_and_no_rows(shape: tuple[int, ...], grad: bool, routing: str) -> None:
    layer = routed(routing=routing)
    with torch.set_grad_enabled(grad):
        out = layer(x_of(*shape))
    assert out.shape == (*shape[:-1], 6)
    if len(shape) == 1:
        assert torch.allclose(out, layer(x_of(*shape)[None])[0], atol=1e-6)
