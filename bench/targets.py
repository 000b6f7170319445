"""The table of figures that the package must reach, each computed from measured records.

A row selects the cases it speaks of and reports the worst of them. Ratios are taken inside one case, whose providers
alternated in one process: from the minima (what decides) and from the medians (beside it). A row also names the fastest
other provider of its worst case, so that a baseline stronger than the row's own is not left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from .plans import LARGE, SWEEP_D
from .records import Record
from .registry import FLOOR, LIMITS

OURS = "ours"
_KEY = ("suite", "op", "routing", "direction", "dtype", "T", "d_in", "d_out", "r", "E")

Group = dict[str, Record]  # provider -> record, all of one case


def groups(records: Iterable[Record]) -> list[Group]:
    """Records of the same case together, in the order of their first appearance; a repeat replaces the earlier one."""
    found: dict[tuple[object, ...], Group] = {}
    for record in records:
        found.setdefault(tuple(record[name] for name in _KEY), {})[record["provider"]] = record
    return list(found.values())


def any_of(group: Group) -> Record:
    """Some record of the group: they agree on what the case is."""
    return next(iter(group.values()))


def timed(group: Group, provider: str) -> Record | None:
    """The provider's record if it has times."""
    record = group.get(provider)
    return record if record is not None and record["status"] == "ok" else None


def speedup(group: Group, baseline: str, statistic: str = "min_s") -> float | None:
    """The baseline's time over ours; None where one of them was not measured."""
    ours, other = timed(group, OURS), timed(group, baseline)
    return None if ours is None or other is None else other[statistic] / ours[statistic]


def floor_fraction(group: Group, provider: str = OURS, statistic: str = "min_s") -> float | None:
    """The floor's time over the provider's: 1 at the speed of `torch.add(out=)`."""
    record, floor = timed(group, provider), timed(group, FLOOR)
    return None if record is None or floor is None else floor[statistic] / record[statistic]


def limit(group: Group, baseline: str) -> float | None:
    """What `speedup(group, baseline)` would be for a provider that takes no longer than the case's memory traffic or
    its multiply-adds, whichever takes longer, each measured in the same rounds."""
    other, bounds = timed(group, baseline), [timed(group, name) for name in LIMITS]
    known = [record["min_s"] for record in bounds if record is not None]
    return other["min_s"] / max(known) if other is not None and len(known) == len(LIMITS) else None


def fastest_other(group: Group) -> tuple[str, float] | None:
    """The quickest provider beside ours and the floor, and its speed-up."""
    others = [name for name in group if name not in (OURS, *LIMITS) and timed(group, name)]
    if not others or timed(group, OURS) is None:
        return None
    name = min(others, key=lambda other: group[other]["min_s"])
    ratio = speedup(group, name)
    assert ratio is not None
    return name, ratio


NOISY = 1.5


def noisy(group: Group) -> bool:
    """Whether the median of any provider of the case is more than `NOISY` times its minimum: the machine was busy."""
    return any(r["median_s"] > NOISY * r["min_s"] for r in group.values() if r["status"] == "ok")


@dataclass(frozen=True)
class Measured:
    """A figure by minima and by medians, the case it comes from, and the most that this machine allows there."""

    value: float
    median: float | None
    group: Group | None
    limit: float | None = None


Measure = Callable[[list[Group]], Measured | None]
Predicate = Callable[[Record], bool]


@dataclass(frozen=True)
class Target:
    """`unit` is "x", "of floor", "us", "T·r" or "of 4k"; smaller is better for "us" and "T·r"."""

    quantity: str
    must: float
    aim: float | None
    unit: str
    select: Predicate
    measure: Measure

    @property
    def higher_is_better(self) -> bool:
        return self.unit not in ("us", "T·r")


@dataclass(frozen=True)
class Row:
    target: Target
    measured: Measured | None

    @property
    def ok(self) -> bool | None:
        """Whether the figure reaches `must`; None when it was not measured."""
        return None if self.measured is None else self._reaches(self.target.must)

    @property
    def reaches_aim(self) -> bool:
        return self.measured is not None and self.target.aim is not None and self._reaches(self.target.aim)

    def _reaches(self, bound: float) -> bool:
        assert self.measured is not None
        return self.measured.value >= bound if self.target.higher_is_better else self.measured.value <= bound


