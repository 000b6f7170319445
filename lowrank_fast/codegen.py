"""`lowrank-fast codegen`: compile every kernel configuration ahead of time and read its machine code. No GPU needed.

For the Triton kernels on sm_80, sm_90, sm_100 and gfx942, and for the CUDA kernels (cuda_codegen.py): registers,
spills, shared memory, CTAs per SM, bytes in flight per SM, width of the streaming loads, asynchronous copies, matrix
instructions, atomics, DRAM bytes by formula and a modelled time. What is compiled is what the backend would launch: the
Triton ops are called with meta tensors and their launches recorded.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cuda_codegen
from . import triton_backend as backend

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
ON_REQUEST = ("sm_89",)  # GeForce cards: sm_80's tiles in less shared memory
COLUMNS = (
    "kernel", "config", "arch", "registers", "spills", "shared_bytes", "ctas_per_sm", "bytes_in_flight", "load_bytes",
    "async_copies", "tensor_ops", "atomics", "dram_bytes", "model_seconds",
)  # fmt: skip
# Kernels that a worker compiles for one of NVIDIA's architectures before it starts the disassembler. AMD's, whose
# assembly is text, come one at a time, and last: they even out when the workers end.
NVIDIA_SHARE = 16
HEAD = (
    "kernel", "configuration", "arch", "regs", "spill", "shared KB", "CTA/SM", "KB in flight", "load B", "async",
    "matrix", "atomic", "DRAM MB", "model µs", "",
)  # fmt: skip


class Config(NamedTuple):
    """One call of one op: what decides which kernels run and how they are compiled."""

    op: str  # "residual", "dx", "rms" or "layer" (residual add with the next norm), "batch", "static" or "token"
    direction: str  # "forward" or "backward"
    T: int
    d: int
    rank: int
    experts: int
    dtype: str
    parameter: str
    router_input: str
    dropout: bool

    def __str__(self) -> str:
        text = f"{self.op} {self.direction} T={self.T} d={self.d} r={self.rank} {self.dtype}"
        if self.parameter != self.dtype:
            text += f"/{self.parameter}"
        if self.op in ("batch", "static", "token"):
            text += f" E={self.experts} on {self.router_input}"
        return text + (" dropout" if self.dropout else "")


def configurations(quick: bool = False) -> list[Config]:
    """Every configuration that ships: each row of the launch table, for the ops that reach it."""
    both = ("forward", "backward")
    found = [_config("residual", "forward", T, r) for r in (16, 32, 64) for T in (128, 1024, 4096, 8192)]
    found += [_config("residual", "backward", 8192, r) for r in (16, 32, 64)]
    found += [_config("dx", "backward", 8192, r) for r in (16, 64)]
    if quick:
        return found
    found += [_config(op, way, 8192, r) for op in ("batch", "token") for r in (16, 64) for way in both]
    found += [_config("batch", way, 8192, 16, on="x") for way in both]
    found += [_config("token", "backward", 8192, 16, on="x"), _config("batch", "backward", 8192, 128, on="x")]
    found += [_config("token", "forward", 8192, 32), _config("batch", "forward", 4096, 16)]
    found += [_config("static", "forward", 8192, 32)]
    found += [_config("batch", "forward", 128, r) for r in (16, 64, 128)]
    found += [_config("batch", "forward", 128, r, "float32") for r in (16, 64, 128)]
    found += [_config("batch", "forward", 16, r) for r in (16, 64, 128)] + [
        _config("batch", "forward", 16, 16, "float32")
    ]
    found += [_config("token", "forward", 128, r) for r in (16, 64, 128)]
    found += [_config("token", "forward", 128, 128, "float32")]
    found += [_config("batch", "forward", 128, 16, on="x", dropout=True), _config("static", "forward", 128, 16)]
    found += [_config("batch", "forward", 128, r, "float32", on="x", dropout=True) for r in (64, 128)]
    found += [_config("residual", "forward", 4096, 32, dropout=True)]
    found += [_config(op, "backward", 8192, 16)._replace(d=16384) for op in ("residual", "batch")]
    found += [_config("residual", way, 8192, 128) for way in both]
    found += [_config("residual", "forward", 1024, 128), _config("residual", "forward", 8192, 8)]
    found += [_config("residual", way, 8192, 16, dropout=True) for way in both]
    found += [_config("residual", way, 8192, 16, parameter="float32") for way in both]
    found += [_config("residual", "forward", 8192, 16, "float16")]
    found += [_config("rms", "forward", 8192, 16), _config("layer", "forward", 8192, 64)]
    for r in (16, 64):
        found += [_config(op, way, 8192, r, "float32") for op in ("residual", "batch") for way in both]
        found += [_config("residual", "forward", 1024, r, "float32")]
    found += [_config(op, "forward", 8192, 128, "float32") for op in ("residual", "batch")]
    found += [_config("token", way, 8192, r, "float32") for r in (16, 64) for way in both]
    found += [_config("dx", "backward", 8192, 64, "float32", dropout=True)]
    return list(dict.fromkeys(found))


def _config(
    op: str, direction: str, T: int, rank: int, dtype: str = "bfloat16", *, parameter: str | None = None, on: str = "t",
    dropout: bool = False,
) -> Config:  # fmt: skip
    return Config(op, direction, T, 4096, rank, 4, dtype, parameter or dtype, on, dropout)


def launches(config: Config, architecture: str) -> list[Any]:
    """The launches of one configuration, recorded and not run."""
    recorded: list[Any] = []

    def record(launch: Any) -> bool:
        recorded.append(launch)
        return True

    with backend.kernels("launch").observing(record, architecture):
        _call(config)
    return recorded


def _call(c: Config) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    activation, parameter = getattr(torch, c.dtype), getattr(torch, c.parameter)
    shape = (c.T,)
    y, x, g = (meta(*shape, c.d, dtype=activation) for _ in range(3))
    A, t = meta(c.rank, c.d, dtype=parameter), meta(*shape, c.rank)
    p, seed = (0.1, meta(2, dtype=torch.int64)) if c.dropout else (0.0, None)
    if c.op in ("residual", "dx"):
        B = meta(c.d, c.rank, dtype=parameter)
        if c.direction == "forward":
            backend.residual_add(y, x, A, B, 0.5, p, seed, True)
        else:
            everything = c.op == "residual"
            backend.residual_add_backward(g, x, t, A, B, 0.5, p, seed, True, everything, everything)
        return
    if c.op in ("rms", "layer"):
        layer, weight = c.op == "layer", meta(c.d, dtype=parameter)
        B = meta(c.d, c.rank, dtype=parameter)
        backend.residual_add_norm(y, x, A, B, 0.5, weight, weight if layer else None, 1e-5, layer)
        return
    B = meta(c.experts, c.d, c.rank, dtype=parameter)
    static = c.op == "static"
    R = None if static else meta(c.experts, c.rank if c.router_input == "t" else c.d, dtype=parameter)
    weights = meta(c.experts) if static else None
    if c.direction == "forward":
        backend.routed_projection(y, x, A, B, R, weights, None, 0.5, c.op, c.router_input, p, seed)
        return
    probabilities = meta(0) if static else meta(*shape, c.experts)
    w = meta(0 if c.op == "token" else c.experts)
    needs = [True, True, True, not static, static]
    backend.routed_projection_backward(
        g, x, t, probabilities, w, A, B, R, None, None, 0.5, c.op, c.router_input, p, seed, needs
    )


def _facts(architecture: str, kernels: list[tuple[Config, int]]) -> list[dict[str, Any]]:
    """Some kernels, compiled and read; runs in a worker process."""
    model = backend.kernels("model")
    recorded = [launches(config, architecture)[index] for config, index in kernels]
    found: list[dict[str, Any]] = backend.kernels("machine").inspect(recorded, architecture)
    for (config, _), launch, facts in zip(kernels, recorded, found, strict=True):
        facts.update(
            kernel=launch.name,
            config=str(config),
            arch=architecture,
            grid=list(launch.grid),
            warps=launch.warps,
            stages=launch.stages,
            bytes_in_flight=model.bytes_in_flight(launch, architecture, facts["ctas_per_sm"]),
            dram_bytes=model.dram_bytes(launch),
            l2_bytes=model.l2_bytes(launch),
            model_seconds=model.seconds(launch, architecture)[0],
        )
    return found


def _worker() -> None:
    """Once in each worker process. The compiler leaves no cycles of Python objects worth looking for."""
    torch.set_num_threads(1)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    gc.disable()


class Task(NamedTuple):
    """A worker's share: kernels of one architecture, as places in the whole table, configurations, and the index of the
    launch in each."""

    architecture: str
    places: list[int]
    kernels: list[tuple[Config, int]]


def _shares(configs: list[Config], architectures: list[str]) -> list[list[Task]]:
    """Each distinct kernel once per architecture, as a launch of the first configuration that has it. A share holds
    what came of a few kernels' source on NVIDIA's architectures, one after the other, or on another one."""
    signature = backend.kernels("machine").signature
    shares: dict[tuple[bool, int], dict[str, Task]] = {}
    sources: dict[bool, dict[tuple[str, str], int]] = {True: {}, False: {}}
    place = 0
    for architecture in architectures:
        seen: set[tuple[object, ...]] = set()
        nvidia = architecture.startswith("sm_")
        for config in configs:
            for index, launch in enumerate(launches(config, architecture)):
                source = (launch.name, str(signature(launch)))
                if (source, launch.warps, launch.stages) in seen:
                    continue
                seen.add((source, launch.warps, launch.stages))
                number = sources[nvidia].setdefault(source, len(sources[nvidia]))
                share = shares.setdefault((not nvidia, number // NVIDIA_SHARE if nvidia else number), {})
                task = share.setdefault(architecture, Task(architecture, [], []))
                task.places.append(place)
                task.kernels.append((config, index))
                place += 1
    return [list(shares[key].values()) for key in sorted(shares)]


def _share_facts(share: list[Task]) -> list[dict[str, Any]]:
    return [facts for task in share for facts in _facts(task.architecture, task.kernels)]


def compile_all(
    configs: list[Config],
    architectures: list[str],
    jobs: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[dict[str, Any]]:
    """Facts of every distinct kernel, by architecture in the order of the configurations."""
    shares = _shares(configs, architectures)
    total = sum(len(task.places) for share in shares for task in share)
    found: dict[int, dict[str, Any]] = {}
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, "triton"])
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_worker) as pool:
        futures = [pool.submit(_share_facts, share) for share in shares]
        for share, future in zip(shares, futures, strict=True):
            try:
                facts = future.result()
            except BrokenProcessPool:  # an assertion in the compiler ends its process, and with it the pool
                architecture, _, ((config, index), *_) = share[0]
                name = launches(config, architecture)[index].name
                raise RuntimeError(
                    f"the compiler crashed at or soon after {name}, {config}, {architecture} ({len(found)} kernels of "
                    f"{total} were done); --jobs 1 and --arch say at which"
                ) from None
            found.update(zip([place for task in share for place in task.places], facts, strict=True))
            progress(len(found), total)
    return [found[place] for place in range(total)]


def ieee(config: str) -> bool:
    """Whether a configuration, as text, has float32 products for which IEEE arithmetic was asked for."""
    return " float32" in config and backend.kernels("common").FLOAT32_PRECISION.value == "ieee"


def faults(row: dict[str, Any]) -> list[str]:
    """What a shipped kernel must not do, and this one does; empty when it is sound."""
    found = []
    if row["spills"] or row["local_accesses"]:
        found.append(f"spills {row['spills']} bytes")
    if row["atomics"]:
        found.append(f"{row['atomics']} atomics")
    if row["shared_bytes"] > backend.kernels("machine").LARGEST_BLOCK[row["arch"]]:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory")
    if row["ctas_per_sm"] == 0:
        found.append("does not fit a multiprocessor")
    if row["dots"] and not row["tensor_ops"] and not ieee(row["config"]):
        found.append("a dot without matrix instructions")
    if row["load_bytes"] and row["load_bytes"] < 16:
        found.append(f"streams in accesses of {row['load_bytes']} bytes")
    if row["synchronous_streams"] and row["arch"] != "gfx942":  # which has no asynchronous copy that Triton uses
        found.append(f"{row['synchronous_streams']} streaming loads that are not asynchronous")
    return found


# ------------------------------------------------------------------------------------------------ the command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `lowrank-fast codegen`."""
    parser.add_argument("--json", metavar="FILE", help='write {"kernels": [...]} to FILE')
    parser.add_argument("--table", metavar="FILE", help="write the table as Markdown to FILE")
    parser.add_argument("--kernels", choices=("triton", "cuda"), help="only these (default: both)")
    parser.add_argument(
        "--arch",
        action="append",
        choices=list(dict.fromkeys((*ARCHITECTURES, *ON_REQUEST, *cuda_codegen.ARCHITECTURES))),
        help=f"only this one (repeatable; default: all but {', '.join(ON_REQUEST)})",
    )
    parser.add_argument(
        "--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="the residual add alone")


def run(args: argparse.Namespace) -> int:
    """Compile, print the table, write files; 0 when every kernel is sound, 1 when one is not, 2 when none can be
    compiled."""
    reasons = {"triton": unavailable_reason(), "cuda": cuda_codegen.unavailable_reason()}
    wanted = [args.kernels] if args.kernels else list(reasons)
    for name in wanted:
        if reasons[name]:
            print(f"lowrank-fast codegen: no {name} kernels: {reasons[name]}", file=sys.stderr)
    possible = [name for name in wanted if not reasons[name]]
    configs = configurations(args.quick)
    cuda_configs = configs if args.quick else [*configs, *cuda_codegen.configurations()]

    def progress(done: int, of: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done}/{of} kernels", end="" if done < of else "\n", file=sys.stderr, flush=True)

    kernels, texts, sound = [], [], True
    if "triton" in possible:
        architectures = [name for name in args.arch or ARCHITECTURES if name in (*ARCHITECTURES, *ON_REQUEST)]
        try:
            kernels += compile_all(configs, architectures, args.jobs, progress)
        except RuntimeError as error:
            print(f"lowrank-fast codegen: {error}", file=sys.stderr)
            return 1
        texts.append(table(kernels, configs, architectures))
        sound = not any(faults(row) for row in kernels)
    if "cuda" in possible:
        rows = cuda_codegen.rows(
            cuda_codegen.compiled_facts(args.jobs), cuda_configs, args.arch or cuda_codegen.ARCHITECTURES
        )
        kernels += rows
        texts.append(cuda_table(rows))
        sound = sound and not any(cuda_codegen.faults(row) for row in rows)
    text = "\n".join(texts)
    print(text)
    if args.json:
        _write(Path(args.json), json.dumps({"kernels": kernels}, indent=1) + "\n")
    if args.table:
        _write(Path(args.table), text)
    return 2 if not possible else 0 if sound else 1


def unavailable_reason() -> str | None:
    """Why kernels cannot be compiled here, in one line; None when they can."""
    import importlib.util

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return "TRITON_INTERPRET must not be 1: interpreted kernels cannot be compiled"
    try:
        backend.kernels("common")
    except RuntimeError as error:
        return str(error)
    return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def table(kernels: list[dict[str, Any]], configs: list[Config], architectures: list[str]) -> str:
    """The report: one row per kernel, then the modelled fraction of the copy bandwidth per op."""
    import triton

    lines = [
        "# Triton kernels: machine code and modelled time",
        "",
        f"Written by `lowrank-fast codegen` with Triton {triton.__version__}, from code compiled without a GPU.",
        "DRAM bytes and times are a **model**, not a measurement. Loads and async copies concern the streamed",
        "activations; `KB in flight` is per multiprocessor.",
        "",
        *_table_lines(kernels, faults),
    ]
    return "\n".join([*lines, "", *_summary(configs, architectures)]) + "\n"


def cuda_table(rows: list[dict[str, Any]]) -> str:
    """The report on the CUDA kernels: one row per kernel and architecture."""
    lines = [
        "# CUDA kernels: machine code and modelled time",
        "",
        "Written by `lowrank-fast codegen`, from code that nvcc compiled without a GPU. DRAM bytes and times are a",
        "**model**, not a measurement: each argument of a launch once, at the copy bandwidth of the best-known part.",
        "",
        *_table_lines(rows, cuda_codegen.faults),
    ]
    return "\n".join(lines) + "\n"


def _table_lines(rows: list[dict[str, Any]], faults: Callable[[dict[str, Any]], list[str]]) -> list[str]:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        cells = [
            row["kernel"], row["config"], row["arch"], row["registers"], row["spills"],
            f"{row['shared_bytes'] / 1024:.0f}", row["ctas_per_sm"], f"{row['bytes_in_flight'] / 1024:.0f}",
            row["load_bytes"] or "–", row["async_copies"], row["tensor_ops"], row["atomics"],
            f"{row['dram_bytes'] / 1e6:.1f}", f"{row['model_seconds'] * 1e6:.1f}", "; ".join(faults(row)),
        ]  # fmt: skip
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _summary(configs: list[Config], architectures: list[str]) -> list[str]:
    """Whole ops: launches, passes over the activations, and the fraction of the copy bandwidth, beside other
    implementations."""
    model = backend.kernels("model")
    lines = [
        "## Whole operations (model)",
        "",
        "Floor: 3 passes over `[T, d]` (2 where `x` alone needs a gradient) at the copy bandwidth. `fraction` takes L2",
        "to deliver twice the copy bandwidth; `strict` charges every re-read as if it missed L2.",
        "",
        "| operation | arch | launches | DRAM passes | model µs | fraction | strict |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture in architectures:
        rate = model.BANDWIDTH[architecture]
        for config in configs:
            recorded = launches(config, architecture)
            one = config.T * config.d * getattr(torch, config.dtype).itemsize
            passes = sum(model.dram_bytes(launch) for launch in recorded) / one
            times = [model.seconds(launch, architecture) for launch in recorded]
            ours, strict = (sum(values) for values in zip(*times, strict=True))
            floor = (2 if config.op == "dx" else 3) * one / rate
            lines.append(
                f"| {config} | {architecture} | {len(recorded)} | {passes:.2f} | {ours * 1e6:.1f} | "
                f"{floor / ours:.0%} | {floor / strict:.0%} |"
            )
    lines += ["", "## The same model for other implementations (residual add, T = 8192, d = 4096, bfloat16, H100)", ""]
    lines += ["| direction | implementation | passes | model µs | fraction |", "|---|---|---|---|---|"]
    one = 8192 * 4096 * 2 / model.BANDWIDTH["sm_90"]
    for direction, others in model.OTHERS.items():
        for name, passes in others.items():
            lines.append(f"| {direction} | {name} | {passes} | {passes * one * 1e6:.0f} | {3 / passes:.0%} |")
    return lines
