"""`lowrank-fast bench`: what is measured, for how long, and where the results go.

`add_arguments(parser)` declares the options and `run(args)` does the work; the command line of the package calls both.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lowrank_fast.info import cpu_model

from . import environment, plans
from .cases import Case, residual
from .records import Record, write_jsonl, write_text

SUITES = ("ops", "sweep", "model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_MINUTES, QUICK_MINUTES, TARGET_MINUTES = 3.0, 0.75, 10.0
# what is left of the whole time after imports, tables and plots, and how the suites share it
SHARES = {"ops": 0.55, "sweep": 0.10, "model": 0.28}
MODEL_STEPS, MODEL_STEPS_QUICK = 60, 8
OVERHEAD_ROUNDS = 200
BUSY = 1.0  # load average at the start from which the run says that it is not alone


# ------------------------------------------------------------------------------------------------ options


def _list_of(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = [name for name in names if name not in allowed]
        if unknown or not names:
            raise argparse.ArgumentTypeError(
                f"must be a comma-separated list out of {', '.join(allowed)}; got {text!r}"
            )
        return list(dict.fromkeys(names))

    return parse


def _shapes(text: str) -> tuple[plans.Shape, ...]:
    shapes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", part)
        if match is None or 0 in (int(match[1]), int(match[2])):
            raise argparse.ArgumentTypeError(
                f"must be TOKENSxWIDTH, comma-separated, such as 2048x4096,64x4096; got {text!r}"
            )
        shapes.append((int(match[1]), int(match[2])))
    return tuple(dict.fromkeys(shapes))


def _positive_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text!r}")
    return value


def _threads(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `bench` on `parser`."""
    default_shapes = ",".join(f"{tokens}x{width}" for tokens, width in plans.DEFAULT_SHAPES)
    parser.add_argument(
        "--suite",
        type=_list_of(SUITES),
        default=None,
        metavar="LIST",
        help="which suites: ops,sweep,model (default: all)",
    )
    parser.add_argument("--quick", action="store_true", help="one rank, two shapes and few steps: under a minute")
    parser.add_argument(
        "--targets",
        action="store_true",
        help="measure and print the table of targets, up to ten minutes; no other suite",
    )
    parser.add_argument(
        "--minutes",
        type=_positive_number,
        default=None,
        help=f"time to aim for (default: {DEFAULT_MINUTES:g}; --quick {QUICK_MINUTES:g}; --targets {TARGET_MINUTES:g})",
    )
    parser.add_argument(
        "--dtype",
        type=_list_of(tuple(DTYPES)),
        default=None,
        metavar="LIST",
        help="of the ops and the sweep: float32,bfloat16,float16 (default: float32, and bfloat16 on a processor with "
        "products of it)",
    )
    parser.add_argument("--threads", type=_threads, default=2, help="torch.set_num_threads (default: 2)")
    parser.add_argument(
        "--shapes", type=_shapes, default=None, metavar="TxD,..", help=f"of the ops (default: {default_shapes})"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench") / "results",
        metavar="DIR",
        help="a folder named by date and processor is made in it (default: bench/results)",
    )


# ------------------------------------------------------------------------------------------------ the run


def results_folder(out: Path) -> Path:
    """`<out>/<date-time>-<processor>`."""
    cpu = re.sub(r"[^A-Za-z0-9]+", "-", re.sub(r"\((R|TM|C)\)", "", cpu_model())).strip("-").lower()
    return out / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{cpu[:40]}"


class Session:
    """The records of one run, the time it may take, and its progress bar."""

    def __init__(self, advance: Callable[[str], None], show: Callable[[str], None]) -> None:
        self.records: list[Record] = []
        self.advance, self.show = advance, show
        self.order = random.Random(0)

    def run_cases(self, cases: list[Case], seconds: float) -> None:
        """Measure `cases`; what one leaves of its share, or overruns, the later ones get or lose."""
        from .runner import Workspace, run_case

        workspace, deadline = Workspace(), time.perf_counter() + seconds
        for index, case in enumerate(cases):
            budget = max(0.0, deadline - time.perf_counter()) / (len(cases) - index)
            self.records += run_case(case, workspace, budget, self.order, report=self.show)
            self.advance(case.describe())

    def run_overhead(self, dtypes: list[torch.dtype]) -> None:
        from .overhead import measure_overhead, measure_saved

        self.show("overhead of a call")
        self.records += measure_overhead(OVERHEAD_ROUNDS, self.order)
        self.records += [measure_saved(residual(dtype, 4096, 768, 8)) for dtype in dtypes]
        self.advance("overhead of a call")

    def run_model(self, steps: int, seconds: float) -> None:
        from .model import run_model

        self.records += run_model(steps, seconds, self.show)
        self.advance("model")


