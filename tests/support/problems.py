"""One call of an operation with its backward, evaluated three ways: ours on a backend, the same-dtype PyTorch
expression, and the float64 reference. `strategies.py` draws them.

Inputs are normal numbers scaled so that the update is as large as the stream: an error in either shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from lowrank_fast import functional, reference, use_backend

from . import expressions
from .accuracy import INDEPENDENT, Errors, assert_all_accurate, measured
from .memory import laid_out, poisoned_memory
from .targets import device_of, interpreted, one_thread

Results = dict[str, Tensor | None]
# Tiles of the Triton kernels: 16 rows at the least, and 64 values of float32 or 128 of a shorter dtype in a step.
INTERPRETED_TOKENS = 24
INTERPRETED_WIDTHS = {4: 71, 2: 139}


def evaluate(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor], needs: frozenset[str], g: Tensor
) -> Results:
    """`out`, and `d<name>` for each needed gradient (None where autograd has none), of `function(**tensors)`."""
    leaves = {name: value.detach().requires_grad_(name in needs) for name, value in tensors.items()}
    out = function(**leaves)
    results: Results = {"out": out.detach()}
    wanted = [name for name in leaves if name in needs]
    if wanted and out.requires_grad:
        gradients = torch.autograd.grad(out, [leaves[name] for name in wanted], g, allow_unused=True)
    else:
        gradients = (None,) * len(wanted)
    return results | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


@lru_cache(maxsize=4)
def _specified_mask(seed: int, tokens: int, d: int, p: float, device: str) -> Tensor:
    torch.manual_seed(seed)
    return reference.dropout_mask(functional.dropout_seed(torch.device(device)), tokens, d, p)


@dataclass(frozen=True)
class Problem:
    """What all operations share. `layouts` names the memory layout of a tensor; others are contiguous."""

    lead: tuple[int, ...] = (6,)
    d_in: int = 24
    d_out: int = 40
    rank: int = 4
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype = torch.float32
    scale: float = 0.7
    needs: frozenset[str] = frozenset()
    layouts: Mapping[str, str] = field(default_factory=dict)
    dropout_p: float = 0.0
    seed: int = 0

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        """Shape, dtype and standard deviation of every differentiable tensor, in the order of the arguments."""
        return {
            "y": ((*self.lead, self.d_out), self.dtype, 1.0),
            "x": ((*self.lead, self.d_in), self.dtype, 1.0),
            "A": ((self.rank, self.d_in), self.parameter_dtype, 1 / math.sqrt(self.d_in)),
            "B": ((self.d_out, self.rank), self.parameter_dtype, 1 / math.sqrt(self.rank)),
        }

    def tensors(self, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], Tensor]:
        """The differentiable inputs by name, and the gradient `g` of the output."""
        generator = torch.Generator().manual_seed(self.seed)

        def made(name: str, shape: tuple[int, ...], dtype: torch.dtype, deviation: float) -> Tensor:
            values = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(deviation).to(dtype).to(device)
            return laid_out(values, self.layouts.get(name, "contiguous"))

        inputs = {name: made(name, *description) for name, description in self.shapes().items()}
        return inputs, made("g", (*self.lead, self.d_out), self.dtype, 1.0)

    def keep_mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        """The dropout mask that the call seeded with `seed` must use, from the specification of the generator."""
        if self.dropout_p == 0.0:
            return None
        mask = _specified_mask(self.seed, math.prod(self.lead), self.d_in, self.dropout_p, str(device))
        return mask.view(*self.lead, self.d_in)

    def prepared(self, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
        """The public function of the differentiable tensors, its other arguments made."""
        raise NotImplementedError

    def call(self, **tensors: Tensor) -> Tensor:
        """The public function."""
        return self.prepared(tensors["y"].device)(**tensors)

    def expression(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        """The same-dtype PyTorch expression."""
        raise NotImplementedError

    def reference(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        """The float64 reference."""
        raise NotImplementedError

    def ours(self, backend: str) -> Results:
        inputs, g = self.tensors(device_of(backend))
        torch.manual_seed(self.seed)
        with use_backend(backend), poisoned_memory():
            return evaluate(self.call, inputs, self.needs, g)

    @one_thread()
    def eager(self, device: torch.device | str = "cpu") -> Results:
        inputs, g = self.tensors(device)
        keep = self.keep_mask(device)
        return evaluate(lambda **t: self.expression(keep, **t), inputs, self.needs, g)

    @one_thread()
    def truth(self, device: torch.device | str = "cpu") -> Results:
        inputs, g = self.tensors(device)
        keep = self.keep_mask(device)
        exact = {name: value.double() for name, value in inputs.items()}
        return evaluate(lambda **t: self.reference(keep, **t), exact, self.needs, g.double())

    def bottleneck(self) -> int:
        """The fewest independent numbers that a step between inputs and gradients has."""
        tokens = 1 if self.layouts.get("g") == "expanded" else math.prod(self.lead)
        return tokens * self.rank

    def more_draws(self, name: str, backend: str) -> Iterator[Errors]:
        """Errors of the result `name` over as many other draws as it needs to have `INDEPENDENT` numbers."""
        device = device_of(backend)
        shape = (*self.lead, self.d_out) if name == "out" else self.shapes()[name[1:]][0]
        numbers = max(1, min(self.bottleneck(), math.prod(shape)))
        for draw in range(1, math.ceil(INDEPENDENT / numbers)):
            other = self.but(seed=self.seed + draw, needs=self.needs & {name[1:]})
            results = (results[name] for results in (other.ours(backend), other.eager(device), other.truth(device)))
            got, plain, truth = results
            assert got is not None and plain is not None and truth is not None
            yield measured(got, plain, truth)

    def assert_solved_by(self, backend: str) -> None:
        """The backend passes the accuracy rule for the output and every needed gradient."""
        problem, device = self.sized_for(backend), device_of(backend)
        results = problem.ours(backend), problem.eager(device), problem.truth(device)
        assert_all_accurate(*results, self.dtype, lambda name: problem.more_draws(name, backend))

    def sized_for(self, backend: str) -> Problem:
        """The problem itself; for kernels in an interpreter, one whose activations are no larger than a full tile and
        the tail of a second one in every dimension."""
        if not interpreted(backend):
            return self
        longest = max(self.lead, default=1)
        others = math.prod(self.lead) // max(longest, 1)
        fewer = max(1, min(longest, INTERPRETED_TOKENS // max(others, 1)))
        lead, widest = list(self.lead), INTERPRETED_WIDTHS[self.dtype.itemsize]
        if longest > fewer:
            lead[lead.index(longest)] = fewer
        return self.but(lead=tuple(lead), d_in=min(self.d_in, widest), d_out=min(self.d_out, widest))

    def but(self, **changes: object) -> Problem:
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class ResidualAdd(Problem):
    def prepared(self, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
        return partial(functional.residual_add, scale=self.scale, dropout_p=self.dropout_p, training=True)

    def expression(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        return expressions.residual_add(*tensors.values(), self.scale, keep, self.dropout_p)

    def reference(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        return reference.residual_add(*tensors.values(), self.scale, keep, self.dropout_p)


@dataclass(frozen=True)
class Halves(ResidualAdd):
    """`shrink` and `expand_add` one after the other: what `residual_add` computes, in two calls."""

    def prepared(self, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
        def both(y: Tensor, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
            t = functional.shrink(x, A, dropout_p=self.dropout_p, training=True)
            return functional.expand_add(y, t, B, self.scale)

        return both


@dataclass(frozen=True)
class Routed(Problem):
    """`masked` leaves out tokens of the means; `active` is the masked gradient, a tuple of bools or one bool."""

    experts: int = 3
    routing: str = "batch"
    router_input: str = "t"
    masked: bool = False
    active: tuple[bool, ...] | bool | None = None

    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, float]]:
        shapes = super().shapes()
        _, dtype, deviation = shapes["B"]
        shapes["B"] = ((self.experts, self.d_out, self.rank), dtype, deviation)
        if self.routing == "static":
            shapes["weights"] = ((self.experts,), torch.float32, 1.0)
        else:
            width = self.rank if self.router_input == "t" else self.d_in
            shapes["R"] = ((self.experts, width), self.parameter_dtype, 1 / math.sqrt(width))
        return shapes

    def token_mask(self, device: torch.device | str = "cpu") -> Tensor | None:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (torch.rand(self.lead, generator=generator) < 0.6).to(device) if self.masked else None

    def bottleneck(self) -> int:
        mixing = self.experts - 1  # probabilities add up to 1
        if isinstance(self.active, tuple):  # the gradient of the bank sees the weights of these
            mixing = min(mixing, max(1, sum(self.active)))
        if self.routing == "static" or mixing == 0:
            return super().bottleneck()
        kept = self.token_mask()
        tokens = math.prod(self.lead) if kept is None or self.routing == "token" else int(kept.sum())
        sets_of_weights = {"batch": 1, "sample": math.prod(self.lead[:1]), "token": tokens}[self.routing]
        return min(super().bottleneck(), min(sets_of_weights, tokens) * mixing)

    def active_experts(self, device: torch.device | str = "cpu") -> Tensor | bool | None:
        return torch.tensor(self.active, device=device) if isinstance(self.active, tuple) else self.active

    def prepared(self, device: torch.device | str = "cpu") -> Callable[..., Tensor]:
        return partial(
            functional.routed_projection,
            scale=self.scale,
            routing=self.routing,
            router_input=self.router_input,
            token_mask=self.token_mask(device),
            active=self.active_experts(device),
            dropout_p=self.dropout_p,
            training=True,
        )

    def _frozen_as_published(self, B: Tensor) -> Tensor:
        """A frozen expert is a constant to autograd; with `active=False` the bank is, and its gradient None."""
        if self.active is None or self.active is True:
            return B
        if self.active is False:
            return B.detach()
        trains = torch.tensor(self.active, device=B.device)[:, None, None]
        return torch.where(trains, B, B.detach())

    def expression(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        y, x, A, B = (tensors[name] for name in ("y", "x", "A", "B"))
        return expressions.routed_projection(
            y,
            x,
            A,
            self._frozen_as_published(B),
            tensors.get("R"),
            tensors.get("weights"),
            self.scale,
            self.routing,
            self.router_input,
            self.token_mask(y.device),
            keep,
            self.dropout_p,
        )

    def reference(self, keep: Tensor | None, **tensors: Tensor) -> Tensor:
        y, x, A, B = (tensors[name] for name in ("y", "x", "A", "B"))
        return reference.routed_projection(
            y,
            x,
            A,
            self._frozen_as_published(B),
            tensors.get("R"),
            self.scale,
            routing=self.routing,
            router_input=self.router_input,
            weights=tensors.get("weights"),
            token_mask=self.token_mask(y.device),
            mask=keep,
            dropout_p=self.dropout_p,
        )
