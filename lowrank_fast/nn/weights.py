"""The trainable tensors of an adapter, each in a module of its own so that several adapters can hold the same one.

    Down  weight [r, d_in]                U(-1/sqrt(d_in), 1/sqrt(d_in)): kaiming_uniform(a = sqrt 5)
    Up    weight [d_out, r]               zeros
    Bank  weight [E, d_out, r], or in PEFT's layout [E r, d_out]; zeros

With `Up` or `Bank` at zero an adapter changes nothing at step 0. Sharing a module instead of a tensor survives
`.to()`, dtype casts and checkpoint loading, which replace Parameters but not modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def integer(owner: str, name: str, value: int, least: int, why: str = "") -> int:
    """`value` if it is an int (no bool) of at least `least`; ValueError otherwise. `why`: of that bound."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{owner}: {name} must be an integer >= {least}{why}; got {value!r}")
    return value


def positive(owner: str, name: str, value: int) -> int:
    """`value` if it is an int of at least 1; ValueError otherwise."""
    return integer(owner, name, value, 1)


def uniform_(weight: Tensor, generator: torch.Generator | None = None) -> None:
    """kaiming_uniform(a = sqrt 5) of a `[out, in]` matrix, which is U(-1/sqrt(in), 1/sqrt(in))."""
    if weight.device.type != "meta":
        bound = 1.0 / math.sqrt(weight.shape[-1])
        with torch.no_grad():
            weight.uniform_(-bound, bound, generator=generator)


class Down(nn.Module):
    """`weight [r, d_in]`, the down projection A (also used for routers, `[E, r]` or `[E, d_in]`)."""

    def __init__(
        self, d_in: int, r: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        positive("Down", "r", r)
        self.weight = nn.Parameter(torch.empty(r, d_in, device=device, dtype=dtype))
        uniform_(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Up(nn.Module):
    """`weight [d_out, r]`, the up projection B, zero at the start."""

    def __init__(
        self, r: int, d_out: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(d_out, positive("Up", "r", r), device=device, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]} -> {self.weight.shape[0]}"


class Bank(nn.Module):
    """E up projections; `bank` is their view `[E, d_out, r]`, whatever the layout of `weight`.

    Args:
        experts, r, d_out: E, rank and output width.
        stacked: store `[E r, d_out]` as PEFT's Lily does, instead of `[E, d_out, r]`.
    """

    def __init__(
        self,
        experts: int,
        r: int,
        d_out: int,
        *,
        stacked: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts = positive("Bank", "experts", experts)
        self.stacked = stacked
        shape = (experts * positive("Bank", "r", r), d_out) if stacked else (experts, d_out, r)
        self.weight = nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))

    @property
    def bank(self) -> Tensor:
        """`[E, d_out, r]`, a view."""
        if not self.stacked:
            return self.weight
        return self.weight.view(self.experts, -1, self.weight.shape[1]).transpose(1, 2)

    def extra_repr(self) -> str:
        experts, d_out, r = self.bank.shape
        return f"{experts} x ({r} -> {d_out})"