@contextmanager
def progress_bar(units: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """`(advance, show)`: redrawn only when they are called, so no thread of the bar runs while the clock does."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=units)

        def show(message: str) -> None:
            bar.update(task, description=message, refresh=True)

        def advance(message: str) -> None:
            bar.update(task, advance=1, description=message, refresh=True)

        yield advance, show


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables, write `results.jsonl`, `report.md` and the plots.

    Returns 0; 1 when a provider was refused or ours failed; 2 when a suite asked for by name lacks its data.
    """
    from . import plots, report, text  # noqa: F401  (a missing package is found before the measurements, not after)

    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtypes = [DTYPES[name] for name in args.dtype or environment.default_dtypes()]
    if not args.dtype and torch.bfloat16 not in dtypes:
        print("bfloat16 is left out: PyTorch has no fast product of it on this processor; --dtype names the types.")
    minutes = args.minutes or (TARGET_MINUTES if args.targets else QUICK_MINUTES if args.quick else DEFAULT_MINUTES)
    load = environment.load_average()
    if load > BUSY:
        print(f"The load average is {load:.1f}: other work on this machine will disturb the figures.")
    folder = results_folder(args.out)
    suites = [] if args.targets else args.suite or list(SUITES)
    missing: str | None = None
    if "model" in suites:
        try:
            text.require()
        except text.MissingData as error:
            missing, suites = str(error), [suite for suite in suites if suite != "model"]
    records = _measure(args, dtypes, suites, minutes * 60.0, folder)
    if not records:
        print(missing or "nothing was measured")
        return 2
    _publish(args, records, folder, missing, time.perf_counter() - started)
    bad = [
        r
        for r in records
        if r["status"] == "refused" or (r["status"] == "failed" and r["provider"] in ("ours", "lor2c_fused"))
    ]
    if bad:
        return 1
    return 2 if missing and args.suite else 0


def _measure(
    args: argparse.Namespace, dtypes: list[torch.dtype], suites: list[str], seconds: float, folder: Path
) -> list[Record]:
    """Run the suites; what was measured is written even when a later suite is interrupted."""
    if args.targets:
        planned = {"targets": plans.targets(dtypes)}
    else:
        shapes = args.shapes or (plans.QUICK_SHAPES if args.quick else plans.DEFAULT_SHAPES)
        sizes = plans.SWEEP_QUICK if args.quick else plans.SWEEP_SIZES
        planned = {
            "ops": plans.ops(dtypes, shapes, args.quick) if "ops" in suites else [],
            "sweep": plans.sweep(dtypes, sizes) if "sweep" in suites else [],
        }
    shares = {"targets": 0.93} if args.targets else {suite: SHARES[suite] for suite in suites}
    total = sum(shares.values()) or 1.0
    time_for = {suite: 0.93 * seconds * share / total for suite, share in shares.items()}
    with_overhead = args.targets or "ops" in suites
    units = sum(map(len, planned.values())) + with_overhead + ("model" in suites)
    with progress_bar(units) as (advance, show):
        session = Session(advance, show)
        try:
            for suite, cases in planned.items():
                session.run_cases(cases, time_for.get(suite, 0.0))
            if with_overhead:
                session.run_overhead(dtypes)
            if "model" in suites:
                session.run_model(MODEL_STEPS_QUICK if args.quick else MODEL_STEPS, time_for["model"])
        finally:
            if session.records:
                write_jsonl(folder / "results.jsonl", session.records)
    return session.records


def _command(args: argparse.Namespace) -> str:
    """The command that was given, from the options that differ from their defaults."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = ["lowrank-fast bench"]
    for name, value in vars(args).items():
        if name not in vars(parser.parse_args([])) or value == parser.get_default(name) or value is None:
            continue
        if value is True:
            words.append(f"--{name}")
        elif name == "shapes":
            words.append("--shapes " + ",".join(f"{tokens}x{width}" for tokens, width in value))
        else:
            words.append(f"--{name} {','.join(value) if isinstance(value, list) else value}")
    return " ".join(words)


def _publish(
    args: argparse.Namespace, records: list[Record], folder: Path, missing: str | None, seconds: float
) -> None:
    """Print the tables, and write them and the plots beside the results."""
    from rich.console import Console

    from . import plots, report, targets

    console = Console(width=None if os.isatty(1) else 160)
    tables = report.all_tables(records)
    if args.targets:
        table = report.targets_table(targets.rows(records))
        write_text(folder / "targets.md", report.markdown(records, [table], _command(args)))
        tables.append(table)
    for table in tables:
        table.print(console)
    write_text(folder / "report.md", report.markdown(records, tables, _command(args)))
    written = plots.draw(records, folder)
    console.print(report.describe_run(records))
    if missing:
        console.print(f"[bold]Left out:[/] {missing}")
    console.print(f"{len(records)} records and {len(written)} plots in {folder} after {seconds:.0f} s")
