"""Which provider measures which op in which direction: one table, `PROVIDERS`.

A provider offers a builder per (family, direction). A builder takes the shared `Inputs`, prepares everything that the
provider may prepare (layouts, scratch, leaves that require grad, compilation) and returns the call to time, a way to
name its results for the correctness gate, and a reset that undoes or poisons what the call overwrites.

Backward is timed through `torch.autograd.grad`, which returns fresh gradients: nothing accumulates, nothing is reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_fast import _native
from lowrank_fast import functional as F

from . import expressions as ex
from .cases import Inputs, Problem

Named = dict[str, Tensor]
Parameters = Callable[[Inputs], tuple[Tensor, ...]]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Prepared:
    """`call` is timed; `outputs` names the tensors in its result; `reset` runs before the gate's call only."""

    call: Callable[[], Any]
    outputs: Callable[[Any], Named]
    reset: Callable[[], None] = _nothing


Builder = Callable[[Inputs], Prepared]


@dataclass(frozen=True)
class Provider:
    """`builders` maps (family, direction) to a builder; families are those of `cases.Problem.family`."""

    name: str
    label: str
    builders: Mapping[tuple[str, str], Builder] = field(repr=False)


# ------------------------------------------------------------------------------------------------ parameter layouts


@dataclass(frozen=True)
class Layout:
    """How a provider stores the parameters, and how gradients in that layout map to `dA, dB, dR`."""

    parameters: Parameters
    canonical: Callable[[Problem, tuple[Tensor, ...]], Named]


def _bank_view(problem: Problem, bank: Tensor) -> Tensor:
    """PEFT's `[E r, d_out]` as `[E, d_out, r]`."""
    assert problem.experts is not None
    return bank.view(problem.experts, problem.rank, -1).transpose(1, 2)


def _split_concat(problem: Problem, grads: tuple[Tensor, ...]) -> Named:
    dAR, dbank = grads
    return {"dA": dAR[: problem.rank], "dR": dAR[problem.rank :], "dB": dbank.transpose(1, 2)}


def _router(i: Inputs) -> Tensor:
    assert i.R is not None
    return i.R


PLAIN = Layout(lambda i: (i.A, i.B), lambda p, d: {"dA": d[0], "dB": d[1]})
BANK_VIEW = Layout(lambda i: (i.A, _router(i), i.B), lambda p, d: {"dA": d[0], "dR": d[1], "dB": d[2]})
PEFT_BANK = Layout(
    lambda i: (i.A, _router(i), i.bank), lambda p, d: {"dA": d[0], "dR": d[1], "dB": _bank_view(p, d[2])}
)
EXPERT_LIST = Layout(
    lambda i: (i.A, _router(i), *(B.contiguous() for B in i.B)),
    lambda p, d: {"dA": d[0], "dR": d[1], "dB": torch.stack(d[2:])},
)
CONCAT = Layout(
    lambda i: (torch.cat([i.A, _router(i)]), i.B.transpose(1, 2).contiguous()),
    _split_concat,
)


# ------------------------------------------------------------------------------------------------ directions


