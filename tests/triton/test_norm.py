"""Residual add with the next norm, in one launch, against float64 and against the norm of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lowrank_fast
from lowrank_fast import triton_backend as backend
from lowrank_fast import use_backend
from lowrank_fast.residual_norm import norm_of

from .arena import Arena
from .cases import close, parameters, truth

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("layer", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_out_and_its_norm_against_float64(arena: Arena, dtype: torch.dtype, layer: bool) -> None:
    v = {name: arena.place(value) for name, value in parameters((2, 11), 70, 150, 5, dtype).items()}
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(150, generator=generator).to(dtype) for _ in range(2))
    y = v["y"].add_(30.0 if layer else 0.0)  # a large mean: squares must not cancel
    out, normed = backend.residual_add_norm(
        y, v["x"], v["A"], v["B"], 0.7, weight, bias if layer else None, 1e-5, layer
    )
    expected = truth("residual_add", y, v["x"], v["A"], v["B"], 0.7, 0.0, None, False)[0]
    close(out, expected, what="out")
    # The norm is of `out` as it was stored, whose rounding it magnifies by the mean over the deviation.
    stored = out.double()
    wide, shift = weight.double(), bias.double()
    if layer:
        right = torch.nn.functional.layer_norm(stored, (150,), wide, shift, 1e-5)
    else:
        right = torch.nn.functional.rms_norm(stored, (150,), wide, 1e-5)
    close(normed, right, what="normed")


def test_wrong_weight_is_named() -> None:
    v = parameters((4,), 8, 6, 2, torch.float32)
    with pytest.raises(ValueError, match=r"weight and bias must be \[d_out=6\]; got \[5\]"):
        backend.residual_add_norm(v["y"], v["x"], v["A"], v["B"], 1.0, torch.ones(5), None, 1e-5, False)


def double(v: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in v.items()}


def composition(v: dict[str, Tensor], kind: str) -> tuple[Tensor, Tensor]:
    out = v["y"] + 0.7 * (v["x"] @ v["A"].T) @ v["B"].T
    return out, norm_of(out, v["weight"], v.get("bias"), 1e-5, kind)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("name", ["triton", "reference"])
def test_public_function_and_its_gradients_against_float64(name: str, kind: str) -> None:
    v = parameters((2, 9), 40, 66, 5, torch.float32)
    generator = torch.Generator().manual_seed(3)
    v |= {one: torch.randn(66, generator=generator) for one in (("weight", "bias") if kind == "layer" else ("weight",))}
    g, h = v.pop("g"), torch.randn(2, 9, 66, generator=generator)
    v.pop("t")
    leaves, exact = {one: value.requires_grad_() for one, value in v.items()}, double(v)
    with use_backend(name):
        ours = lowrank_fast.residual_add_norm(*leaves.values(), scale=0.7, eps=1e-5, kind=kind)
        assert ("ResidualAddNorm" in str(ours[0].grad_fn)) == (name == "triton")
        got = torch.autograd.grad(ours, list(leaves.values()), (g, h))
    right = composition(exact, kind)
    wanted = torch.autograd.grad(right, list(exact.values()), (g.double(), h.double()))
    for one, value, expected in zip(("out", "normed", *leaves), (*ours, *got), (*right, *wanted), strict=True):
        close(value.detach(), expected.detach(), what=one)


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    v = parameters((7,), 12, 20, 3, torch.float32)
    y = v["y"].requires_grad_()
    with use_backend("triton"):
        normed = lowrank_fast.residual_add_norm(y, v["x"], v["A"], v["B"], torch.ones(20))[1]
        normed.sum().backward()
    assert y.grad is not None and all(v[name].grad is None for name in "xAB")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "batch"}, "kind must be one of 'rms', 'layer'; got 'batch'"),
        ({"bias": torch.ones(6)}, "bias must be None with kind='rms'"),
        ({"weight": torch.ones(5)}, r"weight must be \[d_out=6\]; got \[5\]"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, object], message: str) -> None:
    v = parameters((4,), 8, 6, 2, torch.float32)
    with pytest.raises(ValueError, match=f"residual_add_norm: {message}"):
        lowrank_fast.residual_add_norm(v["y"], v["x"], v["A"], v["B"], **{"weight": torch.ones(6)} | settings)
