"""EffiLoRA's Reducer: score the layers, and update the heads of a few of them in each step.

Score I_l per unit (a transformer layer by default), higher is more important, 0 at first. K = max(1, round(keep L))
units are active in a step: drawn without replacement with probabilities proportional to sigmoid(I), or the K best.

    importance="suppression"   every `interval` steps, on a validation mini-batch: three times, suppress L/2 units
                               drawn with probabilities sigmoid(-I) (their update is scaled by 0.25), and see what it
                               does to the loss: R_c = exp(-loss_c) - mean exp(-loss);  I_l -= 10 R_c q (1 - q),  q =
                               sigmoid(-I_l)
    importance="gradient"      no extra forward. Scaling the update of unit l by (1 - eps) raises the loss by
                               -eps <dB_l, B_l>, since <dB, B> = s dL/ds = sum_t <u_t, t_t>. So I_l is a running mean
                               (0.9) of -<dB_l, B_l>, divided by its mean magnitude over the units.

The constants of "suppression" are those of importance-aware sparse tuning (IST, EMNLP Findings 2024), whose description
EffiLoRA's matches; EffiLoRA's own are not published.

<dB, B> needs dB, which inactive units do not compute. Every `interval`-th step is therefore a probe: all units compute
their gradients, the scores are read, and the gradients of the units that are not selected are dropped before the
optimizer sees them. A probe costs what a step without the Reducer costs; nothing else is computed. (<dA, A> would do
as well, but the shared A sums it over all layers.) In the warm-up all units are active anyway and every step is read.

Masks are host flags that enter the operations as `active`: `requires_grad` never changes, inactive banks get None,
and an optimizer that skips None leaves their bits alone, weight decay and momentum included. Under `torch.compile`
the flags are device tensors, so that one graph serves all steps; the zero gradients this gives are dropped in
`end_backward`.

Choices depend on the scores, the seed and the step number only: all ranks choose alike (losses and signals are
averaged over ranks), and a resumed run continues as the uninterrupted one would. DistributedDataParallel needs
`find_unused_parameters=True`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..nn.shared_input import layer_index
from ..nn.weights import integer, positive
from .calibration import evaluating

BETA, TRIALS, SUPPRESSED, STEP_SIZE = 0.25, 3, 0.5, 10.0
DECAY = 0.9


class Reducible(Protocol):
    """What the Reducer needs of a layer; `lowrank_fast.nn.RoutedLinear` has it."""

    def set_active(self, active: bool) -> None: ...

    def set_suppression(self, factor: float) -> None: ...

    def bank_parameters(self) -> list[nn.Parameter]: ...


@dataclass
class ReducerState:
    """Scores of the units, saved with the adapter."""

    scores: dict[str, float] = field(default_factory=dict)
    last_step: int = -1

    def to_json(self) -> dict[str, Any]:
        """As JSON types; floats keep all their digits."""
        return {"scores": self.scores, "last_step": self.last_step}

    def from_json(self, text: str) -> None:
        """Take the values of `to_json`, in place."""
        found = json.loads(text)
        self.scores, self.last_step = dict(found["scores"]), int(found["last_step"])


def _sigmoid(value: float) -> float:
    return 0.5 * (1.0 + math.tanh(0.5 * value))


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).loss`."""
    found = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return found.loss