def rows(records: Iterable[Record]) -> list[Row]:
    """One row per target, in the order of the table; a row without its cases has `measured = None`.

    So has a row one of whose cases has no time of ours: a refused result is not passed over in favour of the others.
    """
    grouped = groups(records)
    return [Row(target, _measure(target, grouped)) for target in TARGETS]


def _measure(target: Target, grouped: list[Group]) -> Measured | None:
    selected = [group for group in grouped if target.select(any_of(group))]
    if not selected or any(timed(group, OURS) is None for group in selected):
        return None
    return target.measure(selected)


# ------------------------------------------------------------------------------------------------ measures


def _worst(
    of: Callable[[Group, str], float | None], most: Callable[[Group], float | None] = lambda group: None
) -> Measure:
    """The smallest value of `of(group, statistic)` over the groups, with `most(group)` as its limit."""

    def measure(selected: list[Group]) -> Measured | None:
        found: list[Measured] = []
        for group in selected:
            value = of(group, "min_s")
            if value is not None:
                found.append(Measured(value, of(group, "median_s"), group, most(group)))
        return min(found, key=lambda one: one.value) if found else None

    return measure


def against(baseline: str) -> Measure:
    return _worst(lambda group, statistic: speedup(group, baseline, statistic), lambda group: limit(group, baseline))


of_floor = _worst(lambda group, statistic: floor_fraction(group, OURS, statistic), lambda group: limit(group, FLOOR))


def _overhead(selected: list[Group]) -> Measured | None:
    group = selected[0]
    public, bare = timed(group, OURS), timed(group, "bare_op")
    if public is None or bare is None:
        return None
    return Measured((public["min_s"] - bare["min_s"]) * 1e6, (public["median_s"] - bare["median_s"]) * 1e6, None)


def _saved(selected: list[Group]) -> Measured | None:
    worst = max(
        (record["saved_elements"] / (record["T"] * record["r"]), id(group), group)
        for group in selected
        for record in group.values()
    )
    return Measured(worst[0], None, worst[2])


def _flatness(selected: list[Group]) -> Measured | None:
    """The smallest fraction of the floor over the sizes, divided by the fraction at T = 4096 of the same dtype."""

    def at(group: Group, statistic: str) -> float | None:
        base = next(
            (g for g in selected if any_of(g)["T"] == 4096 and any_of(g)["dtype"] == any_of(group)["dtype"]), None
        )
        own, reference = floor_fraction(group, OURS, statistic), base and floor_fraction(base, OURS, statistic)
        return None if own is None or not reference else own / reference

    return _worst(at)(selected)


# ------------------------------------------------------------------------------------------------ selections


def _case(direction: str, dtype: str | None = None, op: str = "residual_add", routing: str | None = None) -> Predicate:
    def select(record: Record) -> bool:
        return (
            record["suite"] == "ops"
            and record["op"] == op
            and record["routing"] == routing
            and record["direction"] == direction
            and dtype in (None, record["dtype"])
        )

    return select


def _both(*predicates: Predicate) -> Predicate:
    return lambda record: all(predicate(record) for predicate in predicates)


def _large(record: Record) -> bool:
    return record["T"] * record["d_in"] >= LARGE


def _tokens(count: int) -> Predicate:
    return lambda record: record["T"] == count


def _rank(rank: int) -> Predicate:
    return lambda record: record["r"] == rank


# ------------------------------------------------------------------------------------------------ the table

_RANKS = (8, 16, 32)
_F32, _BF16 = "float32", "bfloat16"


def _by_rank(
    quantity: str, select: Predicate, measure: Measure, unit: str, must: tuple[float, ...], aim: tuple[float, ...]
) -> Iterator[Target]:
    for rank, m, a in zip(_RANKS, must, aim, strict=True):
        yield Target(quantity.format(r=rank), m, a, unit, _both(select, _large, _rank(rank)), measure)


