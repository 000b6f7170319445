"""The plain modules: zero at first, equal to their formulas, shared tensors once in state dicts and files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lowrank_fast.methods import LoR2C, LoR2CController, Reducer
from lowrank_fast.nn import (
    Bank,
    Down,
    ResidualAdapter,
    RoutedLinear,
    load_shared,
    load_shared_state_dict,
    save_shared,
    shared_state_dict,
)
from lowrank_fast.nn.inplace import may_update


def filled(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4))


def test_residual_adapter_is_its_formula_and_zero_at_first() -> None:
    adapter = ResidualAdapter(12, 9, r=3, alpha=6.0)
    x, y = x_of(2, 5, 12), x_of(2, 5, 9)
    assert torch.equal(adapter(y.clone(), x), y)
    filled(adapter)
    expected = y + 2.0 * x @ adapter.down.weight.mT @ adapter.up.weight.mT
    assert torch.allclose(adapter(y.clone(), x), expected, atol=1e-6)


@pytest.mark.parametrize("router_input", ["t", "x"])
@pytest.mark.parametrize("routing", ["token", "sample", "batch"])
@pytest.mark.parametrize("bias", [True, False])
def test_routed_linear_is_its_formula_in_place_or_not(routing: str, router_input: str, bias: bool) -> None:
    layer = filled(RoutedLinear(nn.Linear(12, 9, bias), r=3, experts=4, routing=routing, router_input=router_input))
    x = x_of(2, 5, 12)
    t = x @ layer.down.weight.mT
    p = torch.softmax((t if router_input == "t" else x) @ layer.router.weight.mT, -1)
    w = {"token": p, "sample": p.mean(1, keepdim=True), "batch": p.mean((0, 1))}[routing]
    expected = layer.base(x) + torch.einsum("bte,btr,eor->bto", w.expand_as(p), t, layer.bank.bank)
    assert torch.allclose(layer(x), expected, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected, atol=1e-5)


def test_one_expert_needs_no_router() -> None:
    layer = filled(RoutedLinear(nn.Linear(12, 9), r=3, experts=1, scale=0.5))
    assert layer.router is None
    x = x_of(5, 12)
    expected = layer.base(x) + 0.5 * x @ layer.down.weight.mT @ layer.bank.bank[0].mT
    assert torch.allclose(layer(x), expected, atol=1e-6)


class Stack(nn.Module):
    """Three routed linears that share A and bank, and a residual adapter."""

    def __init__(self, r: int = 3) -> None:
        super().__init__()
        down, bank = Down(8, r), Bank(2, r, 8, stacked=True)
        self.layers = nn.ModuleList(
            RoutedLinear(nn.Linear(8, 8), r=r, experts=2, down=down, bank=bank) for _ in range(3)
        )
        self.adapter = ResidualAdapter(8, r=r, down=down)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return self.adapter(y, x)


def test_shared_tensors_stand_once_in_state_dicts_and_files(tmp_path: Path) -> None:
    stack, x = filled(Stack()), x_of(4, 8)
    state = shared_state_dict(stack)
    assert len(state) == len({t.data_ptr() for t in state.values()})
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in stack.parameters())
    assert len(state) < len(stack.state_dict())
    save_shared(stack, tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(state)
    assert [f.name for f in tmp_path.iterdir()] == ["a.safetensors"]
    twin = filled(Stack(), seed=1)
    load_shared(twin, tmp_path / "a.safetensors")
    assert torch.equal(twin(x), stack(x))
    assert twin.layers[0].down is twin.layers[2].down


def test_the_duplicated_form_loads_and_disagreeing_copies_do_not() -> None:
    stack, twin = filled(Stack()), filled(Stack(), seed=1)
    full = {k: v.clone() for k, v in stack.state_dict().items()}
    load_shared_state_dict(twin, full)
    assert all(torch.equal(a, b) for a, b in zip(twin.parameters(), stack.parameters(), strict=True))
    full["layers.1.down.weight"] += 1
    with pytest.raises(ValueError, match=r"layers.1.down.weight must equal layers.0.down.weight"):
        load_shared_state_dict(twin, full)


@pytest.mark.parametrize("problem", ["is missing", "does not belong there", r"must be \[2, 3\], got \[2, 4\]"])
def test_bad_state_dicts_change_nothing(problem: str) -> None:
    stack = filled(Stack())
    state = {k: v.clone() + 1 for k, v in shared_state_dict(stack).items()}
    if "missing" in problem:
        del state["layers.0.router.weight"]
    elif "belong" in problem:
        state["layers.7.router.weight"] = torch.zeros(2, 3)
    else:
        state["layers.0.router.weight"] = torch.zeros(2, 4)
    before = [p.clone() for p in stack.parameters()]
    with pytest.raises(ValueError, match=problem):
        load_shared_state_dict(stack, state)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResidualAdapter(8, r=0), "r must be an integer >= 1; got 0"),
        (lambda: ResidualAdapter(8, dropout=1.0), r"dropout must be in \[0, 1\); got 1.0"),
        (lambda: ResidualAdapter(8, r=2, down=Down(8, 3)), r"down must hold \(2, 8\); got \(3, 8\)"),
        (lambda: RoutedLinear(nn.Linear(4, 4), experts=0), "experts must be an integer >= 1; got 0"),
        (lambda: RoutedLinear(nn.Linear(4, 4), routing="static"), "routing must be 'batch', 'sample' or 'token'"),
        (lambda: RoutedLinear(nn.Linear(4, 4), router_input="y"), "router_input must be 't' or 'x'; got 'y'"),
        (
            lambda: RoutedLinear(nn.Linear(4, 4), r=2, bank=Bank(3, 2, 4)),
            r"bank must hold \(4, 4, 2\); got \(3, 4, 2\)",
        ),
    ],
)
def test_settings_that_cannot_be(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_only_outputs_that_autograd_did_not_save_are_updated_in_place() -> None:
    x = x_of(3, 8).requires_grad_()
    linear = nn.Linear(8, 8, bias=False).requires_grad_(False)
    assert may_update(linear(x) + x, x)
    assert may_update(linear(x), x)
    assert may_update(nn.functional.layer_norm(x, (8,)), x)
    for saved in (torch.tanh(x), torch.softmax(x, -1), torch.exp(x), torch.sigmoid(x), torch.relu(x)):
        assert not may_update(saved, x)
    assert not may_update(x, x), "the input itself"
    assert not may_update(linear(x)[:, :4], x), "a view"
    assert not may_update(x.detach(), x), "shares memory with the input"
    with torch.no_grad():
        assert may_update(torch.tanh(x), x), "nothing is recorded"


class Block(nn.Module):
    """A pre-norm block."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.q_proj, self.v_proj = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.q_proj(h)) * self.v_proj(h)


