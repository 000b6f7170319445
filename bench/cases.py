"""A problem (op, shapes, dtype), its seeded inputs, and a case: a problem in one direction.

Inputs are normal random numbers, scaled so that the update is as large as the stream it is added to and the router's
logits are of order one: an all-zero or vanishing update would hide errors and, on some hardware, run faster.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SCALE = 1.5

# direction -> what is timed
DIRECTIONS = {
    "forward": "forward, output allocated in the call",
    "forward_out": "forward into a preallocated output (out=)",
    "forward_inplace": "forward in place (inference)",
    "backward_out": "backward alone, op level, into preallocated gradients",
    "forward_backward": "forward and backward through autograd",
}


@dataclass(frozen=True)
class Problem:
    """`op`: "residual_add" or "routed_projection"; `routing`: "batch" (router on t), "token" (router on x) or None."""

    op: str
    dtype: torch.dtype
    tokens: int
    d_in: int
    d_out: int
    rank: int
    experts: int | None = None
    routing: str | None = None

    @property
    def family(self) -> str:
        """Which expressions apply: "residual_add", "routed_batch" or "routed_token"."""
        return self.op if self.routing is None else f"routed_{self.routing}"

    @property
    def router_input(self) -> str:
        return "t" if self.routing == "batch" else "x"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def fields(self) -> dict[str, object]:
        """The problem as the fields of a record."""
        return {
            "op": self.op,
            "dtype": self.dtype_name,
            "T": self.tokens,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "r": self.rank,
            "E": self.experts,
            "routing": self.routing,
        }

    def describe(self) -> str:
        experts = "" if self.experts is None else f" E={self.experts}"
        width = f"{self.d_in}" if self.d_in == self.d_out else f"{self.d_in}->{self.d_out}"
        return f"{self.family} {self.dtype_name} {self.tokens}x{width} r={self.rank}{experts}"


def residual(dtype: torch.dtype, tokens: int, d: int, rank: int) -> Problem:
    """LoR2C's residual add, square."""
    return Problem("residual_add", dtype, tokens, d, d, rank)


def routed(routing: str, dtype: torch.dtype, tokens: int, d: int, rank: int, experts: int = 4) -> Problem:
    """Lily's ("batch") or HydraLoRA's and EffiLoRA's ("token") projection, square."""
    return Problem("routed_projection", dtype, tokens, d, d, rank, experts, routing)


@dataclass(frozen=True)
class Case:
    problem: Problem
    direction: str
    suite: str = "ops"

    def describe(self) -> str:
        return f"{self.problem.describe()} {self.direction.replace('_', ' ')}"


class Inputs:
    """The tensors of one problem, shared by all its providers so that none has a warmer cache than another.

    `x [T, d_in]`, `y [T, d_out]`, `A [r, d_in]`, `B [d_out, r]`; routed: a bank `B [E, d_out, r]` and a router
    `R [E, r]` or `[E, d_in]`. Batch routing stores the bank as PEFT's Lily does, `bank [E r, d_out]`, and `B` is a view
    of it. `g [T, d_out]` is the gradient of the output; `out` and `work` are buffers to be written into. The numbers
    are the same on every device.
    """

    scale = SCALE

    def __init__(self, problem: Problem, device: torch.device | str = "cpu") -> None:
        p = self.problem = problem
        self.device = device
        self._random = torch.Generator().manual_seed(zlib.crc32(repr(problem).encode()))
        self.x = self._normal(p.tokens, p.d_in)
        self.y = self._normal(p.tokens, p.d_out)
        self.A = self._normal(p.rank, p.d_in, by=p.d_in**-0.5)
        self.R: Tensor | None = None
        if p.experts is None:
            self.B = self._normal(p.d_out, p.rank, by=p.rank**-0.5)
        elif p.routing == "batch":
            self.bank = self._normal(p.experts * p.rank, p.d_out, by=p.rank**-0.5)
            self.B = self.bank.view(p.experts, p.rank, p.d_out).transpose(1, 2)
            self.R = self._normal(p.experts, p.rank, by=p.rank**-0.5)
        else:
            self.B = self._normal(p.experts, p.d_out, p.rank, by=p.rank**-0.5)
            self.R = self._normal(p.experts, p.d_in, by=p.d_in**-0.5)

    def _normal(self, *shape: int, by: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self._random) * by).to(self.device, self.problem.dtype)

    @cached_property
    def g(self) -> Tensor:
        return self._normal(self.problem.tokens, self.problem.d_out)

    @cached_property
    def out(self) -> Tensor:
        return torch.empty_like(self.y)

    @cached_property
    def work(self) -> Tensor:
        return self.y.clone()