def _table() -> Iterator[Target]:
    f32, b16 = _case("forward_out", _F32), _case("forward_out", _BF16)
    f32_bwd, b16_bwd = _case("backward_out", _F32), _case("backward_out", _BF16)
    addmm, mm4 = against("addmm"), against("mm4")

    yield from _by_rank("fp32 forward out=, r={r}", f32, of_floor, "of floor", (0.80, 0.70, 0.50), (0.95, 0.85, 0.60))
    yield from _by_rank("fp32 forward out=, r={r}, vs addmm(out=)", f32, addmm, "x", (1.8, 1.7, 1.4), (2.4, 2.2, 1.6))
    yield from _by_rank("fp32 backward, r={r}, vs four mm(out=)", f32_bwd, mm4, "x", (1.8, 1.5, 1.25), (2.3, 1.9, 1.5))
    yield from _by_rank("bf16 forward out=, r={r}", b16, of_floor, "of floor", (0.70, 0.70, 0.60), (0.90, 0.85, 0.75))
    yield from _by_rank("bf16 forward out=, r={r}, vs addmm(out=)", b16, addmm, "x", (1.5, 1.5, 1.5), (1.9, 1.9, 1.9))
    yield from _by_rank("bf16 backward, r={r}, vs four mm(out=)", b16_bwd, mm4, "x", (1.8, 1.8, 1.35), (2.3, 2.2, 1.8))

    for dtype, name in ((_F32, "fp32"), (_BF16, "bf16")):
        autograd = _both(_case("forward_backward", dtype), _large)
        yield Target(f"{name} forward+backward, autograd, vs naive", 2.0, 3.0, "x", autograd, against("naive"))
        yield Target(
            f"{name} forward+backward, autograd, vs torch.compile", 1.3, 2.0, "x", autograd, against("compile")
        )

    for dtype, name, must, aim in ((_F32, "fp32", 1.2, 1.6), (_BF16, "bf16", 2.0, 3.0)):
        short = _both(_case("forward_out", dtype), _tokens(64))
        back = _both(_case("backward_out", dtype), _tokens(64), _rank(32))
        yield Target(f"{name} T=64 forward, r=8, vs addmm(out=)", must, aim, "x", _both(short, _rank(8)), addmm)
        yield Target(f"{name} T=64 forward, r=32, vs addmm(out=)", 1.0, 1.3, "x", _both(short, _rank(32)), addmm)
        yield Target(f"{name} T=64 backward, r=32, vs four mm(out=)", 1.0, 1.3, "x", back, mm4)
    for dtype, name, must, aim in ((_F32, "fp32", 1.5, 3.0), (_BF16, "bf16", 3.0, 6.0)):
        single = _both(_case("forward", dtype), _tokens(1))
        yield Target(f"{name} T=1 forward, public function, vs addmm", must, aim, "x", single, addmm)

    for dtype, name in ((_F32, "fp32"), (_BF16, "bf16")):
        token = ("routed_projection", "token")
        allocating = _both(_case("forward", dtype, *token), _large)
        inplace = _both(_case("forward_inplace", dtype, *token), _large)
        yield Target(f"{name} token-routed forward, vs concatenated", 1.8, 2.5, "x", allocating, against("concat"))
        yield Target(f"{name} token-routed in place, vs concatenated", 1.8, 2.5, "x", inplace, against("concat"))
        yield Target(f"{name} token-routed forward, vs HydraLoRA loop", 6.0, 15.0, "x", allocating, against("hydra"))
    for dtype, name, must, aim in ((_F32, "fp32", 2.0, 3.5), (_BF16, "bf16", 1.5, 2.5)):
        lily = _both(_case("forward_backward", dtype, "routed_projection", "batch"), _large)
        yield Target(f"{name} batch-routed forward+backward, vs PEFT's Lily", must, aim, "x", lily, against("peft"))

    yield Target("public function above the bare op, requires_grad", 10.0, 6.0, "us", _case("call_overhead"), _overhead)
    yield Target("kept for backward beyond x", 1.0, None, "T·r", _case("saved_for_backward"), _saved)
    for dtype, name in ((_F32, "fp32"), (_BF16, "bf16")):
        sweep = _sweep(dtype)
        yield Target(f"{name} T=1k..64k at d=1024, fraction of floor", 0.85, None, "of 4k", sweep, _flatness)


def _sweep(dtype: str) -> Predicate:
    return lambda record: record["suite"] == "sweep" and record["dtype"] == dtype and record["d_in"] == SWEEP_D


TARGETS: tuple[Target, ...] = tuple(_table())
