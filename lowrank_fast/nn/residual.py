"""`ResidualAdapter`: out = y + s * dropout(x) A^T B^T, with s = alpha / r.

Beside a transformer block (`x` its input, `y` its output) this is LoR2C; beside a linear layer it is LoRA. One pass
over `x` and `y`; see `lowrank_fast.residual_add`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional as F
from .inplace import dtype_for, flat_stream, like_stream, may_update
from .weights import Down, Up, positive


def residual_update(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    inplace: bool = True,
) -> Tensor:
    """`y + s * (dropout(x) A^T) B^T` with dtypes matched to `y`; in place where that is safe, if `inplace`."""
    x = like_stream(x, y)
    A, B = dtype_for(A, y), dtype_for(B, y)
    shape = y.shape
    flat = None
    if inplace and not may_update(y, x):
        inplace = False
        flat = flat_stream(y, x)
    if flat is not None:
        y, x, inplace = flat, x.view(flat.shape[0], -1), True
    out = F.residual_add(y, x, A, B, scale, inplace=inplace, dropout_p=dropout_p, training=training)
    return out if flat is None else out.view(shape)


class ResidualAdapter(nn.Module):
    """A low-rank update of a stream `y [.., d_out]` read from `x [.., d_in]`; zero at the start.

    Args:
        d_in, d_out: widths of `x` and `y` (`d_out=None`: the same).
        r: rank, at least 1. alpha: the update is scaled by `alpha / r`. dropout: on `x`, in training.
        down, up: tensors to share with other adapters; made here when None.
        inplace: True updates `y` in place wherever that is provably safe, False never does.
    Raises: ValueError for a rank below 1, a dropout outside [0, 1) or a shared tensor of another shape.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        r: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        down: Down | None = None,
        up: Up | None = None,
        inplace: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_out = d_in if d_out is None else d_out
        positive("ResidualAdapter", "r", r)
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"ResidualAdapter: dropout must be in [0, 1); got {dropout}")
        self.down = Down(d_in, r, device=device, dtype=dtype) if down is None else down
        self.up = Up(r, d_out, device=device, dtype=dtype) if up is None else up
        for name, shared, shape in (("down", self.down, (r, d_in)), ("up", self.up, (d_out, r))):
            if tuple(shared.weight.shape) != shape:
                raise ValueError(f"ResidualAdapter: {name} must hold {shape}; got {tuple(shared.weight.shape)}")
        self.scale = alpha / r
        self.dropout = dropout
        self.inplace = inplace

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """`y [.., d_out]` with the update of `x [.., d_in]` added; `y` itself where it was updated in place."""
        return residual_update(
            y,
            x,
            self.down.weight,
            self.up.weight,
            self.scale,
            dropout_p=self.dropout,
            training=self.training,
            inplace=self.inplace,
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}, dropout={self.dropout}"
