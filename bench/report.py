"""The tables: for the terminal (rich) and as markdown, from records alone.

A ratio is written `minimum (median)`: the time of the other provider over ours, both from the same alternating rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable

from . import targets
from .cases import DIRECTIONS
from .records import Record
from .registry import LABELS, LIMITS, PROVIDERS
from .targets import OURS, Group, Row, any_of, floor_fraction, groups, speedup, timed


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """A GitHub table under its title."""
        lines = [f"### {self.title}", "", _pipes(self.columns), _pipes(["---"] * len(self.columns))]
        return "\n".join([*lines, *map(_pipes, self.rows)]) + "\n"

    def print(self, console: Console) -> None:
        """The same in the terminal; figures below 1x and failures in bold."""
        table = RichTable(title=self.title, title_justify="left", header_style="bold")
        for index, column in enumerate(self.columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in self.rows:
            table.add_row(
                *(f"[bold red]{cell}[/]" if cell in ("NO", "NO (noisy)", "refused", "failed") else cell for cell in row)
            )
        console.print(table)


def _pipes(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"


def _mib(size: int | None) -> str:
    return "–" if size is None else f"{size / 2**20:.3g}"


def _ratio(group: Group, baseline: str) -> str:
    low, middle = speedup(group, baseline), speedup(group, baseline, "median_s")
    if low is None:
        record = group.get(baseline)
        return "–" if record is None or record["status"] == "ok" else str(record["status"])
    return f"{low:.2f} ({middle:.2f})"


def describe_run(records: Sequence[Record]) -> str:
    """One paragraph: machine, software, load, date, commit."""
    first = records[0]
    loads = [record["load"] for record in records]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    machine = f"{first['cpu']}, {first['threads']} threads, kernels: {first['isa']}"
    load = f"load {min(loads):.1f} to {max(loads):.1f}"
    return f"{machine}; {load}; {versions}; commit {first['commit'] or 'unknown'}; {first['date']}."


# ------------------------------------------------------------------------------------------------ tables


def ops_tables(records: Iterable[Record]) -> list[Table]:
    """One table per op, routing and direction, so that allocating, preallocated and in-place figures stand apart.

    Each row: times of ours, fraction of the floor, speed-up against each baseline, peak MiB of ours and of the quickest
    baseline.
    """
    tables = []
    grouped = [g for g in groups(records) if any_of(g)["suite"] == "ops" and any_of(g)["direction"] in DIRECTIONS]
    kinds = dict.fromkeys((any_of(g)["op"], any_of(g)["routing"], any_of(g)["direction"]) for g in grouped)
    for op, routing, direction in sorted(
        kinds, key=lambda kind: (kind[0], kind[1] or "", list(DIRECTIONS).index(kind[2]))
    ):
        mine = [
            g
            for g in grouped
            if (any_of(g)["op"], any_of(g)["routing"], any_of(g)["direction"]) == (op, routing, direction)
        ]
        baselines = [p.name for p in PROVIDERS if p.name not in (OURS, *LIMITS) and any(p.name in g for g in mine)]
        columns = (
            "dtype",
            "T x d",
            "r",
            "ours ms",
            "of floor",
            *(f"x {b}" for b in baselines),
            "peak MiB",
            "its best rival's",
        )
        name = op if routing is None else f"{op}, {routing} routing"
        tables.append(Table(f"{name}: {DIRECTIONS[direction]}", columns, tuple(_ops_row(g, baselines) for g in mine)))
    return tables


def _ops_row(group: Group, baselines: Sequence[str]) -> tuple[str, ...]:
    case, ours, fraction = any_of(group), timed(group, OURS), floor_fraction(group)
    rival = targets.fastest_other(group)
    return (
        case["dtype"],
        f"{case['T']} x {case['d_in']}",
        str(case["r"]),
        _own_time(group) if ours is None else f"{_ms(ours['min_s'])} ({_ms(ours['median_s'])})",
        "–" if fraction is None else f"{fraction:.2f}",
        *(_ratio(group, baseline) for baseline in baselines),
        "–" if ours is None else _mib(ours["peak_bytes"]),
        "–" if rival is None else _mib(group[rival[0]]["peak_bytes"]),
    )


def _own_time(group: Group) -> str:
    """What stands in place of our time when there is none."""
    return str(group[OURS]["status"]) if OURS in group else "–"


def sweep_table(records: Iterable[Record]) -> Table | None:
    """Fraction of the floor by number of tokens."""
    found = [g for g in groups(records) if any_of(g)["suite"] == "sweep" and timed(g, OURS)]
    if not found:
        return None
    rows = []
    for group in found:
        case, fraction = any_of(group), floor_fraction(group)
        size = {"float32": 4}.get(case["dtype"], 2) * case["T"] * (2 * case["d_out"] + case["d_in"])
        rows.append(
            (
                case["dtype"],
                str(case["T"]),
                f"{_ms(group[OURS]['min_s'])} ({_ms(group[OURS]['median_s'])})",
                f"{size / group[OURS]['min_s'] / 1e9:.1f}",
                "–" if fraction is None else f"{fraction:.2f}",
                _ratio(group, "addmm"),
            )
        )
    columns = ("dtype", "T", "ours ms", "GB/s", "of floor", "x addmm")
    return Table("Size sweep: residual add into out=, d = 1024, r = 8", columns, tuple(rows))


def model_table(records: Iterable[Record]) -> Table | None:
    """Step time, loss and accuracy of each configuration of the model benchmark."""
    group = {record["provider"]: record for record in records if record["suite"] == "model"}
    if not group:
        return None
    rows = []
    for name, record in group.items():
        ok = record["status"] == "ok"
        rows.append(
            (
                LABELS[name],
                f"{record['trainable_parameters']:,}",
                f"{_ms(record['min_s'])} ({_ms(record['median_s'])})" if ok else record["status"],
                f"{record['losses'][-1]:.4f}",
                f"{record['accuracy']:.3f}",
                _mib(record["peak_bytes"]),
                "–" if record["error"] is None else f"{record['error']:.1e}",
            )
        )
    columns = (
        "configuration",
        "trained parameters",
        "step ms",
        "last loss",
        "held-out accuracy",
        "peak MiB",
        "drift from eager",
    )
    steps = len(next(iter(group.values()))["losses"])
    tokens = next(iter(group.values()))["T"]
    return Table(f"MiniLM on review snippets: {steps} steps of {tokens} tokens, fp32", columns, tuple(rows))


def _case_of(record: Record) -> str:
    routing = "" if record["routing"] is None else f" {record['routing']}"
    return f"{record['op']}{routing} {record['direction']} {record['dtype']} T={record['T']} r={record['r']}"


def refusals_table(records: Iterable[Record]) -> Table | None:
    """Every provider that was not timed, and why."""
    bad = [record for record in records if record["status"] != "ok"]
    if not bad:
        return None
    rows = tuple((record["provider"], _case_of(record), record["status"], record["reason"]) for record in bad)
    return Table("Not timed", ("provider", "case", "status", "reason"), rows)


def targets_table(rows: Sequence[Row]) -> Table:
    """The table of targets: must, aim, measured, ok."""
    columns = ("quantity", "must", "aim", "measured", "(median)", "ok", "limit", "worst at", "fastest other there")
    return Table("Targets", columns, tuple(_target_row(row) for row in rows))


_UNITS = {
    "x": "{:.2f}x",
    "of floor": "{:.2f} of floor",
    "us": "{:.1f} us",
    "T·r": "{:.2f} T·r",
    "of 4k": "{:.2f} of 4k",
}


def _target_row(row: Row) -> tuple[str, ...]:
    unit, measured = _UNITS[row.target.unit], row.measured
    head = (
        row.target.quantity,
        unit.format(row.target.must),
        "–" if row.target.aim is None else unit.format(row.target.aim),
    )
    if measured is None:
        return (*head, "not measured", "", "–", "", "", "")
    group = measured.group
    other = targets.fastest_other(group) if group is not None else None
    return (
        *head,
        unit.format(measured.value),
        "" if measured.median is None else unit.format(measured.median),
        _verdict(row),
        "" if measured.limit is None else unit.format(measured.limit),
        "" if group is None else f"{any_of(group)['T']} x {any_of(group)['d_in']}, r={any_of(group)['r']}",
        "" if other is None else f"{other[1]:.2f}x {other[0]}",
    )


def _verdict(row: Row) -> str:
    """NO, yes or aim; with a mark where the case was measured on a busy machine and should be measured again."""
    assert row.measured is not None
    word = "NO" if not row.ok else "aim" if row.reaches_aim else "yes"
    disturbed = row.measured.group is not None and targets.noisy(row.measured.group)
    return f"{word} (noisy)" if disturbed else word


def all_tables(records: Sequence[Record]) -> list[Table]:
    """Every table that the records have something for."""
    optional = (sweep_table(records), model_table(records), refusals_table(records))
    return [*ops_tables(records), *(table for table in optional if table is not None)]


def markdown(records: Sequence[Record], tables: Iterable[Table], command: str) -> str:
    """The report as one markdown document."""
    head = f"Command: `{command}`\n\n{describe_run(records)}\n\nTimes are minimum (median); ratios likewise.\n"
    return "\n".join([head, *(table.markdown() for table in tables)])
