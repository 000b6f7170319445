"""Replacing routers by fixed weights, so that an adapter becomes an ordinary LoRA.

A router that depends on the input cannot be merged. Its mean weights over held-out data can: `w = mean_t p_t [E]`,
the mean over all tokens that are not padding. What that costs is measured on the same data, as relative errors of the
model's output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..nn.inplace import dtype_for


class WeightRecorder:
    """Sums the routing probabilities of each layer over tokens."""

    def __init__(self) -> None:
        self.sums: dict[nn.Module, Tensor] = {}
        self.tokens: dict[nn.Module, Tensor] = {}
        self.batches: dict[nn.Module, list[Tensor]] = {}

    def record(self, layer: nn.Module, x: Tensor, A: Tensor, R: Tensor, mask: Tensor | None) -> None:
        """Add the tokens of one call: `x [.., d_in]`, router `R [E, r]` on `t`, bool mask `[..]`."""
        with torch.no_grad():
            p = torch.softmax(F.shrink(x, dtype_for(A, x)).float() @ R.float().mT, -1)
            rows = p.reshape(-1, p.shape[-1]).double()
            keep = torch.ones(rows.shape[0], dtype=rows.dtype, device=rows.device)
            if mask is not None:
                keep = mask.reshape(-1).to(rows.dtype)
            total, count = (rows * keep[:, None]).sum(0), keep.sum()
            self.sums[layer] = self.sums.get(layer, torch.zeros_like(total)) + total
            self.tokens[layer] = self.tokens.get(layer, torch.zeros_like(count)) + count
            self.batches.setdefault(layer, []).append(total / count.clamp(min=1.0))

    def mean(self, layer: nn.Module) -> Tensor:
        """The mean weights `[E]` of a layer, float32."""
        return (self.sums[layer] / self.tokens[layer].clamp(min=1.0)).float()

    def spread(self) -> float:
        """The largest standard deviation, over batches, of any layer's batch-mean weight."""
        return max(
            (float(torch.stack(b).std(0).max()) for b in self.batches.values() if len(b) > 1), default=0.0
        )  # fmt: skip


@dataclass(frozen=True)
class CalibrationReport:
    """What replacing routers by their means did, measured on the calibration batches.

    Attributes:
        layers: routers replaced. tokens: tokens averaged over, per layer.
        output_error: ||static - routed|| / ||routed|| of the model's output.
        update_error: ||static - routed|| / ||routed - base||: the same, relative to what the adapter does.
        spread: largest standard deviation over batches of a batch-mean weight; small means nearly static already.
    """

    layers: int
    tokens: int
    output_error: float
    update_error: float
    spread: float

    def __str__(self) -> str:
        return (
            f"calibrated {self.layers} routers on {self.tokens} tokens: output error {self.output_error:.2e}, "
            f"{self.update_error:.2%} of the adapter's effect; weights vary by {self.spread:.3f} between batches"
        )


def run(model: nn.Module, batch: Any) -> Any:
    """What `model` returns for a batch: keyword arguments in a mapping (dict, BatchEncoding), or its one argument."""
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def output_of(model: nn.Module, batch: Any) -> Tensor:
    """The main output of a model: logits, the last hidden state, or the first tensor."""
    found = run(model, batch)
    for name in ("logits", "last_hidden_state"):
        if isinstance(getattr(found, name, None), Tensor):
            return getattr(found, name)
    return found if isinstance(found, Tensor) else found[0]


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """eval mode without gradients; every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def measure(
    model: nn.Module, batches: Iterable[Any], make_static: Any, make_routed: Any, make_base: Any
) -> tuple[float, float]:
    """(output error, update error) of static against routed weights; the three callables switch the model's state."""
    difference = routed_norm = effect = 0.0
    for batch in batches:
        make_routed()
        routed = output_of(model, batch).double()
        with make_base():
            base = output_of(model, batch).double()
        make_static()
        static = output_of(model, batch).double()
        difference += float((static - routed).square().sum())
        routed_norm += float(routed.square().sum())
        effect += float((routed - base).square().sum())
    return (difference / max(routed_norm, 1e-300)) ** 0.5, (difference / max(effect, 1e-300)) ** 0.5
