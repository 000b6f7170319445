"""Residual add with the next norm, in one launch, against float64 and against the norm of PyTorch."""

from __future__ import annotations

import pytest
import torch

from lowrank_fast import triton_backend as backend

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


def test_a_rank_that_one_launch_does_not_take() -> None:
    v = parameters((5,), 30, 40, 130, torch.float32)
    out, normed = backend.residual_add_norm(v["y"], v["x"], v["A"], v["B"], 0.7, torch.ones(40), None, 1e-5, False)
    expected = truth("residual_add", v["y"], v["x"], v["A"], v["B"], 0.7, 0.0, None, False)[0]
    close(out, expected, what="out")
    close(normed, torch.nn.functional.rms_norm(expected, (40,), eps=1e-5), what="normed")
