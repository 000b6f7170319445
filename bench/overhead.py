"""What surrounds the kernel: microseconds of Python and autograd per call, and bytes that a recorded call keeps.

Overhead: the public `residual_add` with parameters that require grad, against the op it ends in, on one token, where
the kernel itself takes next to nothing. Both keep `t`, both allocate their output, in the same alternating rounds.

Activation memory: what `torch.autograd.graph.saved_tensors_hooks` sees saved beside the inputs `x`, `y`, `A` and `B`,
and, as a check that nothing is kept elsewhere, the bytes still allocated after the call beyond the output.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from lowrank_fast import functional as F

from . import environment, memory
from .cases import Inputs, Problem, residual
from .records import Record
from .registry import Prepared, Provider
from .runner import Entry, alternate, calibrate, record
from .stats import summarize

DIRECTION = "call_overhead"
SAVED = "saved_for_backward"


def measure_overhead(rounds: int, order: random.Random, d: int = 768, rank: int = 8) -> list[Record]:
    """Records of the public function ("ours") and the op alone ("bare_op"), T = 1, fp32: overhead is the difference."""
    problem = residual(torch.float32, 1, d, rank)
    i = Inputs(problem)
    A, B = i.A.detach().requires_grad_(), i.B.detach().requires_grad_()
    op = torch.ops.lowrank_fast.residual_add

    def public() -> Tensor:
        return F.residual_add(i.y, i.x, A, B, i.scale)

    def bare() -> tuple[Tensor, Tensor]:
        return op(i.y, i.x, i.A, i.B, i.scale, 0.0, None, True)

    entries = [
        Entry(Provider("ours", "", {}), Prepared(public, lambda result: {})),
        Entry(Provider("bare_op", "", {}), Prepared(bare, lambda result: {})),
    ]
    with torch.enable_grad():
        calibrate(entries)
        alternate(entries, rounds, order)
    shared = environment.snapshot()
    return [
        record(
            shared,
            suite="ops",
            direction=DIRECTION,
            provider=e.provider.name,
            problem=problem.fields(),
            summary=summarize(e.seconds),
            calls=e.calls,
        )
        for e in entries
    ]


def saved_beside_inputs(i: Inputs) -> tuple[int, int]:
    """`(elements, live bytes)` that a recorded residual add keeps for backward beyond its inputs and its output."""
    leaves = [tensor.detach().requires_grad_() for tensor in (i.y, i.x, i.A, i.B)]
    y, x, A, B = leaves
    inputs = {tensor.untyped_storage().data_ptr() for tensor in leaves}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in inputs:
            saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = F.residual_add(y, x, A, B, i.scale)
        live = memory.live_bytes(lambda: F.residual_add(y, x, A, B, i.scale))
    return sum(saved.values()), live - out.nbytes


def measure_saved(problem: Problem) -> Record:
    """One record, without meaningful times, whose `saved_elements` and `saved_bytes` hold the result."""
    elements, live = saved_beside_inputs(Inputs(problem))
    return record(
        environment.snapshot(),
        suite="ops",
        direction=SAVED,
        provider="ours",
        problem=problem.fields(),
        summary=summarize([0.0]),
        saved_elements=elements,
        saved_bytes=live,
    )
