"""Times our ops on a GPU against every peer: `python -m lowrank_fast.bench.gpu.measure --out FOLDER`.

Problems, peers and the gate against float64 are those of `lowrank-fast bench`; the tensors lie on the GPU. Each of our
backends that can run there has a run of its own, with the peers beside it: BACKEND.jsonl (a record per measurement)
and BACKEND.md in FOLDER. A sample is one call, between two events of the stream, after the L2 cache was overwritten;
providers take turns in random order. `host_s` is the least time that a call took to return, without waiting.

`--device cpu` is a rehearsal: the same program on CPU tensors, with a wall clock.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lowrank_fast import backends

from .. import report
from ..cases import Case, Inputs, residual, routed
from ..gate import Expected
from ..records import Record, write_jsonl, write_text
from ..registry import ARITHMETIC, providers_for
from ..runner import Entry, admit, quiet_process, records_of

SAMPLES, HOST_CALLS = 50, 20
RESIDUAL = ("forward", "forward_out", "forward_inplace", "backward_out", "forward_backward")
ROUTED = ("forward", "forward_inplace", "forward_backward")


def plan(quick: bool) -> list[Case]:
    """Residual add from one token to 8192, and both routed forms; `quick` (a rehearsal): one small shape of each."""
    sizes = [(17, 256)] if quick else [(1, 4096), (64, 4096), (2048, 4096), (8192, 4096), (8192, 1024)]
    ranks = (8,) if quick else (8, 16, 32, 64)
    dtypes = (torch.float32,) if quick else (torch.bfloat16, torch.float32)
    found = []
    for dtype in dtypes:
        for T, d in sizes:
            found += [Case(residual(dtype, T, d, r), direction) for r in ranks for direction in RESIDUAL]
        T, d = sizes[-1]
        found += [Case(routed(kind, dtype, T, d, 8), direction) for kind in ("batch", "token") for direction in ROUTED]
    return found


class Stopwatch:
    """Seconds of one call on `device`."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.cold = torch.empty(max(1, 2 * cache), dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Of the device: from the start of the call's first kernel to the end of its last."""
        if not self.cuda:
            return self.host(call)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cold.zero_()  # also keeps the device busy while the host gets ahead
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def host(self, call: Callable[[], Any]) -> float:
        """Of the host: until the call returns."""
        if self.cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def peak_bytes(self, call: Callable[[], Any], otherwise: int | None) -> int | None:
        """What the call allocates on a GPU at its highest; `otherwise` on a CPU."""
        if not self.cuda:
            return otherwise
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before


def run_case(
    case: Case, device: torch.device, samples: int, order: random.Random, only: frozenset[str] | None = None
) -> list[Record]:
    """A record for every provider of the case (or those in `only`) with its times; one that is wrong gets none."""
    watch, host = Stopwatch(device), {}
    with torch.set_grad_enabled(case.direction == "forward_backward"):
        inputs = Inputs(case.problem, device)
        expected = Expected(inputs)
        offered = providers_for(case.problem.family, case.direction, only)
        entries = [admit(p, build, case, inputs, expected) for p, build in offered if p.name != ARITHMETIC]
        running = [entry for entry in entries if entry.prepared is not None]
        for entry in running:
            call = _call(entry)
            entry.peak_bytes = watch.peak_bytes(call, entry.peak_bytes)
            host[entry.provider.name] = min(watch.host(call) for _ in range(HOST_CALLS))
        with quiet_process():
            for _ in range(samples):
                order.shuffle(running)
                for entry in running:
                    entry.seconds.append(watch.seconds(_call(entry)))
    torch._dynamo.reset()
    return [record | {"host_s": host.get(record["provider"])} for record in records_of(case, entries)]


def _call(entry: Entry) -> Callable[[], Any]:
    assert entry.prepared is not None
    return entry.prepared.call


def possible_backends(device: torch.device) -> list[str]:
    """Our backends that run on `device`, best first."""
    kinds = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [name for name in backends.available() if name in kinds]


def run(
    out: Path, device: torch.device, cases: Sequence[Case], samples: int, only: frozenset[str] | None = None
) -> int:
    """Measure every backend and write its files; 1 when none could run or one of ours was refused or failed."""
    status = 0 if possible_backends(device) else 1
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    for name in possible_backends(device):
        records, order = [], random.Random(0)
        # the op-level backward goes through the dispatcher, which has the first of them
        measured = [c for c in cases if c.direction != "backward_out" or name == possible_backends(device)[0]]
        with backends.use_backend(name):
            for number, case in enumerate(measured, 1):
                print(f"{name}: {number}/{len(measured)} {case.describe()}", file=sys.stderr, flush=True)
                records += [r | {"gpu": gpu, "backend": name} for r in run_case(case, device, samples, order, only)]
        write_jsonl(out / f"{name}.jsonl", records)
        text = report.markdown(records, report.all_tables(records), f"bench/gpu/measure.py, {name} on {gpu or device}")
        write_text(out / f"{name}.md", text)
        print(text, end="")
        if any(r["status"] != "ok" for r in records if r["provider"] == "ours"):
            status = 1
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="time our ops on a GPU against every peer")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the results")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cuda (default), or cpu")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each provider in each case (default: 50)")
    parser.add_argument(
        "--only", type=lambda text: frozenset(text.split(",")), help="of the providers, such as ours,addmm"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes only: a rehearsal")
    options = parser.parse_args(arguments)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("measure: torch sees no CUDA GPU; --device cpu rehearses", file=sys.stderr)
        return 2
    return run(options.out, options.device, plan(options.quick), options.samples, options.only)


if __name__ == "__main__":
    raise SystemExit(main())