def _compiled(apply: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(apply, fullgraph=True, dynamic=False)


def _scratch_t(i: Inputs) -> tuple[Tensor, ...]:
    return (i.x.new_empty(i.problem.tokens, i.problem.rank),)


def _no_scratch(i: Inputs) -> tuple[Tensor, ...]:
    return ()


def forward(layout: Layout, apply: Callable[..., Tensor], compiled: bool = False) -> Builder:
    """Times `apply(y, x, *parameters, s)`."""

    def build(i: Inputs) -> Prepared:
        run, parameters = _compiled(apply) if compiled else apply, layout.parameters(i)
        y, x, s = i.y, i.x, i.scale
        return Prepared(lambda: run(y, x, *parameters, s), lambda result: {"out": result})

    return build


def forward_out(
    layout: Layout, apply: Callable[..., Tensor], scratch: Parameters = _no_scratch, compiled: bool = False
) -> Builder:
    """Times `apply(y, x, *parameters, s, out, *scratch)`."""

    def build(i: Inputs) -> Prepared:
        run, parameters, extra = _compiled(apply) if compiled else apply, layout.parameters(i), scratch(i)
        y, x, s, out = i.y, i.x, i.scale, i.out
        return Prepared(
            lambda: run(y, x, *parameters, s, out, *extra),
            lambda result: {"out": out},
            lambda: _poison(out, *extra),
        )

    return build


def forward_inplace(
    layout: Layout, apply: Callable[..., Tensor], scratch: Parameters = _no_scratch, compiled: bool = False
) -> Builder:
    """Times `apply(work, x, *parameters, s, *scratch)`, which adds to `work` once more in every call."""

    def build(i: Inputs) -> Prepared:
        run, parameters, extra = _compiled(apply) if compiled else apply, layout.parameters(i), scratch(i)
        work, x, s = i.work, i.x, i.scale
        return Prepared(
            lambda: run(work, x, *parameters, s, *extra),
            lambda result: {"out": work},
            lambda: _start_over(i, *extra),
        )

    return build


def forward_backward(layout: Layout, apply: Callable[..., Tensor], compiled: bool = False) -> Builder:
    """Times the forward and `torch.autograd.grad` of it with respect to `y`, `x` and every parameter."""

    def build(i: Inputs) -> Prepared:
        run = _compiled(apply) if compiled else apply
        y, x, *parameters = (tensor.detach().requires_grad_() for tensor in (i.y, i.x, *layout.parameters(i)))
        leaves, s, g = (y, x, *parameters), i.scale, i.g

        def call() -> tuple[Tensor, tuple[Tensor, ...]]:
            out = run(y, x, *parameters, s)
            return out, torch.autograd.grad(out, leaves, g)

        def outputs(result: tuple[Tensor, tuple[Tensor, ...]]) -> Named:
            out, (dy, dx, *rest) = result
            return {"out": out.detach(), "dy": dy, "dx": dx, **layout.canonical(i.problem, tuple(rest))}

        return Prepared(call, outputs)

    return build


def _poison(*buffers: Tensor) -> None:
    for buffer in buffers:
        buffer.fill_(float("nan"))


def _start_over(i: Inputs, *scratch: Tensor) -> None:
    i.work.copy_(i.y)
    _poison(*scratch)


# ------------------------------------------------------------------------------------------------ backward alone


def _gradient_buffers(i: Inputs) -> ex.Gradients:
    return torch.empty_like(i.x), torch.empty_like(i.A), torch.empty_like(i.B)


def _name_gradients(result: tuple[Tensor, ...]) -> Named:
    return dict(zip(("dx", "dA", "dB"), result, strict=True))


def _ours_backward(i: Inputs) -> Prepared:
    """The op that the autograd Function ends in, with the `t` that the forward op kept."""
    ops = torch.ops.lowrank_fast
    _, t = ops.residual_add(i.y, i.x, i.A, i.B, i.scale, 0.0, None, True)
    arguments, into = (i.g, i.x, t, i.A, i.B, i.scale, 0.0, None), _gradient_buffers(i)
    dx, dA, dB = into
    op = ops.residual_add_backward_out.default
    return Prepared(
        lambda: op(*arguments, dx=dx, dA=dA, dB=dB), lambda result: _name_gradients(into), lambda: _poison(*into)
    )


def _manual_backward(run: Callable[..., ex.Gradients], transposed: bool) -> Builder:
    def build(i: Inputs) -> Prepared:
        ts, Bs = (i.x @ i.A.T) * i.scale, i.B * i.scale
        into, (u,) = _gradient_buffers(i), _scratch_t(i)
        extra = (torch.empty_like(i.B.T),) if transposed else ()
        return Prepared(
            lambda: run(i.g, i.x, ts, i.A, Bs, into, u, *extra), _name_gradients, lambda: _poison(*into, u, *extra)
        )

    return build


# ------------------------------------------------------------------------------------------------ ours


def _ours_batch(y: Tensor, x: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float) -> Tensor:
    return F.routed_projection(y, x, A, B, R, s, routing="batch", router_input="t")


def _ours_batch_inplace(y: Tensor, x: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float) -> Tensor:
    return F.routed_projection(y, x, A, B, R, s, routing="batch", router_input="t", inplace=True)


def _ours_token(y: Tensor, x: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float) -> Tensor:
    return F.routed_projection(y, x, A, B, R, s, routing="token", router_input="x")


def _ours_token_inplace(y: Tensor, x: Tensor, A: Tensor, R: Tensor, B: Tensor, s: float) -> Tensor:
    return F.routed_projection(y, x, A, B, R, s, routing="token", router_input="x", inplace=True)


def _ours_out(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float, out: Tensor) -> Tensor:
    return F.residual_add(y, x, A, B, s, out=out)


def _ours_inplace(y: Tensor, x: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    return F.residual_add(y, x, A, B, s, inplace=True)


# ------------------------------------------------------------------------------------------------ the two limits

FLOOR, ARITHMETIC = "floor", "arithmetic"
LIMITS = (FLOOR, ARITHMETIC)  # what no provider can beat, measured in the same rounds; not rivals


def _floor(direction: str) -> Builder:
    """`torch.add`: two streams read, one written, at the speed of this machine's memory.

    Into `out`, or in place; for forward and backward together twice, since each must move three passes.
    """

    def build(i: Inputs) -> Prepared:
        y, x = i.y, i.x
        out = i.work if direction == "forward_inplace" else i.out
        left = out if direction == "forward_inplace" else y

        def once() -> Tensor:
            return torch.add(left, x, out=out)

        def twice() -> Tensor:
            torch.add(y, x, out=out)
            return torch.add(y, x, out=out)

        reset = (lambda: _start_over(i)) if direction == "forward_inplace" else (lambda: _poison(out))
        return Prepared(twice if direction == "forward_backward" else once, lambda result: {"sum": out}, reset)

    return build


def multiply_adds(problem: Problem, direction: str) -> int:
    """The multiply-adds of the matrix products with x, y, g and dx that the direction cannot do without."""
    ranks_in = problem.rank + (problem.experts or 0 if problem.router_input == "x" else 0)
    ranks_out = problem.rank * (problem.experts or 1 if problem.routing == "token" else 1)
    once = problem.tokens * (problem.d_in * ranks_in + problem.d_out * ranks_out)
    return once * {"backward_out": 2, "forward_backward": 3}.get(direction, 1)


def _arithmetic(direction: str) -> Builder:
    """As many multiply-adds as the call needs, on registers: the clock and ports of this machine, without memory."""

    def build(i: Inputs) -> Prepared:
        count, bfloat16 = multiply_adds(i.problem, direction), i.problem.dtype is torch.bfloat16
        extension = _native.module()
        if extension is None or not extension.multiply_add(1, bfloat16):
            raise NotImplementedError("no kernels, or kernels that multiply with more than vector registers")

        def call() -> None:
            extension.multiply_add(count, bfloat16)

        return Prepared(call, lambda result: {})

    return build


def _limits(builder: Callable[[str], Builder]) -> dict[tuple[str, str], Builder]:
    routed = ("forward", "forward_inplace", "forward_backward")
    directions = {
        "residual_add": ("forward", "forward_out", "forward_inplace", "backward_out", "forward_backward"),
        "routed_batch": routed,
        "routed_token": routed,
    }
    return {(family, d): builder(d) for family, ds in directions.items() for d in ds}


# ------------------------------------------------------------------------------------------------ the table

_R, _B, _T = "residual_add", "routed_batch", "routed_token"
_FWD, _OUT, _IN, _BWD, _FB = "forward", "forward_out", "forward_inplace", "backward_out", "forward_backward"

PROVIDERS: tuple[Provider, ...] = (
    Provider(
        "ours",
        "lowrank_fast",
        {
            (_R, _FWD): forward(PLAIN, F.residual_add),
            (_R, _OUT): forward_out(PLAIN, _ours_out),
            (_R, _IN): forward_inplace(PLAIN, _ours_inplace),
            (_R, _BWD): _ours_backward,
            (_R, _FB): forward_backward(PLAIN, F.residual_add),
            (_B, _FWD): forward(BANK_VIEW, _ours_batch),
            (_B, _IN): forward_inplace(BANK_VIEW, _ours_batch_inplace),
            (_B, _FB): forward_backward(BANK_VIEW, _ours_batch),
            (_T, _FWD): forward(BANK_VIEW, _ours_token),
            (_T, _IN): forward_inplace(BANK_VIEW, _ours_token_inplace),
            (_T, _FB): forward_backward(BANK_VIEW, _ours_token),
        },
    ),
    Provider(
        "addmm",
        "hand-written: mm + addmm",
        {
            (_R, _FWD): forward(PLAIN, ex.residual_addmm),
            (_R, _OUT): forward_out(PLAIN, ex.residual_addmm_out, _scratch_t),
            (_R, _IN): forward_inplace(PLAIN, ex.residual_addmm_inplace, _scratch_t),
            (_R, _FB): forward_backward(PLAIN, ex.residual_addmm),
            (_B, _FWD): forward(PEFT_BANK, ex.batch_addmm),
            (_B, _IN): forward_inplace(PEFT_BANK, ex.batch_addmm_inplace, _scratch_t),
            (_B, _FB): forward_backward(PEFT_BANK, ex.batch_addmm),
        },
    ),
    Provider(
        "mm_add",
        "hand-written: mm + mm + add_",
        {
            (_R, _FWD): forward(PLAIN, ex.residual_mm_add),
            (_R, _OUT): forward_out(PLAIN, ex.residual_mm_add_out, _scratch_t),
            (_R, _FB): forward_backward(PLAIN, ex.residual_mm_add),
        },
    ),
    Provider("mm4", "hand-written: four mm(out=)", {(_R, _BWD): _manual_backward(ex.residual_backward_mm, False)}),
    Provider(
        "mm4_transposed",
        "hand-written: four mm(out=), dB transposed",
        {(_R, _BWD): _manual_backward(ex.residual_backward_mm_transposed, True)},
    ),
    Provider(
        "concat",
        "hand-written: one rank-E·r update",
        {
            (_T, _FWD): forward(CONCAT, ex.token_concat),
            (_T, _IN): forward_inplace(CONCAT, ex.token_concat_inplace),
            (_T, _FB): forward_backward(CONCAT, ex.token_concat),
        },
    ),
    Provider(
        "naive",
        "eager, naive",
        {
            (_R, _FWD): forward(PLAIN, ex.residual_naive),
            (_R, _OUT): forward_out(PLAIN, ex.residual_naive_out),
            (_R, _IN): forward_inplace(PLAIN, ex.residual_naive_inplace),
            (_R, _FB): forward_backward(PLAIN, ex.residual_naive),
            (_B, _FWD): forward(PEFT_BANK, ex.batch_naive),
            (_B, _IN): forward_inplace(PEFT_BANK, ex.batch_naive_inplace),
            (_B, _FB): forward_backward(PEFT_BANK, ex.batch_naive),
            (_T, _FWD): forward(EXPERT_LIST, ex.token_naive),
            (_T, _IN): forward_inplace(EXPERT_LIST, ex.token_naive_inplace),
            (_T, _FB): forward_backward(EXPERT_LIST, ex.token_naive),
        },
    ),
    Provider(
        "compile",
        "torch.compile of naive",
        {
            (_R, _FWD): forward(PLAIN, ex.residual_naive, compiled=True),
            (_R, _OUT): forward_out(PLAIN, ex.residual_naive_out, compiled=True),
            (_R, _IN): forward_inplace(PLAIN, ex.residual_naive_inplace, compiled=True),
            (_R, _FB): forward_backward(PLAIN, ex.residual_naive, compiled=True),
            (_B, _FWD): forward(PEFT_BANK, ex.batch_naive, compiled=True),
            (_B, _IN): forward_inplace(PEFT_BANK, ex.batch_naive_inplace, compiled=True),
            (_B, _FB): forward_backward(PEFT_BANK, ex.batch_naive, compiled=True),
            (_T, _FWD): forward(EXPERT_LIST, ex.token_naive, compiled=True),
            (_T, _IN): forward_inplace(EXPERT_LIST, ex.token_naive_inplace, compiled=True),
            (_T, _FB): forward_backward(EXPERT_LIST, ex.token_naive, compiled=True),
        },
    ),
    Provider(
        "peft",
        "PEFT's Lily expression",
        {(_B, _FWD): forward(PEFT_BANK, ex.batch_peft), (_B, _FB): forward_backward(PEFT_BANK, ex.batch_peft)},
    ),
    Provider(
        "hydra",
        "HydraLoRA's loop",
        {(_T, _FWD): forward(EXPERT_LIST, ex.token_hydra), (_T, _FB): forward_backward(EXPERT_LIST, ex.token_hydra)},
    ),
    Provider(FLOOR, "floor: torch.add(out=)", _limits(_floor)),
    Provider(ARITHMETIC, "arithmetic: its multiply-adds from registers", _limits(_arithmetic)),
)

LABELS = {provider.name: provider.label for provider in PROVIDERS} | {
    "bare_op": "the op alone",
    "frozen": "frozen encoder, head only",
    "lora_peft": "LoRA r=8 on query, value (PEFT)",
    "lor2c_eager": "LoR2C r=8, eager",
    "lor2c_fused": "LoR2C r=8, lowrank_fast",
}


def providers_for(family: str, direction: str, only: frozenset[str] | None = None) -> list[tuple[Provider, Builder]]:
    """The providers that have a builder for this family and direction, in the table's order; `only` narrows them."""
    return [
        (provider, provider.builders[family, direction])
        for provider in PROVIDERS
        if (family, direction) in provider.builders and (only is None or provider.name in only)
    ]
