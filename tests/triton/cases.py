"""Random arguments of the ops, and what a result is judged by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_fast import fallback

BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(got: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; NaN counts as infinite."""
    if got.numel() == 0:
        return 0.0
    value = ((got.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
    return value if value == value else float("inf")


def close(
    got: Tensor, truth: Tensor, plain: Tensor | None = None, what: str = "", dtype: torch.dtype | None = None
) -> None:
    """At most twice the error of the same expression in plain PyTorch in the same dtype, and under the dtype's bound.

    An error of one unit in the last place of the result's dtype is always allowed: plain PyTorch may be exact by
    luck. `dtype`: that of the activations, where the result has a wider one.
    """
    assert got.shape == truth.shape, f"{what}: {tuple(got.shape)} instead of {tuple(truth.shape)}"
    found, bound = error(got, truth), BOUND[dtype or got.dtype]
    assert found <= bound, f"{what}: error {found:.2e} over {bound:.0e}"
    if plain is not None:
        allowed = 2.0 * error(plain, truth) + torch.finfo(got.dtype).eps
        assert found <= allowed, f"{what}: error {found:.2e}, twice that of PyTorch is {allowed:.2e}"


def double(value: Any) -> Any:
    """Floating tensors in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def eager_residual(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """The residual add as an eager user writes it, every step in the dtype of `y`."""
    return y + scale * ((x @ A.to(x.dtype).T) @ B.to(x.dtype).T)


def truth(op: str, *arguments: Any) -> Any:
    """The op in float64 by the closed forms that `fallback.py` holds (themselves checked by autograd)."""
    return getattr(fallback, op)(*[double(value) for value in arguments])


def parameters(
    T: tuple[int, ...],
    d_in: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    parameter: torch.dtype | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """`y, x, g, A, B` of a residual add, of unit size throughout."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, size: float = 1.0, kind: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * size).to(kind)

    kind = parameter or dtype
    return {
        "y": normal(*T, d_out),
        "x": normal(*T, d_in),
        "g": normal(*T, d_out),
        "A": normal(rank, d_in, size=d_in**-0.5, kind=kind),
        "B": normal(d_out, rank, size=rank**-0.5, kind=kind),
        "t": normal(*T, rank, kind=torch.float32),
    }


def bank(
    experts: int, d_in: int, d_out: int, rank: int, router_input: str, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """`B`, `R`, `weights`, `active` of a routed projection."""
    generator = torch.Generator().manual_seed(seed + 1)
    width = rank if router_input == "t" else d_in
    active = torch.rand(experts, generator=generator) > 0.4
    return {
        "B": (torch.randn(experts, d_out, rank, generator=generator) * rank**-0.5).to(dtype),
        "R": (torch.randn(experts, width, generator=generator) * width**-0.5).to(dtype),
        "weights": torch.rand(experts, generator=generator),
        "active": active,
    }
