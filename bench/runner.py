"""Times the providers of a case against each other, in one process, in alternating rounds.

Per case: build every provider, hold its results against float64 (a provider that is wrong gets no timings), measure its
peak bytes, then run rounds. A round is one sample of every provider in random order, so that drift of the machine falls
on all of them alike. A sample is one call, or as many as fill `SAMPLE_SECONDS` for short calls. A provider several
times slower than the quickest joins only every k-th round. Garbage collection is off while the clock runs, and the
progress bar is redrawn between rounds only.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import environment, memory
from .cases import Case, Inputs, Problem
from .gate import Expected, Wrong, check
from .records import Record, validate
from .registry import ARITHMETIC, FLOOR, LIMITS, Builder, Prepared, Provider, providers_for
from .stats import Summary, summarize

SAMPLE_SECONDS = 2e-4
SLOW = 6.0  # times the quickest provider: beyond this a provider skips rounds
MIN_ROUNDS, MAX_ROUNDS = 5, 40
MIN_SAMPLES = 3  # of a slow provider, and rounds of a case for which no time is left

Report = Callable[[str], None]


def _silent(message: str) -> None:
    return None


@dataclass
class Entry:
    """One provider of a case on its way to a record."""

    provider: Provider
    prepared: Prepared | None = None
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    peak_bytes: int | None = None
    estimate: float = 0.0
    calls: int = 1
    stride: int = 1
    seconds: list[float] = field(default_factory=list)


class Workspace:
    """The inputs and the float64 truth of the latest problem: its directions share them."""

    def __init__(self) -> None:
        self._held: tuple[Inputs, Expected] | None = None

    def enter(self, problem: Problem) -> tuple[Inputs, Expected]:
        if self._held is None or self._held[0].problem != problem:
            self._held = None  # released before the next one is made, with what compiled functions still refer to
            gc.collect()
            inputs = Inputs(problem)
            self._held = inputs, Expected(inputs)
        return self._held


@contextmanager
def quiet_process() -> Iterator[None]:
    """No garbage collection inside."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def sample(call: Callable[[], Any], calls: int) -> float:
    """Seconds per call over `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _why(error: BaseException) -> str:
    """The first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip()[:300]


def admit(provider: Provider, builder: Builder, case: Case, inputs: Inputs, expected: Expected) -> Entry:
    """Build a provider and let it through the gate; its status says why when it is not admitted."""
    entry = Entry(provider)
    try:
        prepared = builder(inputs)
        prepared.reset()
        result = prepared.call()
        if provider.name != ARITHMETIC:  # it has no result
            entry.error = check(prepared.outputs(result), expected, case.direction, case.problem.dtype)
        entry.peak_bytes = memory.peak_bytes(prepared.call)
        entry.prepared = prepared
    except Wrong as wrong:
        entry.status, entry.reason = "refused", str(wrong)
    except Exception as error:  # a provider that raises must not end the run: its record says so
        entry.status = "unavailable" if provider.name in ("compile", ARITHMETIC) else "failed"
        entry.reason = _why(error)
    return entry


def _quickest(call: Callable[[], Any]) -> float:
    """The least seconds of 2 to 8 single calls; many where they are cheap, for one call may have been preempted."""
    seconds = [sample(call, 1), sample(call, 1)]
    while len(seconds) < 8 and sum(seconds) < 0.05:
        seconds.append(sample(call, 1))
    return min(seconds)


def calibrate(entries: Sequence[Entry]) -> None:
    """Estimate each provider's time, and from it the calls per sample and the rounds it takes part in."""
    for entry in entries:
        assert entry.prepared is not None
        call = entry.prepared.call
        once = _quickest(call)
        entry.calls = max(1, min(1000, round(SAMPLE_SECONDS / max(once, 1e-7))))
        entry.estimate = once if entry.calls == 1 else sample(call, entry.calls)
    contenders = [e.estimate for e in entries if e.provider.name not in LIMITS] or [e.estimate for e in entries]
    for entry in entries:
        entry.stride = max(1, int(entry.estimate / (SLOW * min(contenders))))


