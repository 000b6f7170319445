"""Merge and Inject for LoR2C: which spans, when, and the bookkeeping.

SFS, the shape of a branch's feature space, from the singular values sigma of `W = B A`:

    SFS = 1 - (sigma_1 + ... + sigma_k) / (sigma_1 + ... + sigma_r)       in [0, 1 - k/r]

Low SFS: the update is concentrated in few directions, the branch says little. It is computed from an r x r problem,
svd(R_B R_A^T) with R from the QR factors of B and A^T, in float64. It is undefined while B = 0; such branches are
skipped.

    merge    the adjacent pair with the lowest sum of SFS becomes one span; the member with the higher SFS survives,
             with its Parameters and its optimizer state (tie: the lower one)
    inject   the single-layer span with the lowest SFS is replaced by LoRA of rank r/2 on q and v of its block

Schedule of the paper, in optimizer steps: with M events wanted in T steps there is one every `T // (4 M) + 1` steps, so
that they fall into the first quarter of training.

`max_merges="auto"` or `max_injections="auto"`: the number is chosen from the SFS values. There are at most 8 event
points, spread as above. At each one the lowest pair is merged only if both members have SFS <= q (1 - k/r), and the
lowest branch is injected only if its own SFS is <= q (1 - k/r), with q = `auto_threshold` = 0.5. (1 - k/r) is the SFS
of a flat spectrum, so q = 0.5 asks: is the update closer to rank k than to using its rank evenly? A branch that is
not is left alone, and an event point with no candidate changes nothing.

With torch.distributed, rank 0's SFS values decide for all ranks; a model wrapped in DistributedDataParallel needs
`find_unused_parameters=True`, since spans stop and LoRA starts taking part. Optimizer groups and schedulers are never
touched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.weights import integer
from .lor2c import Slot, Span, Topology

logger = logging.getLogger("lowrank_fast.lor2c")

AUTO_EVENTS = 8


def sfs(A: Tensor, B: Tensor, k: int) -> float | None:
    """SFS of `W = B A` for `A [r, d_in]`, `B [d_out, r]`; None where W = 0."""
    r_b = torch.linalg.qr(B.detach().double().cpu(), mode="r").R
    r_a = torch.linalg.qr(A.detach().double().cpu().mT, mode="r").R
    sigma = torch.linalg.svdvals(r_b @ r_a.mT)
    total = float(sigma.sum())
    if not math.isfinite(total) or total <= 1e-30:
        return None
    return 1.0 - float(sigma[:k].sum()) / total


def default_k(r: int) -> int:
    """2 for r = 8 (the authors' scripts), r / 2 otherwise."""
    return 2 if r == 8 else max(1, r // 2)


def _count(name: str, value: int | str) -> int:
    if value == "auto":
        return AUTO_EVENTS
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be 'auto' or an integer >= 0; got {value!r}")
    return value


def check_plan(
    layers: int, r: int, max_merges: int | str, max_injections: int | str, sfs_k: int | None, threshold: float
) -> int:
    """The k to use; ValueError if the plan cannot work on `layers` blocks at rank `r`."""
    merges, injections = _count("max_merges", max_merges), _count("max_injections", max_injections)
    if merges and layers < 2:
        raise ValueError(f"max_merges={max_merges!r} needs two adjacent blocks to merge; this model has {layers}")
    if isinstance(max_merges, int) and isinstance(max_injections, int) and max_merges + max_injections > layers:
        raise ValueError(
            f"max_merges + max_injections must be at most the number of blocks, {layers}; "
            f"got {max_merges} + {max_injections}"
        )
    k = default_k(r) if sfs_k is None else sfs_k
    if (merges or injections) and not 1 <= k < r:
        raise ValueError(f"sfs_k must be in [1, r={r}) for SFS to tell branches apart; got {k}")
    if not 0.0 < threshold <= 1.0:
        raise ValueError(f"auto_threshold must be in (0, 1]; got {threshold}")
    return k


def check_schedule(
    owner: str,
    max_merges: int | str,
    max_span: int | None,
    merge_interval: int | None,
    inject_interval: int | None,
    fade_steps: int,
) -> None:
    """ValueError unless these are integers that allow what is wanted; None stands for the default."""
    intervals = {"merge_interval": merge_interval, "inject_interval": inject_interval}
    for name, value in intervals.items():
        if value is not None:
            integer(owner, name, value, 1)
    if max_span is not None:
        least, why = (2, " for a merge, of two blocks") if max_merges else (1, "")
        integer(owner, "max_span", max_span, least, why)
    integer(owner, "fade_steps", fade_steps, 0)


def find_topology(model: nn.Module, adapter_name: str | None = None) -> Topology:
    """The topology of a LoR2C model: a `LoR2C` module, or a PEFT model's adapter (the active one by default)."""
    own = getattr(model, "topology", None)
    if isinstance(own, Topology):
        return own
    found: dict[str, Topology] = {}
    name = adapter_name
    for module in model.modules():
        topologies = getattr(module, "lor2c_topologies", None)
        if topologies:
            found.update(topologies)
            name = name or next(iter(module.active_adapters), None)  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"{type(model).__name__} has no LoR2C adapter")
    if name not in found:
        raise ValueError(f"no LoR2C adapter {name!r}; there are {', '.join(map(repr, found))}")
    return found[name]


class LoR2CController:
    """Merges and injects while training.

    Args:
        model: a `LoR2C` module, a PEFT model with a LoR2C adapter, or a `Topology`.
        total_steps: optimizer steps of the whole run, T. The Trainer callback fills it in.
        max_merges, max_injections: how many at most, or "auto".
        optimizer: its state for freed tensors is dropped. The Trainer callback fills it in.
        sfs_k: k of the SFS (default: 2 for r = 8, else r / 2). max_span: blocks a merged span may cover.
        merge_interval, inject_interval: steps between events, instead of the paper's schedule.
        fade_steps: cross-fade over so many steps instead of switching at once; with `torch.compile` each step of a fade
            recompiles.
    Raises: ValueError for a plan that cannot work: see `check_plan` and `check_schedule`; injections that the adapter
        was not made for.

    Call `step(n)` after the n-th optimizer step (n from 1), or pass `callback()` to transformers' Trainer. What it
    does and why is logged to "lowrank_fast.lor2c" and kept in `history`, which is saved with the adapter.

    A step is ignored unless it is after the last one, also that of an earlier controller or of the run that saved the
    adapter. Only where the first step of a controller (or the first after `begin`) is before that one has a new run
    begun: the schedule starts again, a fade goes on from where it is, and events done still count towards `max_merges`
    and `max_injections`.
    """

    def __init__(
        self,
        model: nn.Module | Topology,
        total_steps: int | None = None,
        *,
        max_merges: int | str = 0,
        max_injections: int | str = 0,
        optimizer: torch.optim.Optimizer | None = None,
        sfs_k: int | None = None,
        max_span: int | None = None,
        merge_interval: int | None = None,
        inject_interval: int | None = None,
        fade_steps: int = 0,
        auto_threshold: float = 0.5,
        adapter_name: str | None = None,
    ) -> None:
        self.topology = model if isinstance(model, Topology) else find_topology(model, adapter_name)
        r = self.topology.settings.r
        self.k = check_plan(len(self.topology.slots), r, max_merges, max_injections, sfs_k, auto_threshold)
        check_schedule("LoR2CController", max_merges, max_span, merge_interval, inject_interval, fade_steps)
        if max_injections and not self.topology.can_inject:
            raise ValueError("max_injections: this adapter has no dormant q/v LoRA; create it with max_injections > 0")
        self.max_merges, self.max_injections = max_merges, max_injections
        self.total_steps, self.optimizer = total_steps, optimizer
        self.max_span, self.fade_steps = max_span, fade_steps
        self.threshold = auto_threshold * (1.0 - self.k / r)
        self._intervals = (merge_interval, inject_interval)
        self._at_begin = True

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per event: step, kind, blocks, SFS values, and the numbers of parameters before and after."""
        return self.topology.progress.history

    def callback(self) -> Any:
        """This controller as a transformers `TrainerCallback`."""
        from .callbacks import trainer_callback

        return trainer_callback(self)

    def begin(self, total_steps: int, optimizer: torch.optim.Optimizer | None) -> None:
        """What a trainer knows at the start of a run; values given at construction win."""
        self._at_begin = True
        self.total_steps = total_steps if self.total_steps is None else self.total_steps
        self.optimizer = optimizer if self.optimizer is None else self.optimizer

    # ---------------------------------------------------------------------------------------------- decisions

    def scores(self) -> dict[int, float]:
        """Home block -> SFS of each steady span whose SFS is defined; the values of rank 0 everywhere."""
        spans = self.topology.steady()
        values = torch.full((len(spans),), float("nan"), dtype=torch.float64)
        for i, span in enumerate(spans):
            slot: Slot = self.topology.slots[span.home]
            value = sfs(slot.down.weight, slot.up.weight, self.k)
            values[i] = float("nan") if value is None else value
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            device = self.topology.slots[0].up.weight.device
            shared = values.to(device)
            torch.distributed.broadcast(shared, 0)
            values = shared.cpu()
        return {s.home: float(v) for s, v in zip(spans, values, strict=True) if not math.isnan(v)}

    def choose_merge(self, scores: dict[int, float]) -> tuple[Span, Span] | None:
        """The adjacent pair with the lowest sum, or None."""
        spans = self.topology.steady()
        best: tuple[float, Span, Span] | None = None
        for first, second in pairwise(spans):
            if first.end + 1 != second.start or first.home not in scores or second.home not in scores:
                continue
            if self.max_span is not None and second.end - first.start + 1 > self.max_span:
                continue
            a, b = scores[first.home], scores[second.home]
            if self.max_merges == "auto" and max(a, b) > self.threshold:
                continue
            if best is None or a + b < best[0]:
                best = (a + b, first, second)
        return None if best is None else best[1:]

    def choose_injection(self, scores: dict[int, float], exclude: Sequence[int] = ()) -> Span | None:
        """The single-layer span with the lowest SFS, or None; `exclude`: homes taken by a merge of the same event."""
        single = [
            s
            for s in self.topology.steady()
            if s.start == s.end and s.home in scores and s.home not in exclude and s.start not in self.topology.injected
        ]
        if not single:
            return None
        span = min(single, key=lambda s: scores[s.home])
        return None if self.max_injections == "auto" and scores[span.home] > self.threshold else span

    # ---------------------------------------------------------------------------------------------- stepping

    def _due(self, step: int, wanted: int | str, done: int, interval: int | None) -> bool:
        limit = _count("", wanted)
        if limit == 0 or done >= limit:
            return False
        if interval is None:
            if self.total_steps is None:
                raise ValueError("LoR2CController: total_steps must be given (or intervals) before step() is called")
            interval = self.total_steps // (4 * limit) + 1
        return step % interval == 0 and (wanted != "auto" or step // interval <= AUTO_EVENTS)

    def step(self, step: int) -> list[dict[str, Any]]:
        """What is due after optimizer step `step`; returns the new entries of `history`."""
        progress = self.topology.progress
        if self._at_begin and step < progress.last_step:
            logger.info("step %d: a new run; the last one ended at step %d", step, progress.last_step)
            progress.rebase(step - 1)
        self._at_begin = False
        if step <= progress.last_step:
            return []
        progress.last_step = step
        if progress.fade_steps:
            self._advance_fade(step)
            if progress.fade_steps:
                return []
        merge = self._due(step, self.max_merges, progress.merges, self._intervals[0])
        inject = self._due(step, self.max_injections, progress.injections, self._intervals[1])
        if not (merge or inject):
            return []
        scores = self.scores()
        before = len(self.history)
        taken: tuple[int, ...] = ()
        if merge:
            taken = self._merge(step, scores)
        if inject:
            self._inject(step, scores, taken)
        if self.fade_steps and len(self.history) > before:
            progress.fade_begin, progress.fade_steps = step, self.fade_steps
            self.topology.set_fade(0.0)
        return self.history[before:]

    def _merge(self, step: int, scores: dict[int, float]) -> tuple[int, ...]:
        pair = self.choose_merge(scores)
        if pair is None:
            logger.info("step %d: merge: no pair qualifies", step)
            return ()
        first, second = pair
        keep = second if scores[second.home] > scores[first.home] else first
        blocks = [[first.start, first.end], [second.start, second.end]]
        before = self.topology.parameters()
        self.topology.merge(first, second, keep, fade=self.fade_steps > 0)
        self._free()
        self.topology.progress.merges += 1
        self._log(step, "merge", blocks, [scores[first.home], scores[second.home]], before, keep.home)
        return first.home, second.home

    def _inject(self, step: int, scores: dict[int, float], taken: tuple[int, ...]) -> None:
        span = self.choose_injection(scores, taken)
        if span is None:
            logger.info("step %d: inject: no span qualifies", step)
            return
        before = self.topology.parameters()
        self.topology.inject(span, fade=self.fade_steps > 0)
        self._free()
        self.topology.progress.injections += 1
        self._log(step, "inject", [[span.start, span.end]], [scores[span.home]], before, span.home)

    def _log(self, step: int, kind: str, blocks: list[list[int]], values: list[float], before: int, home: int) -> None:
        after = self.topology.parameters()
        entry = {"step": step, "kind": kind, "blocks": blocks, "sfs": values, "kept": home}
        self.history.append({**entry, "parameters_before": before, "parameters_after": after})
        logger.info(
            "step %d: %s of blocks %s (SFS %s, lowest of its kind%s); parameters %d -> %d",
            step, kind, blocks, ", ".join(f"{v:.3f}" for v in values),
            f"; block {home} survives" if kind == "merge" else "", before, after,
        )  # fmt: skip

    def _advance_fade(self, step: int) -> None:
        progress = self.topology.progress
        a = min(1.0, (step - progress.fade_begin) / progress.fade_steps)
        self.topology.set_fade(a)
        if a >= 1.0:
            progress.fade_begin, progress.fade_steps = -1, 0
            self._free()

    def _free(self) -> None:
        """Drop the tensors no span uses, and their optimizer state; the groups stay as they are."""
        for parameter in self.topology.retire_unused():
            if self.optimizer is not None:
                self.optimizer.state.pop(parameter, None)
