"""Bytes and modelled seconds of a launch, by formula. A model, not a measurement; nothing here ran on a GPU.

* `dram_bytes`: every argument read or written once, partials included although most of them stay in L2.
* `l2_bytes`: those bytes plus every re-read of a factor by each row block, of the partials of `u` by each column
  tile, and of `g` by row and column programs of one launch.
* `model_seconds = max(dram_bytes / B, l2_bytes / 2B)`: `B` the copy bandwidth of the architecture's best-known part, L2
  taken to deliver twice that; `strict_seconds = l2_bytes / B` charges re-reads as if they missed L2.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import Launch
from .table import PROCESSORS

# Bytes per second of a device-to-device copy. H100: measured on one (driver 580, 80 GB HBM3). The others: nine
# tenths of the data sheet (A100 80 GB 2.04, RTX 4090 1.01, B200 8.0, MI300X 5.3 TB/s).
BANDWIDTH = {"sm_80": 1.8e12, "sm_89": 0.9e12, "sm_90": 3.0e12, "sm_100": 7.2e12, "gfx942": 4.8e12}
# Passes over the activations of other implementations, residual add with d_in = d_out; the table of the design's floor.
OTHERS = {
    "forward": {
        "floor": 3,
        "PEFT eager": 7,
        "mm + addmm_ (Unsloth's order)": 3,
        "mm + addmm": 5,
        "HydraLoRA loop, E = 4": 36,
    },
    "backward": {
        "floor": 3,
        "PEFT eager": 9,
        "four hand-written GEMMs": 4,
        "Unsloth's order": 7,
        "LoRAFusion's split": 4,
    },
}


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _named(launch: Launch) -> dict[str, Any]:
    return dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants


def dram_bytes(launch: Launch) -> int:
    """Every tensor argument once; a tensor that is read and written (in place) twice."""
    unique = {id(value): value for value in launch.args if isinstance(value, torch.Tensor)}
    return sum(_bytes(value) for value in unique.values())


def l2_bytes(launch: Launch) -> int:
    """`dram_bytes` plus re-reads."""
    named, blocks = _named(launch), launch.grid[0]
    again = 0
    if launch.name == "residual_add_kernel":
        again = (blocks * launch.grid[1] - 1) * _bytes(named["A"]) + (blocks - 1) * _bytes(named["B"])
        again += (launch.grid[1] - 1) * _bytes(named["x"])
    elif launch.name == "routed_small_kernel":
        programs, walks = blocks * launch.grid[1] * launch.grid[2], blocks if named["MIX"] == "mean" else 1
        again = (programs * walks - 1) * sum(_bytes(named.get(name)) for name in ("A", "R"))
        again += (launch.grid[1] * walks - 1) * _bytes(named["x"]) + (blocks * launch.grid[2] - 1) * _bytes(named["B"])
    elif launch.name == "up_kernel":
        columns = named["up_tiles"]
        by_rows = (blocks - columns) * launch.grid[1]  # programs that own rows: they read g beside the columns' reads
        again = max(columns - 1, 0) * _bytes(named["t"]) + max(by_rows - 1, 0) * _bytes(named["B"])
        again += _bytes(named["g"]) if by_rows and columns else 0
        if named["EMIT_U"] or named["NEED_DW"]:
            again += (launch.grid[1] * launch.grid[2] - 1) * _bytes(named["B"])
    elif launch.name == "shrink_kernel":
        again = (blocks - 1) * sum(_bytes(named.get(name)) for name in ("A", "R"))
    elif launch.name == "residual_add_norm_kernel":
        again = (blocks - 1) * (_bytes(named["A"]) + _bytes(named["B"])) + _bytes(named["out"])
    elif launch.name in ("expand_kernel", "down_kernel"):
        factors = sum(_bytes(named.get(name)) for name in ("A", "B", "R"))
        hidden = sum(_bytes(named.get(name)) for name in ("t", "u_parts", "p", "dw_rows"))
        readers = launch.grid[1] * launch.grid[2]
        if named.get("HELD", 1) < named["E"] and named.get("MIX") == "token":  # read again for every block of rows
            readers = -(-named["T"] // named["BM"])
        again = (readers - 1) * factors + (blocks - 1) * hidden
    return dram_bytes(launch) + again


def seconds(launch: Launch, architecture: str) -> tuple[float, float]:
    """Modelled and strict time of one launch."""
    rate = BANDWIDTH[architecture]
    return max(dram_bytes(launch) / rate, l2_bytes(launch) / (2 * rate)), l2_bytes(launch) / rate


def bytes_in_flight(launch: Launch, architecture: str, ctas_per_sm: int) -> int:
    """Bytes of streamed tiles that a multiprocessor has asked for and not yet used: `stages - 1` tiles per resident
    CTA."""
    named = _named(launch)
    stream = next((named[name] for name in ("g", "x", "y") if isinstance(named.get(name), torch.Tensor)), None)
    if stream is None or "BM" not in named:
        return 0
    width = min(named[name] for name in ("BK", "BN", "BD") if named.get(name))
    programs = launch.grid[0] * launch.grid[1] * launch.grid[2]
    resident = min(ctas_per_sm, -(-programs // PROCESSORS[architecture]))
    return resident * (launch.stages - 1) * named["BM"] * width * stream.element_size()