def rounds_for(entries: Sequence[Entry], budget: float) -> int:
    """How many rounds fill `budget` seconds; at least as many as give the slowest provider its samples."""
    per_round = sum(e.estimate * e.calls / e.stride for e in entries)
    least = MIN_ROUNDS if budget > 0.0 else MIN_SAMPLES
    rounds = max(least, min(MAX_ROUNDS, int(budget / max(per_round, 1e-9))))
    for entry in entries:
        entry.stride = min(entry.stride, max(1, rounds // MIN_SAMPLES))
    return rounds


def alternate(entries: Sequence[Entry], rounds: int, order: random.Random) -> None:
    """Append the seconds of every sample to its entry."""
    with quiet_process():
        for index in range(rounds):
            joining = [entry for entry in entries if index % entry.stride == 0]
            order.shuffle(joining)
            for entry in joining:
                assert entry.prepared is not None
                entry.seconds.append(sample(entry.prepared.call, entry.calls))


def run_case(
    case: Case,
    workspace: Workspace,
    budget: float,
    order: random.Random,
    only: frozenset[str] | None = None,
    report: Report = _silent,
) -> list[Record]:
    """Measure every provider of `case` (or those named in `only`) in about `budget` seconds; a record per provider."""
    started = time.perf_counter()
    problem = case.problem
    recording = case.direction == "forward_backward"
    entries: list[Entry] = []
    with torch.set_grad_enabled(recording):
        inputs, expected = workspace.enter(problem)
        for provider, builder in providers_for(problem.family, case.direction, only):
            report(f"{case.describe()}: checking {provider.name}")
            entries.append(admit(provider, builder, case, inputs, expected))
        running = [entry for entry in entries if entry.prepared is not None]
        if running:
            report(f"{case.describe()}: timing")
            calibrate(running)
            left = budget - (time.perf_counter() - started)
            alternate(running, rounds_for(running, max(left, budget / 2)), order)
    records = records_of(case, entries)
    entries.clear()
    torch._dynamo.reset()  # each case compiles functions of its own; without this the recompile limit stops later ones
    return records


def records_of(case: Case, entries: Sequence[Entry]) -> list[Record]:
    """A record for every entry, timed or not."""
    summaries = {e.provider.name: summarize(e.seconds) for e in entries if e.seconds}
    shared = environment.snapshot()
    return [
        record(
            shared,
            suite=case.suite,
            direction=case.direction,
            provider=entry.provider.name,
            problem=case.problem.fields(),
            summary=summaries.get(entry.provider.name),
            floor=summaries.get(FLOOR),
            calls=entry.calls,
            status=entry.status,
            reason=entry.reason,
            error=entry.error,
            peak=entry.peak_bytes,
        )
        for entry in entries
    ]


def record(
    shared: dict[str, Any],
    *,
    suite: str,
    direction: str,
    provider: str,
    problem: dict[str, object],
    summary: Summary | None,
    floor: Summary | None = None,
    calls: int = 1,
    status: str = "ok",
    reason: str | None = None,
    error: float | None = None,
    peak: int | None = None,
    **more: Any,
) -> Record:
    """One validated record: `shared` is `environment.snapshot()`, `problem` the fields of `Problem.fields()`."""
    return validate(
        {
            "suite": suite,
            **problem,
            "direction": direction,
            "provider": provider,
            "status": status,
            "reason": reason,
            "median_s": summary.median if summary else None,
            "p20_s": summary.p20 if summary else None,
            "p80_s": summary.p80 if summary else None,
            "min_s": summary.min if summary else None,
            "rounds": summary.rounds if summary else 0,
            "calls_per_sample": calls,
            "floor_min_s": floor.min if floor else None,
            "floor_median_s": floor.median if floor else None,
            "peak_bytes": peak,
            "error": error,
            **shared,
            **more,
        }
    )
