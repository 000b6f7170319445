"""`RoutedLinear`: out = linear(x) + s * sum_e w_e dropout(x) A^T B_e^T, and the update on its own.

`routed_update` is the one place where an adapter of this kind is applied: it picks in place or out of place, one
expert (no router) or several, and carries the masked gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .. import functional as F
from ..reference import ROUTER_INPUTS, ROUTINGS, bank_as_matrix, mean_over_tokens
from .inplace import dtype_for, flat_stream, like_stream, may_update
from .residual import residual_update
from .weights import Bank, Down, positive


def _without_autocast(device: str) -> AbstractContextManager[object]:
    """The small products here stay in float32 under autocast."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def routed_update(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    R: Tensor | None = None,
    scale: float = 1.0,
    *,
    routing: str = "token",
    router_input: str = "t",
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    active: Tensor | bool | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """`y + s * sum_e w_e (dropout(x) A^T) B_e^T`, in place where that is safe.

    Arguments as in `lowrank_fast.routed_projection`; additionally a bank of one expert needs neither `R` nor
    `weights`, and dtypes are matched to `y`.
    """
    if B.shape[0] == 1 and R is None and weights is None:
        up = B[0].detach() if active is False else B[0]
        if isinstance(active, Tensor):
            up = torch.where(active, up, up.detach())
        return residual_update(y, x, A, up, scale, dropout_p=dropout_p, training=training)
    x = like_stream(x, y)
    A, B = dtype_for(A, y), dtype_for(B, y)
    shape = y.shape
    inplace = may_update(y, x)
    if not inplace and routing != "sample":
        flat = flat_stream(y, x)
        if flat is not None:
            y, x, inplace = flat, x.view(flat.shape[0], -1), True
            token_mask = None if token_mask is None else token_mask.reshape(-1)
    out = F.routed_projection(
        y,
        x,
        A,
        B,
        None if R is None else dtype_for(R, y),
        scale,
        routing=routing,
        router_input=router_input,
        weights=weights,
        token_mask=token_mask,
        active=active,
        inplace=inplace,
        dropout_p=dropout_p,
        training=training,
    )
    return out if out.shape == shape else out.view(shape)


def update_from_hidden(
    y: Tensor,
    x: Tensor,
    t: Tensor,
    B: Tensor,
    R: Tensor | None = None,
    scale: float = 1.0,
    *,
    logits: Tensor | None = None,
    routing: str = "token",
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    active: Tensor | bool | None = None,
) -> Tensor:
    """`routed_update` where `t = x A^T [.., r]`, and the logits of a router on `x`, are there already.

    The router works on `[T, E]` and the mixing on the bank: both small, so plain PyTorch does them; the pass over `y`
    is `expand_add`. `routing="sample"` is not available (one bank per sample): use `routed_update`.
    """
    B = dtype_for(B, y)
    shape = y.shape
    inplace = may_update(y, x)
    if not inplace:
        flat = flat_stream(y, x)
        if flat is not None:
            y, inplace, t = flat, True, t.flatten(0, -2)
            logits = None if logits is None else logits.flatten(0, -2)
            token_mask = None if token_mask is None else token_mask.reshape(-1)
    if active is False:
        B = B.detach()
    elif isinstance(active, Tensor):
        B = torch.where(active.view(-1, 1, 1), B, B.detach())
    hidden, up = t, B[0]
    with _without_autocast(y.device.type):
        if weights is not None:
            up = torch.tensordot(weights.to(t.dtype), B.to(t.dtype), dims=1)
        elif R is not None or logits is not None:
            if logits is None:
                assert R is not None
                logits = t @ R.to(t.dtype).mT
            p = torch.softmax(logits, -1)
            if routing == "token":
                hidden, up = (p[..., :, None] * t[..., None, :]).flatten(-2), bank_as_matrix(B)
            else:
                up = torch.tensordot(mean_over_tokens(p, "batch", token_mask), B.to(t.dtype), dims=1)
    out = F.expand_add(y, hidden, up, scale, inplace=inplace)
    return out if out.shape == shape else out.view(shape)