class Reducer:
    """Chooses which layers' heads are updated in each step.

    Args:
        model: what computes the loss, for "suppression".
        layers: name -> layer (anything with the methods of `Reducible`); names tell which transformer layer it is in.
        keep_ratio: fraction of units that are active after the warm-up, in (0, 1]; 1 switches the Reducer off.
        importance, selection: see above. interval: steps between scorings. warmup: first steps with all active (None:
            one interval).
        unit: "layer" (all adapters of one transformer layer together) or "module".
        validation: for "suppression": a re-iterable of batches (cycled), or a callable step -> batch.
        loss: (model, batch) -> scalar loss; `model(**batch).loss` by default.
        state: scores to continue from.
    Raises: ValueError for settings outside these, or "suppression" without validation batches.

    Call `begin_step(n)` before the forward of optimizer step n (from 0) and `end_backward(n)` after its backward,
    before the optimizer; or pass `callback()` to transformers' Trainer. `active` holds the units of the running step.

    A step is scored once: not again in a step before or at the last that was, also by an earlier Reducer or by the run
    that saved the adapter. Only where the first step of a Reducer (or the first after `begin`) is before it has a new
    run begun, which scores from its start on, beginning with the scores that are there.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Reducible],
        *,
        keep_ratio: float = 0.25,
        importance: str = "suppression",
        selection: str = "sample",
        interval: int = 10,
        warmup: int | None = None,
        unit: str = "layer",
        seed: int = 0,
        validation: Iterable[Any] | Callable[[int], Any] | None = None,
        loss: Callable[[nn.Module, Any], Tensor] = default_loss,
        state: ReducerState | None = None,
    ) -> None:
        for name, value, allowed in (
            ("importance", importance, ("suppression", "gradient")),
            ("selection", selection, ("sample", "top")),
            ("unit", unit, ("layer", "module")),
        ):
            if value not in allowed:
                raise ValueError(f"Reducer: {name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")
        if not 0.0 < keep_ratio <= 1.0:
            raise ValueError(f"Reducer: keep_ratio must be in (0, 1]; got {keep_ratio}")
        positive("Reducer", "interval", interval)
        if warmup is not None:
            integer("Reducer", "warmup", warmup, 0)
        if not layers:
            raise ValueError("Reducer: the model has no layer to choose from")
        if importance == "suppression" and validation is None and keep_ratio < 1.0:
            raise ValueError("Reducer: importance='suppression' needs validation batches; or use importance='gradient'")
        self.model, self.loss = model, loss
        self.units: dict[str, list[Reducible]] = {}
        for name, layer in layers.items():
            index = layer_index(name)
            key = name if unit == "module" or index is None else f"layer {index}"
            self.units.setdefault(key, []).append(layer)
        self.keep = max(1, round(keep_ratio * len(self.units)))
        self.importance, self.selection, self.interval, self.seed = importance, selection, interval, seed
        self.warmup = interval if warmup is None else warmup
        self.state = ReducerState() if state is None else state
        if set(self.state.scores) != set(self.units):
            self.state.scores = dict.fromkeys(self.units, 0.0)
        self.active = list(self.units)
        self._validation = validation
        self._drop: list[str] = []
        self._at_begin = True

    @property
    def scores(self) -> dict[str, float]:
        """Unit -> importance."""
        return self.state.scores

    def callback(self) -> Any:
        """This Reducer as a transformers `TrainerCallback`."""
        from .callbacks import trainer_callback

        return trainer_callback(self)

    def begin(self, total_steps: int, optimizer: Any) -> None:
        """The next step may be the first of a new run; choices need neither argument."""
        self._at_begin = True

    def step(self, step: int) -> None:
        """Nothing to do after the optimizer."""

    # ---------------------------------------------------------------------------------------------- the two calls

    def begin_step(self, step: int) -> list[str]:
        """Score if due, then choose and set the active units of optimizer step `step`; returns them."""
        if self._at_begin and step < self.state.last_step:
            self.state.last_step = step - 1
        self._at_begin = False
        if self.keep == len(self.units):
            return self.active
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        due = step > 0 and step % self.interval == 0
        if self.importance == "suppression" and due and step > self.state.last_step:
            self._score_by_suppression(step, generator)
            self.state.last_step = step
        chosen = list(self.units) if step < self.warmup else self._choose(generator)
        probe = self.importance == "gradient" and due and step >= self.warmup
        self.active = chosen
        self._drop = [name for name in self.units if name not in chosen]
        for name, layers in self.units.items():
            for layer in layers:
                layer.set_active(probe or name in chosen)
        return chosen

    def end_backward(self, step: int) -> None:
        """Read the gradient signal if there is one for every unit; drop gradients of units that are not active."""
        if self.keep == len(self.units):
            return
        complete = step < self.warmup or step % self.interval == 0
        if self.importance == "gradient" and complete and step > self.state.last_step:
            self._score_by_gradient()
            self.state.last_step = step
        for name in self._drop:
            for layer in self.units[name]:
                for parameter in layer.bank_parameters():
                    parameter.grad = None

    # ---------------------------------------------------------------------------------------------- choosing

    def probabilities(self) -> Tensor:
        """sigmoid(I), normalised, in the order of `units`; float64."""
        q = torch.tensor([_sigmoid(self.scores[name]) for name in self.units], dtype=torch.float64)
        return q / q.sum()

    def entropy(self) -> float:
        """Entropy of `probabilities()` in units of its largest value: 1 is uniform, as at the start."""
        p = self.probabilities()
        return float(-(p * p.log()).sum() / math.log(len(p))) if len(p) > 1 else 0.0

    def _choose(self, generator: torch.Generator) -> list[str]:
        names = list(self.units)
        if self.selection == "top":
            return sorted(names, key=lambda n: -self.scores[n])[: self.keep]
        chosen = torch.multinomial(self.probabilities(), self.keep, replacement=False, generator=generator)
        return [names[i] for i in sorted(chosen.tolist())]

    # ---------------------------------------------------------------------------------------------- scoring

    def _next_batch(self, step: int) -> Any:
        if callable(self._validation):
            return self._validation(step)
        assert self._validation is not None
        batches = list(self._validation) if not isinstance(self._validation, (list, tuple)) else self._validation
        self._validation = batches
        return batches[(step // self.interval - 1) % len(batches)]

    def _score_by_suppression(self, step: int, generator: torch.Generator) -> None:
        batch, names = self._next_batch(step), list(self.units)
        wanted = max(1, math.floor(SUPPRESSED * len(names)))
        trials, losses = [], []
        with evaluating(self.model):
            for _ in range(TRIALS):
                p = torch.tensor([_sigmoid(-self.scores[n]) for n in names], dtype=torch.float64)
                drawn = torch.multinomial(p / p.sum(), wanted, replacement=False, generator=generator)
                trials.append([names[i] for i in drawn.tolist()])
                losses.append(self.suppressed_loss(trials[-1], batch))
        rewards = torch.exp(-_mean_over_ranks(torch.tensor(losses, dtype=torch.float64)))
        rewards = rewards - rewards.mean()
        for reward, suppressed in zip(rewards.tolist(), trials, strict=True):
            for name in suppressed:
                q = _sigmoid(-self.scores[name])
                self.scores[name] -= STEP_SIZE * reward * q * (1.0 - q)

    def suppressed_loss(self, names: list[str], batch: Any) -> float:
        """The loss on `batch` with the updates of these units scaled by 0.25; they are as before afterwards."""
        try:
            for name in names:
                for layer in self.units[name]:
                    layer.set_suppression(BETA)
            return float(self.loss(self.model, batch))
        finally:
            for name in names:
                for layer in self.units[name]:
                    layer.set_suppression(1.0)

    def signals(self) -> dict[str, float]:
        """Unit -> -<dB, B> of the gradients that are there: by how much less of the unit would raise the loss."""
        found = {}
        for name, layers in self.units.items():
            total = 0.0
            for layer in layers:
                bank = layer.bank_parameters()[0]
                if bank.grad is not None:
                    total -= float((bank.grad.double() * bank.detach().double()).sum())
            found[name] = total
        return found

    def _score_by_gradient(self) -> None:
        found = self.signals()
        values = _mean_over_ranks(torch.tensor([found[n] for n in self.units], dtype=torch.float64))
        size = float(values.abs().mean())
        if size <= 0.0 or not math.isfinite(size):
            return
        for name, value in zip(self.units, values.tolist(), strict=True):
            self.scores[name] = DECAY * self.scores[name] + (1.0 - DECAY) * value / size


def _mean_over_ranks(values: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    total = values.to(device)
    torch.distributed.all_reduce(total)
    return (total / torch.distributed.get_world_size()).cpu()
