"""When the stream `y` may be updated in place.

A block or a linear layer returns a fresh tensor that nobody else has read, so adding to it in place saves one
allocation and one pass over memory. That is unsafe where autograd saved the tensor itself for its backward
(tanh, softmax, exp, ...: the version counter would stop the backward with an error), where `y` shares memory with
a tensor that someone still reads, or where a forward hook kept it. The rule is an allow-list of producers whose
backward does not read their output, in modules without hooks; everything else is updated out of place.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module

# Backward formulas that use inputs and statistics only. Names are those of `Tensor.grad_fn`.
_OUTPUT_NOT_SAVED = frozenset(
    {
        "AddBackward0",
        "AddmmBackward0",
        "MmBackward0",
        "BmmBackward0",
        "LinearBackward0",
        "NativeLayerNormBackward0",
        "FusedRmsNormBackward0",
        "UnsafeViewBackward0",
        "_ResidualAddBackward",
        "_ExpandAddBackward",
        "_RoutedProjectionBackward",
    }
)


def _keeps(hook: Any) -> bool:
    """Whether a hook may keep what it is shown; the owner of a bound method can deny it: `keeps_outputs = False`."""
    return bool(getattr(getattr(hook, "__self__", None), "keeps_outputs", True))


def _kept(module: nn.Module, before: Any = None) -> bool:
    # Not a loop over `module.modules()`, which takes twice as long; and no generator for what has nothing to look at.
    if module._forward_hooks:
        for hook in module._forward_hooks.values():
            if hook == before:
                break
            if _keeps(hook):
                return True
    children = module._modules
    return bool(children) and any(_kept(child) for child in children.values() if child is not None)


def hooked(module: nn.Module, before: Any = None) -> bool:
    """Whether a forward hook may have kept what `module`, or a module in it, returned: hands off then.

    `before` is a hook of `module` itself; of the hooks there, those that ran before it count. Costs about 1 us for each
    module. False under torch.compile, where nothing is updated in place anyway.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(_module._global_forward_hooks) or _kept(module, before)


def _ordinary(tensor: Tensor) -> bool:
    """Whether `tensor` has memory that can be compared: no fake or meta tensor, nor one that functorch wraps."""
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _traced() -> bool:
    """Whether a tracer follows: it would miss that `y` changed through its base, and plans memory itself."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def _separate(y: Tensor, x: Tensor) -> bool:
    return y is not x and y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def may_update(y: Tensor, x: Tensor) -> bool:
    """Whether `y`, just returned by a module that was given `x`, can take the update in place.

    What hooks have seen is not known here: see `hooked`.
    """
    if _traced() or y._base is not None or not y.is_contiguous() or not (_ordinary(y) and _ordinary(x)):
        return False
    recorded = torch.is_grad_enabled() and y.requires_grad
    if recorded and (y.grad_fn is None or y.grad_fn.name() not in _OUTPUT_NOT_SAVED):
        return False
    return _separate(y, x)


def flat_stream(y: Tensor, x: Tensor) -> Tensor | None:
    """The `[T, d]` product that a biased `nn.Linear` reshaped into `y`, if it can take the update in place.

    `F.linear` with a bias and three dimensions returns a view of `addmm`'s result. Writing to the view would make
    autograd clone the whole gradient in backward; writing to its base does not.
    """
    base = y._base
    if base is None or _traced() or base.dim() != 2 or base.shape[-1] != y.shape[-1]:
        return None
    if base.numel() != y.numel() or not (y.is_contiguous() and x.is_contiguous()):
        return None
    return base if may_update(base, x) else None


def dtype_for(parameter: Tensor, y: Tensor) -> Tensor:
    """`parameter` in a dtype the ops take beside `y`: the dtype of `y`, or float32 beside 16-bit activations."""
    if parameter.dtype is y.dtype or (parameter.dtype is torch.float32 and y.dtype is not torch.float64):
        return parameter
    return parameter.to(y.dtype)


def like_stream(x: Tensor, y: Tensor) -> Tensor:
    """`x` in the dtype of the stream `y`; the very same tensor if it already is."""
    return x if x.dtype is y.dtype else x.to(y.dtype)


def first_tensor(output: Any) -> Tensor:
    """The hidden states in what a block returns: a tensor, or the first entry of a tuple."""
    found = output[0] if isinstance(output, tuple) else output
    if not isinstance(found, Tensor):
        raise TypeError(f"a layer must return a tensor or a tuple whose first entry is one; got {type(found).__name__}")
    return found


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Inside, products are computed in the dtype of their factors, also where autocast would round them to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
