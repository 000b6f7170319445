"""What the autograd Functions share (csrc/cpu/autograd.h is the same for those in C++)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def differentiable_once(backward: Backward | None = None, *, hands_on: bool = False) -> Any:
    """A `backward` whose results raise RuntimeError when they are differentiated.

    Not `once_differentiable`, which lets results through where no incoming gradient requires grad: they depend on the
    Function's inputs all the same, and a second derivative would silently lack that part. `hands_on`: the first
    result is the first incoming gradient, untouched, and stays differentiable.
    """
    if backward is None:
        return functools.partial(differentiable_once, hands_on=hands_on)

    @functools.wraps(backward)
    def refusing(ctx: Any, *gradients: Tensor) -> Gradients:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return found
        message = f"trying to differentiate twice a function that is differentiable once: {type(ctx).__name__}"
        handed_on = gradients[0] if hands_on else None
        return tuple(
            value
            if value is None or value is handed_on
            else torch._C._functions.DelayedError(message.encode(), 1)(value.detach().requires_grad_())
            for value in found
        )

    return refusing


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd follows what is computed from these tensors, or would have to: a tangent counts too, for the
    Functions refuse forward mode."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
