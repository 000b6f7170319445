"""`RoutedLinear`: out = linear(x) + s * sum_e w_e dropout(x) A^T B_e^T, and the update on its own.

`routed_update` is the one place where an adapter of this kind is applied: it picks in place or out of place, one
expert (no router) or several, and carries the masked gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from .. import functional as F
from ..reference import ROUTER_INPUTS, ROUTINGS, bank_as_matrix, mean_over_tokens
from .frozen import frozen_linear, frozen_linear_of, shrink_rows
from .inplace import dtype_for, flat_stream, hooked, like_stream, may_update, without_autocast
from .mixing import mixed_bank
from .residual import residual_update
from .weights import Bank, Down, positive


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
    inplace: bool = True,
) -> Tensor:
    """`y + s * sum_e w_e (dropout(x) A^T) B_e^T`, in place where that is safe, if `inplace`.

    Arguments as in `lowrank_fast.routed_projection`; additionally a bank of one expert needs neither `R` nor
    `weights`, and dtypes are matched to `y`. `inplace=False` where a hook may have kept `y` (see `inplace.hooked`).
    """
    if B.shape[0] == 1 and R is None and weights is None:
        up = B.squeeze(0)
        up = up.detach() if active is False else up
        if isinstance(active, Tensor):
            up = torch.where(active, up, up.detach())
        return residual_update(y, x, A, up, scale, dropout_p=dropout_p, training=training, inplace=inplace)
    x = like_stream(x, y)
    A, B = dtype_for(A, y), dtype_for(B, y)
    shape = y.shape
    write = inplace and may_update(y, x)
    if inplace and not write and routing != "sample":
        flat = flat_stream(y, x)
        if flat is not None:
            y, x, write = flat, x.view(flat.shape[0], -1), True
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
        inplace=write,
        dropout_p=dropout_p,
        training=training,
    )
    return out if out.shape == shape else out.view(shape)


def branch(
    t: Tensor,
    B: Tensor,
    R: Tensor | None = None,
    *,
    logits: Tensor | None = None,
    routing: str = "token",
    weights: Tensor | None = None,
    token_mask: Tensor | None = None,
    active: Tensor | bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The update from `t = x A^T [.., r]` on as one product: `hidden [.., k]` and `up [d_out, k]`.

    Arguments as in `lowrank_fast.routed_projection`, but for `logits`: those of a router on `x`, instead of `R`. The
    experts are mixed in the bank ("batch", static) or in `hidden` ("token", "sample": k = E r). Router and mixing work
    on `[T, E]` and on the bank; the passes over `[T, d]` are left to `frozen_linear` or `expand_add`.
    """
    if logits is None and (R is not None or weights is not None):
        fixed = weights is not None
        R = None if R is None or fixed else R.to(t.dtype)
        checks.router(
            "branch", t, t.shape[-1], B.shape[0], R, weights, token_mask, active,
            "static" if fixed else routing, "t",
        )  # fmt: skip
    if active is False:
        B = B.detach()
    elif isinstance(active, Tensor):
        B = torch.where(active.view(-1, 1, 1), B, B.detach())
    with without_autocast(t.device.type):
        if weights is not None:
            return t, torch.tensordot(weights.to(t.dtype), B.to(t.dtype), dims=1)
        if logits is None and R is None:
            return t, B.squeeze(0)  # a view: the gradient of B[0] would be a copy among zeros
        if logits is None:
            assert R is not None
            if routing == "batch":
                return t, mixed_bank(t, R, B, token_mask)
            logits = F.shrink(t, R)
        p = torch.softmax(logits, -1)
        if routing == "batch":
            return t, torch.tensordot(mean_over_tokens(p, "batch", token_mask), B.to(t.dtype), dims=1)
        if routing == "sample":
            w = mean_over_tokens(p, "sample", token_mask)  # [S, E]
            p = w.view(w.shape[0], *(1,) * (t.dim() - 2), w.shape[1])
        return (p[..., :, None] * t[..., None, :]).flatten(-2), bank_as_matrix(B)


def add_branch(y: Tensor, x: Tensor, hidden: Tensor, up: Tensor, scale: float, *, inplace: bool = True) -> Tensor:
    """`y + s * hidden up^T`, in place where that is safe, if `inplace`; `y` is what a layer made of `x`."""
    shape, up = y.shape, dtype_for(up, y)
    write = inplace and may_update(y, x)
    flat = flat_stream(y, x) if inplace and not write else None
    if flat is None:
        return F.expand_add(y, hidden, up, scale, inplace=write)
    return F.expand_add(flat, hidden.reshape(flat.shape[0], hidden.shape[-1]), up, scale, inplace=True).view(shape)


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
        router: Tensor | None = None if self.router is None else self.router.weight
        if router is not None and not self.active:
            router = router.detach()
        scale, p = self.scale * self.suppression, self.dropout if self.training else 0.0
        mixing: dict[str, Any] = {
            "routing": self.routing, "token_mask": token_mask, "active": None if self.active else False,
        }  # fmt: skip
        linear = frozen_linear_of(self.base, x)
        if linear is None:
            return routed_update(
                self.base(x), x, self.down.weight, self.bank.bank, router, scale, router_input=self.router_input,
                dropout_p=p, training=self.training, inplace=not hooked(self.base), **mixing,
            )  # fmt: skip
        on_x = self.router_input == "x"
        rows = [self.down.weight] if router is None or not on_x or p > 0.0 else [self.down.weight, router]
        source = shrink_rows(x, rows, p)
        logits = None
        if router is not None and on_x:  # the router sees x without dropout
            logits = source.parts[1] if p == 0.0 else F.shrink(x, dtype_for(router, x))
        hidden, up = branch(source.parts[0], self.bank.bank, None if on_x else router, logits=logits, **mixing)
        return frozen_linear(linear, source, hidden, up, scale)

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