class RoutedLinear(nn.Module):
    """A frozen linear layer with a routed low-rank update; zero at the start.

    Args:
        base: the layer, anything with `in_features`, `out_features` and a forward `[.., d_in] -> [.., d_out]`. Its
            parameters are left as they are: freeze them yourself.
        r, experts: rank and number of up projections E; E = 1 has no router.
        scale: factor of the update. dropout: on `x`, in training.
        routing: "token", "sample" or "batch" (see `lowrank_fast.routed_projection`).
        router_input: "t" (Lily) or "x" (EffiLoRA, HydraLoRA).
        down, bank: tensors to share with other layers; made here when None.
    Raises: ValueError for settings outside these, or a shared tensor of another shape.

    `active` (bool, default True) is the masked gradient: while False, the bank and the router get no gradient.
    """

    def __init__(
        self,
        base: nn.Module,
        *,
        r: int = 8,
        experts: int = 4,
        scale: float = 1.0,
        dropout: float = 0.0,
        routing: str = "token",
        router_input: str = "t",
        down: Down | None = None,
        bank: Bank | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if routing not in ROUTINGS[:3]:
            raise ValueError(f"RoutedLinear: routing must be 'batch', 'sample' or 'token'; got {routing!r}")
        if router_input not in ROUTER_INPUTS:
            raise ValueError(f"RoutedLinear: router_input must be 't' or 'x'; got {router_input!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"RoutedLinear: dropout must be in [0, 1); got {dropout}")
        positive("RoutedLinear", "r", r)
        positive("RoutedLinear", "experts", experts)
        d_in, d_out = int(base.in_features), int(base.out_features)  # type: ignore[arg-type]
        device = next(base.parameters()).device
        self.base = base
        self.down = Down(d_in, r, device=device, dtype=dtype) if down is None else down
        self.bank = Bank(experts, r, d_out, device=device, dtype=dtype) if bank is None else bank
        if tuple(self.down.weight.shape) != (r, d_in):
            raise ValueError(f"RoutedLinear: down must hold {(r, d_in)}; got {tuple(self.down.weight.shape)}")
        if tuple(self.bank.bank.shape) != (experts, d_out, r):
            raise ValueError(f"RoutedLinear: bank must hold {(experts, d_out, r)}; got {tuple(self.bank.bank.shape)}")
        width = r if router_input == "t" else d_in
        self.router = None if experts == 1 else Down(width, experts, device=device, dtype=dtype)
        self.scale, self.dropout, self.routing, self.router_input = float(scale), dropout, routing, router_input
        self.active = True
        self.suppression = 1.0

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """`[.., d_in] -> [.., d_out]`; `token_mask` (bool, `[..]`) leaves padding out of "batch" and "sample" means."""
        router = None if self.router is None else self.router.weight
        return routed_update(
            self.base(x),
            x,
            self.down.weight,
            self.bank.bank,
            router if self.active or router is None else router.detach(),
            self.scale * self.suppression,
            routing=self.routing,
            router_input=self.router_input,
            token_mask=token_mask,
            active=None if self.active else False,
            dropout_p=self.dropout,
            training=self.training,
        )

    # What `lowrank_fast.methods.reducer.Reducer` needs of a layer.

    def set_active(self, active: bool) -> None:
        """Whether the bank and the router get gradients from now on."""
        self.active = active

    def set_suppression(self, factor: float) -> None:
        """Multiply the update by `factor` until the next call; 1.0 is as built."""
        self.suppression = factor

    def bank_parameters(self) -> list[nn.Parameter]:
        """What is frozen while inactive: the bank, and the router if there is one."""
        return [self.bank.weight] + ([] if self.router is None else [self.router.weight])

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, routing={self.routing!r}, router_input={self.router_input!r}, dropout={self.dropout}"
        )