class Model(nn.Module):
    """Four blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8) for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_lor2c_on_a_plain_model_trains_merges_injects_and_comes_off(tmp_path: Path) -> None:
    model, x, target = Model(), x_of(6, 8), x_of(6, 8).flip(0)
    plain = model(x)
    adapter = LoR2C(model, r=4, injections=True)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=3e-2)
    controller = LoR2CController(adapter, 12, max_merges=1, max_injections=1, optimizer=optimizer)
    losses = []
    for step in range(1, 13):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        controller.step(step)
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert [e["kind"] for e in controller.history] == ["merge", "inject"]
    adapter.enabled = False
    assert torch.equal(model(x), plain)
    adapter.enabled = True
    assert not torch.equal(model(x), plain)
    adapter.remove()
    assert torch.equal(model(x), plain)


def test_the_reducer_drives_plain_routed_linears() -> None:
    layers = {
        f"blocks.{i}.proj": filled(RoutedLinear(nn.Linear(8, 8), r=2, experts=2, router_input="x")) for i in range(8)
    }
    model = nn.Sequential(*layers.values())
    for layer in layers.values():
        layer.base.requires_grad_(False)
    reducer = Reducer(model, layers, importance="gradient", interval=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for n in range(7):
        active = reducer.begin_step(n)
        before = {name: layer.bank.weight.detach().clone() for name, layer in layers.items()}
        model(x_of(5, 8)).square().mean().backward()
        reducer.end_backward(n)
        optimizer.step()
        optimizer.zero_grad()
        moved = {
            f"layer {name.split('.')[1]}" for name in layers if not torch.equal(layers[name].bank.weight, before[name])
        }
        assert moved == set(active)
    assert len(active) == 2
