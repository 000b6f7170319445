"""The command `lowrank-fast`: `info`, `verify`, `bench` and `codegen`.

Exit status: 0, 1 when verification (or a benchmark's own checks) failed, 2 when the request cannot be carried out
(one line on standard error says why), 130 when interrupted.
Modules are imported by the subcommand that needs them, so that `--help` waits for nothing but torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__, backends

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from .verify import Case

FAILED, UNUSABLE, INTERRUPTED = 1, 2, 130

# Commands in modules of their own, which have `add_arguments(parser)` and `run(options) -> exit status`:
# module, help, and what to install when a package that it imports is missing.
DELEGATED = {
    "bench": (
        "lowrank_fast.bench.cli",
        "measure against eager PyTorch, torch.compile and PEFT",
        "lowrank-fast[bench]",
    ),
    "codegen": (
        "lowrank_fast.codegen",
        "compile the Triton kernels ahead of time and read their machine code",
        "triton",
    ),
}


class Unusable(Exception):
    """The request cannot be carried out on this machine; the message says why in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: those of the process) and return its exit status."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = build_parser(argv[0] if argv else None).parse_args(argv)
        handler: Callable[[argparse.Namespace], int] = options.handler
        wrong = backends.environment_error()
        if wrong is not None and handler is not run_info:
            raise Unusable(wrong)
        return handler(options)
    except BrokenPipeError:  # `lowrank-fast info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (Unusable, OSError) as error:  # OSError: a file that cannot be written names itself
        print(f"lowrank-fast: {error}", file=sys.stderr)
        return UNUSABLE
    except KeyboardInterrupt:
        print("lowrank-fast: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser for `command`: of the delegated commands only that one is imported, for its options."""
    parser = argparse.ArgumentParser(prog="lowrank-fast", description="Fused low-rank adapter kernels for PyTorch.")
    parser.add_argument("--version", action="version", version=f"lowrank-fast {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, backends, instruction sets and build facts")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(handler=run_info)

    verify = commands.add_parser(
        "verify",
        help="check every op, backend, dtype and gradient mask against float64 mathematics",
        description="Check every op, backend, dtype and gradient mask of this machine against float64 mathematics. "
        "Exit status 1 when anything is wrong.",
    )
    verify.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write every case as JSON to FILE, or print it"
    )
    verify.add_argument("--quick", action="store_true", help="one shape, and fewer gradient masks (seconds)")
    verify.add_argument(
        "--backend",
        action="append",
        choices=backends.NAMES,
        help="only this backend, which must be available (repeatable; default: all that are)",
    )
    verify.set_defaults(handler=run_verify)

    for name, (_, summary, _) in DELEGATED.items():
        delegate = commands.add_parser(name, help=summary)
        delegate.set_defaults(handler=run_delegated, command=name)
        if name == command:
            with delegated(name) as module:
                module.add_arguments(delegate)
    return parser


# ------------------------------------------------------------------------------------------------ info


def run_info(options: argparse.Namespace) -> int:
    from . import info

    facts = info.collect()
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        for section in info_tables(facts):
            stdout_console().print(section)
    wrong = backends.environment_error()
    if wrong is not None:  # what can run was shown; nothing does until the variable is right
        raise Unusable(wrong)
    return 0


def info_tables(facts: dict[str, Any]) -> Iterable[Table]:
    """The facts of `info.collect` as one table of two columns for each subject."""
    cpu, extension = facts["cpu"], facts["extension"]
    versions = {name: version or "not installed" for name, version in facts["versions"].items()}
    yield pairs("versions", versions)
    machine = {"platform": facts["platform"], "CPU": cpu["model"], "threads": str(cpu["threads"])}
    machine["GPU"] = ", ".join(facts["gpus"]) or "none that this torch can use"
    yield pairs("machine", machine | facts["environment"])
    yield pairs("backends", {name: reason or "available" for name, reason in facts["backends"].items()})
    if extension["missing"]:
        yield pairs("C++ extension", {"missing": extension["missing"]})
    else:
        kernels = {"instruction set": cpu["isa"], "this CPU can run": ", ".join(cpu["isas"]), "file": extension["file"]}
        yield pairs("C++ extension", kernels | extension["build"])


