"""Launch choices: which tile, how many warps and pipeline stages, by kernel, architecture, element size, rank and T.

    row(kernel, architecture, element_bytes, RP, T) -> Tile

No autotuning at run time: a lookup is a walk through a handful of rows. `lowrank_fast.triton_kernels.tune` measures the
candidates on a GPU and writes a JSON file of the same shape; `LOWRANK_FAST_TRITON_TABLE=FILE` puts its rows first.

The rows below were not tuned on a GPU. They are the ones that compile on every architecture without a spill, with
16-byte asynchronous loads and with at least 32 KB of loads in flight per SM (`lowrank-fast codegen` shows it), and
follow two rules: a tile of rows is at least 4 r where T fills the machine anyway (weights re-read from L2 are then
a sixth of the traffic), and the tile of `D` never depends on T (a row's result must not either).
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ENVIRONMENT = "LOWRANK_FAST_TRITON_TABLE"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942")
# Streaming multiprocessors (compute units) of the part that most users have: A100, RTX 4090, H100, B200, MI300X. What
# is split over programs is split by these and not by the device at hand: one architecture, one result.
PROCESSORS = {"sm_80": 108, "sm_89": 128, "sm_90": 132, "sm_100": 148, "gfx942": 304}
SMALL, MIDDLE = 128, 2048  # T up to which one launch splits d_out, and up to which d_in is split
SEGMENTS = 8  # runs that `D` is summed in: the split-K count at middle T


class Tile(NamedTuple):
    """`rows` and `cols` of the streamed tile, `inner` the tile of the other dimension a kernel walks."""

    rows: int
    inner: int
    cols: int
    warps: int
    stages: int


_ANY = 1 << 62
# kernel -> element bytes -> rows of (largest padded rank, largest T, Tile).
_ROWS: dict[str, dict[int, list[tuple[int, int, Tile]]]] = {
    "residual_add": {
        2: [
            (32, 128, Tile(16, 128, 64, 4, 4)),
            (32, 2048, Tile(16, 128, 128, 4, 4)),
            (32, 4096, Tile(32, 128, 128, 4, 5)),
            (64, 128, Tile(16, 128, 64, 4, 3)),
            (64, 2048, Tile(16, 128, 128, 4, 3)),
            (64, _ANY, Tile(64, 128, 128, 4, 3)),
            (128, _ANY, Tile(32, 128, 64, 8, 3)),
        ],
        4: [
            (32, _ANY, Tile(16, 32, 64, 4, 9)),
            (64, _ANY, Tile(16, 32, 32, 4, 3)),
            (128, _ANY, Tile(32, 32, 64, 8, 3)),
        ],
    },
    "shrink": {
        2: [
            (32, 2048, Tile(16, 128, 0, 4, 4)),
            (32, 4096, Tile(32, 128, 0, 4, 5)),
            (64, 2048, Tile(16, 128, 0, 4, 2)),
            (64, _ANY, Tile(64, 128, 0, 4, 3)),
            (_ANY, _ANY, Tile(32, 128, 0, 8, 3)),
        ],
        4: [(32, _ANY, Tile(16, 32, 0, 4, 9)), (64, _ANY, Tile(16, 32, 0, 4, 3)), (_ANY, _ANY, Tile(32, 32, 0, 8, 3))],
    },
    "expand": {
        2: [
            (32, _ANY, Tile(32, 0, 256, 8, 3)),
            (64, _ANY, Tile(32, 0, 128, 4, 3)),
            (128, _ANY, Tile(32, 0, 64, 4, 5)),
        ],
        4: [(32, _ANY, Tile(16, 0, 128, 4, 3)), (64, _ANY, Tile(16, 0, 64, 4, 5)), (128, _ANY, Tile(16, 0, 32, 4, 2))],
    },
    # T <= 128, weights that are a mean: every program walks all rows of its group, and A once for each block of them.
    "routed_small": {
        2: [
            (32, 16, Tile(16, 128, 64, 4, 4)),
            (64, 16, Tile(16, 128, 64, 4, 3)),
            (128, 16, Tile(16, 64, 64, 4, 3)),
            (32, _ANY, Tile(64, 128, 64, 8, 3)),
            (128, _ANY, Tile(64, 64, 64, 8, 2)),
        ],
        4: [
            (128, 16, Tile(16, 32, 32, 4, 3)),
            (32, _ANY, Tile(64, 32, 64, 8, 3)),
            (64, _ANY, Tile(32, 32, 64, 8, 3)),
            (128, _ANY, Tile(32, 32, 64, 8, 2)),
        ],
    },
    # T <= 128, weights per token.
    "token_small": {
        2: [
            (32, _ANY, Tile(16, 128, 64, 4, 4)),
            (64, _ANY, Tile(16, 128, 64, 4, 3)),
            (128, _ANY, Tile(32, 128, 64, 8, 3)),
        ],
        4: [(128, _ANY, Tile(16, 32, 32, 4, 3))],
    },
    # A bank in several steps for each block of rows, which reads it whole: tall blocks.
    "expand_wide": {2: [(_ANY, _ANY, Tile(64, 0, 128, 8, 3))], 4: [(_ANY, _ANY, Tile(64, 0, 64, 8, 2))]},
    # With the partials of a split-K shrink in flight beside the stream: 8 of them, 2 KB each at r = 16.
    "expand_parts": {
        2: [
            (32, _ANY, Tile(16, 0, 256, 4, 3)),
            (64, _ANY, Tile(16, 0, 128, 4, 2)),
            (_ANY, _ANY, Tile(16, 0, 64, 4, 2)),
        ],
        4: [(32, _ANY, Tile(16, 0, 128, 4, 2)), (_ANY, _ANY, Tile(16, 0, 32, 4, 2))],
    },
    "up": {
        2: [
            (32, _ANY, Tile(32, 0, 512, 8, 3)),
            (64, _ANY, Tile(32, 0, 256, 8, 3)),
            (128, _ANY, Tile(32, 0, 64, 8, 3)),
        ],
        4: [(32, _ANY, Tile(16, 0, 64, 4, 3)), (128, _ANY, Tile(16, 0, 32, 4, 2))],
    },
    # Row programs and column programs in one launch; `inner` is the tile of the rows' walk along d_out.
    "up_rows": {
        2: [
            (32, _ANY, Tile(32, 128, 256, 8, 3)),
            (64, _ANY, Tile(64, 128, 128, 8, 3)),
            (128, _ANY, Tile(32, 128, 128, 8, 3)),
        ],
        4: [
            (32, _ANY, Tile(16, 64, 128, 4, 5)),
            (64, _ANY, Tile(16, 64, 64, 4, 5)),
            (128, _ANY, Tile(16, 64, 64, 8, 2)),
        ],
    },
    # The same for a mixed bank, which every block of rows reads whole: tall blocks.
    "up_mixed": {
        2: [
            (32, _ANY, Tile(64, 64, 256, 8, 3)),
            (64, _ANY, Tile(128, 64, 128, 8, 3)),
            (128, _ANY, Tile(128, 64, 64, 8, 3)),
        ],
        4: [(32, _ANY, Tile(64, 32, 64, 4, 3)), (128, _ANY, Tile(64, 32, 32, 8, 2))],
    },
    "down": {
        2: [
            (16, _ANY, Tile(32, 0, 512, 8, 3)),
            (32, _ANY, Tile(16, 0, 256, 8, 5)),
            (64, _ANY, Tile(32, 0, 256, 8, 3)),
            (128, _ANY, Tile(32, 0, 128, 8, 3)),
            (_ANY, _ANY, Tile(16, 0, 64, 4, 2)),
        ],
        4: [(32, _ANY, Tile(16, 0, 128, 4, 5)), (_ANY, _ANY, Tile(16, 0, 64, 8, 2))],
    },
    "reduce": {
        2: [(16, _ANY, Tile(0, 0, 128, 4, 2)), (_ANY, _ANY, Tile(0, 0, 64, 4, 2))],
        4: [(16, _ANY, Tile(0, 0, 128, 4, 2)), (_ANY, _ANY, Tile(0, 0, 64, 4, 2))],
    },
}
# Rows that come first on one architecture, where the shared row spills.
_ARCHITECTURE_ROWS: dict[str, dict[str, dict[int, list[tuple[int, int, Tile]]]]] = {
    "sm_80": {
        "down": {4: [(32, _ANY, Tile(16, 0, 128, 4, 5)), (_ANY, _ANY, Tile(16, 0, 32, 4, 3))]},
        "expand_wide": {4: [(_ANY, _ANY, Tile(32, 0, 64, 8, 2))]},
        "up_rows": {4: [(32, _ANY, Tile(16, 64, 128, 4, 5)), (128, _ANY, Tile(16, 64, 64, 8, 2))]},
        "up_mixed": {
            2: [
                (32, _ANY, Tile(64, 64, 256, 8, 3)),
                (64, _ANY, Tile(128, 64, 128, 8, 3)),
                (128, _ANY, Tile(64, 64, 64, 8, 3)),
            ],
            4: [(32, _ANY, Tile(64, 32, 64, 4, 3)), (128, _ANY, Tile(32, 32, 32, 8, 2))],
        },
    },
    "sm_89": {
        "up_rows": {4: [(32, _ANY, Tile(16, 64, 64, 8, 2))]},
        "down": {2: [(16, _ANY, Tile(32, 0, 256, 8, 2))]},
        "reduce": {2: [(16, _ANY, Tile(0, 0, 64, 4, 2))]},
    },
    "sm_100": {
        "residual_add": {
            2: [
                (16, 128, Tile(16, 128, 64, 4, 4)),
                (16, 2048, Tile(16, 128, 128, 4, 4)),
                (32, 4096, Tile(32, 128, 128, 4, 4)),
            ]
        },
        "shrink": {2: [(32, 2048, Tile(16, 128, 0, 4, 4)), (64, 2048, Tile(32, 128, 0, 4, 3))]},
        "up_mixed": {2: [(32, _ANY, Tile(64, 64, 128, 8, 3))]},
    },
    "gfx942": {
        "residual_add": {4: [(64, _ANY, Tile(16, 32, 32, 2, 2)), (128, _ANY, Tile(16, 32, 32, 2, 2))]},
        "up": {2: [(32, _ANY, Tile(32, 0, 256, 4, 2)), (64, _ANY, Tile(32, 0, 128, 4, 2))]},
        "up_mixed": {
            2: [
                (32, _ANY, Tile(64, 64, 256, 4, 2)),
                (64, _ANY, Tile(128, 64, 128, 4, 2)),
                (128, _ANY, Tile(64, 64, 64, 4, 2)),
            ]
        },
    },
}
WIDEST = 128  # rank that one launch takes; more comes in several
IEEE_SMALL = Tile(16, 64, 64, 8, 2)  # of routed_small, for any rank, where float32 products are IEEE's
# Experts times padded rank that one product of the token-routed expand takes, by element size: both of its operands
# change from step to step, and a float32 one is three of bfloat16 in registers.
TOKEN_WIDEST = {2: 128, 4: 64}


@functools.cache
def _tuned() -> dict[str, dict[str, dict[str, list[list]]]]:
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except (OSError, json.JSONDecodeError) as error:
        raise RuntimeError(
            f"{ENVIRONMENT} must name a table that lowrank_fast.triton_kernels.tune wrote: {error}"
        ) from None


@functools.lru_cache(maxsize=4096)
def _row(kernel: str, architecture: str, element_bytes: int, width: int, bucket: int) -> Tile:
    def first(rows: Iterable[tuple[int, int, Sequence[int]]]) -> Tile | None:
        return next((Tile(*tile) for widest, longest, tile in rows if width <= widest and bucket <= longest), None)

    tuned = first(_tuned().get(architecture, {}).get(kernel, {}).get(str(element_bytes), []))
    if tuned is not None:
        return tuned
    families = (architecture, "sm_80") if architecture == "sm_89" else (architecture,)
    special = first(
        one for name in families for one in _ARCHITECTURE_ROWS.get(name, {}).get(kernel, {}).get(element_bytes, [])
    )
    tile = special or first(_ROWS[kernel][element_bytes])
    if tile is None:
        raise ValueError(f"{kernel}: no launch row for width {width}, {element_bytes}-byte elements, T = {bucket}")
    if architecture == "sm_89":  # 99 KB of shared memory, and 8 GB/s for each multiprocessor: one tile ahead is plenty
        return tile._replace(stages=2)
    if architecture == "gfx942" and special is None:  # waves of 64 lanes, 64 KB of shared memory
        return tile._replace(warps=tile.warps // 2, stages=2)
    return tile


def row(kernel: str, architecture: str, element_bytes: int, width: int, T: int) -> Tile:
    """The tile of `kernel` for a padded rank (or experts times rank) `width` and `T` rows, which counts as the next
    power of two."""
    return _row(kernel, architecture, element_bytes, width, 1 << max(T - 1, 0).bit_length())
