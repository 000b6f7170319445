"""Nothing is timed before it is right: each provider's results against the float64 reference.

The reference is `lowrank_fast.reference` on the same inputs converted to float64, differentiated by autograd. The
measure is the relative Frobenius error of each named tensor; a NaN, a missing name or a wrong shape is a failure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_fast import reference

from .cases import Inputs

# design section 8: relative bounds by dtype of the activations
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# elements of a chunk of rows: float64 temporaries of this size stay in the cache and are not mapped afresh each time
_CHUNK = 2**18


def _rows(tensor: Tensor) -> int:
    """Rows per chunk of a matrix."""
    return max(1, _CHUNK // max(1, tensor.shape[-1]))


class Wrong(Exception):
    """A provider's numbers are outside the bound; its timings must not be reported."""


def relative_error(got: Tensor, expected: Tensor) -> float:
    """`|got - expected|_F / |expected|_F`, in chunks of rows so that large tensors are not copied whole."""
    if got.shape != expected.shape:
        raise Wrong(f"shape {list(got.shape)}, must be {list(expected.shape)}")
    if expected.dim() < 2:
        got, expected = got.reshape(1, -1), expected.reshape(1, -1)
    error = norm = 0.0
    rows = _rows(expected.flatten(1))
    for a, b in zip(got.split(rows), expected.split(rows), strict=True):
        b = b.double()
        error += float((a.double() - b).square().sum())
        norm += float(b.square().sum())
    return (error**0.5) / (norm**0.5) if norm else error**0.5


class Expected:
    """The float64 truth of one problem, computed when first asked for: `out` alone, or with all gradients."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self._values: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name == "sum" and name not in self._values:
            self._values[name] = self._inputs.y.double() + self._inputs.x.double()
        if name not in self._values:
            self._values |= self._out_only() if name == "out" else self._with_gradients()
        return self._values[name]

    def _out_only(self) -> dict[str, Tensor]:
        i = self._inputs
        if i.problem.family != "residual_add":
            return {"out": _reference(i, *(tensor.double() for tensor in _leaves(i)))}
        A, B = i.A.double(), i.B.double()
        rows = zip(i.y.split(_rows(i.y)), i.x.split(_rows(i.y)), strict=True)
        return {"out": torch.cat([reference.residual_add(y.double(), x.double(), A, B, i.scale) for y, x in rows])}

    def _with_gradients(self) -> dict[str, Tensor]:
        i = self._inputs
        leaves = [tensor.detach().double().requires_grad_() for tensor in _leaves(i)]
        with torch.enable_grad():
            out = _reference(i, *leaves)
            gradients = torch.autograd.grad(out, leaves, i.g.double())
        names = ("dy", "dx", "dA", "dB", "dR")
        return {"out": out.detach(), **dict(zip(names, gradients, strict=False))}


def _leaves(i: Inputs) -> tuple[Tensor, ...]:
    return (i.y, i.x, i.A, i.B) if i.R is None else (i.y, i.x, i.A, i.B, i.R)


def _reference(i: Inputs, y: Tensor, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None = None) -> Tensor:
    p = i.problem
    if p.routing is None:
        return reference.residual_add(y, x, A, B, i.scale)
    return reference.routed_projection(y, x, A, B, R, i.scale, routing=p.routing, router_input=p.router_input)


def check(outputs: dict[str, Tensor], expected: Expected, direction: str, dtype: torch.dtype) -> float:
    """The largest relative error over the tensors of a direction; raises `Wrong` outside the bound of `dtype`.

    `forward_backward` must deliver `out`, `dy`, `dx`, `dA`, `dB` (and `dR` where there is a router), `backward_out`
    `dx`, `dA`, `dB`, every other direction `out`; the floor delivers `sum`, which must be exact to rounding.
    """
    routed = {"dR"} if expected._inputs.R is not None else set()
    required = {
        "forward_backward": {"out", "dy", "dx", "dA", "dB"} | routed,
        "backward_out": {"dx", "dA", "dB"},
    }.get(direction, {"out"})
    names = {"sum"} if set(outputs) == {"sum"} else required
    worst = 0.0
    for name in sorted(names):
        if name not in outputs:
            raise Wrong(f"{name} is missing; got {sorted(outputs)}")
        try:
            error = relative_error(outputs[name], expected[name])
        except Wrong as wrong:
            raise Wrong(f"{name}: {wrong}") from None
        if not error <= BOUNDS[dtype]:
            raise Wrong(
                f"{name} is off by {error:.2e} relative to float64; the bound for {dtype} is {BOUNDS[dtype]:.0e}"
            )
        worst = max(worst, error)
    return worst