def pairs(title: str, rows: dict[str, str]) -> Table:
    """A table of names and values, without rules."""
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2, 0, 2)
    )
    table.add_column(min_width=16, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(Text(name), Text(str(value)))
    return table


# ------------------------------------------------------------------------------------------------ verify


def run_verify(options: argparse.Namespace) -> int:
    from . import verify

    names = list(dict.fromkeys(options.backend or backends.available()))
    for name in names:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            raise Unusable(f"backend {name!r} is not available: {reason}")
    with replaced_atomically(options.json) if options.json not in (None, "-") else nullcontext(sys.stdout) as file:
        total = len(verify.plan(names, options.quick))
        began = time.monotonic()
        cases = list(with_progress(verify.run(names, options.quick), total, "verifying"))
        report = verify_report(cases, names, options.quick, time.monotonic() - began)
        if options.json is not None:
            print(json.dumps(report), file=file)
    if options.json != "-":
        print_verify(cases, report)
    return FAILED if report["failed"] else 0


def verify_report(cases: Sequence[Case], names: Sequence[str], quick: bool, seconds: float) -> dict[str, Any]:
    """What `--json` writes: the machine (as in `lowrank-fast info --json`), the counts, and every case."""
    from . import info

    failed = sum(not case.passed for case in cases)
    return {
        "info": info.collect(),
        "verified_backends": list(names),
        "quick": quick,
        "seconds": round(seconds, 1),
        "passed": len(cases) - failed,
        "failed": failed,
        "cases": [case.to_dict() for case in cases],
    }


def print_verify(cases: Sequence[Case], report: dict[str, Any]) -> None:
    """One row for each op and backend, one column for each dtype; then every failure, and the verdict."""
    console = stdout_console()
    console.print(verify_table(cases))
    for case in (case for case in cases if not case.passed):
        console.print(f"FAILED {describe(case)}", style="red", markup=False, highlight=False)
        for failure in case.failures:
            console.print(f"    {failure}", markup=False, highlight=False)
    isa = report["info"]["cpu"]["isa"]
    console.print(
        f"{report['passed']} passed, {report['failed']} failed in {report['seconds']} s; "
        f"torch {report['info']['versions']['torch']}, CPU kernels: {isa or 'none'}",
        style="red" if report["failed"] else "green",
        highlight=False,
    )
    for name, reason in report["info"]["backends"].items():
        if reason is not None:
            console.print(f"not verified: {name} ({reason})", markup=False, highlight=False)


def verify_table(cases: Sequence[Case]) -> Table:
    from rich.table import Table

    from .verify import DTYPE_NAMES

    table = Table(
        title="largest error of any output or gradient, relative to float64 (and as a share of what is allowed)",
        title_justify="left",
    )
    for heading in ("op", "backend", "cases"):
        table.add_column(heading, justify="right" if heading == "cases" else "left", no_wrap=True)
    for name in DTYPE_NAMES.values():
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        rows.setdefault((case.problem.label, case.backend), []).append(case)
    for (label, backend), group in rows.items():
        cells = [dtype_cell([case for case in group if case.problem.dtype is dtype]) for dtype in DTYPE_NAMES]
        table.add_row(label, backend, str(len(group)), *cells)
    return table


def dtype_cell(cases: Sequence[Case]) -> str:
    """`1.2e-07 (51%)`: the largest error, and the largest share that an error had of its limit; or the failures."""
    if not cases:
        return ""
    failed = sum(not case.passed for case in cases)
    if failed:
        return f"[red]{failed} FAILED[/red]"
    errors = [error for case in cases for error in case.tensors.values()]
    worst = max(error.error for error in errors)
    share = max(error.error / error.limit for error in errors)
    return f"{worst:.1e} ({share:.0%})"


def describe(case: Case) -> str:
    """The case in one line, as one would call it."""
    from .verify import DTYPE_NAMES

    problem = case.problem
    dtypes = f"{DTYPE_NAMES[problem.dtype]}, parameters {DTYPE_NAMES[problem.parameter_dtype]}"
    mode = f"gradients of {', '.join(case.needs)}" if case.needs else case.mode
    return f"{problem.label}, {case.backend}, {dtypes}, {mode}, {problem.variant}, {problem.shape}"


# ------------------------------------------------------------------------------------------------ delegated commands


@contextmanager
def delegated(command: str) -> Iterator[ModuleType]:
    """The module of a delegated command; a package that is missing, then or in the block, becomes one sentence."""
    name, _, requirement = DELEGATED[command]
    try:
        yield importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise Unusable(
                f"this copy of lowrank_fast is not installed, and {command} needs that: pip install ."
            ) from None
        raise Unusable(f"{command} needs the package {error.name!r}: pip install '{requirement}'") from error


def run_delegated(options: argparse.Namespace) -> int:
    with delegated(options.command) as module:
        return int(module.run(options))


# ------------------------------------------------------------------------------------------------ shared


def stdout_console() -> Console:
    """A console that leaves the lines of a log or a pipe whole."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=140)


def with_progress(items: Iterable[Case], total: int, title: str) -> Iterable[Case]:
    """Pass `items` through under a progress bar on standard error, drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[at]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, at="")
        for item in items:
            yield item
            progress.update(task, advance=1, at=f"{item.backend}: {item.problem.label}")


@contextmanager
def replaced_atomically(name: str) -> Iterator[TextIO]:
    """A file beside the file `name` that takes its place when the block ends well: readers see the old one or the new.

    Raises OSError, before the block, where `name` cannot be written.
    """
    path = Path(name)
    if not path.name or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise type(error)(error.errno, error.strerror, name) from None
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
        os.chmod(temporary, 0o644)  # temporary files are private
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
