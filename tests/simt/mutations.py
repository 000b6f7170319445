# ruff: noqa: E501  (one planted bug a line)
"""Planted bugs: each a change of one place in a kernel source.

`test_mutations.py` applies them one at a time to a copy of csrc/cuda and requires that one of its cases fails: that the
harness names what is wrong, or, for the bugs that break no rule of the machine, that the numbers are. A mutation that
nothing catches is a hole in the tests or in the harness.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str  # must occur in the file
    new: str
    occurrence: int = 0  # which one, when there are several
    numbers: bool = False  # only the numbers can show it


ROW, COLUMN, CLUSTER, TILE, ROUTING = (
    "residual_add.cuh", "column_pass.cuh", "cluster_backward.cuh", "tile.cuh", "routed_projection.cuh",
)  # fmt: skip

MUTATIONS = (
    # barriers
    Mutation("row: no barrier after the wait of phase 1", ROW, "    sync_block();  // tile i has landed for all threads, and", "    // and"),
    Mutation("row: no barrier before the sums overwrite the ring", ROW, "  sync_block();  // the sums overwrite the ring", ""),
    Mutation("row: no barrier after the sums", ROW, "  sync_block();  // the sums of all four warps", "  // the sums of all four warps"),
    Mutation("row: no barrier before the ring is used again", ROW, "  sync_block();  // the sums are read, the ring is free again", ""),
    Mutation("row: no barrier before the tile is stored", ROW, "    sync_block();\n    const int n0", "    const int n0"),
    Mutation("row: barrier in one warp only", ROW, "    sync_block();\n    const int n0", "    if (warp_id() == 0) sync_block();\n    const int n0"),
    Mutation("column: no barrier after the wait", COLUMN, "    sync_block();  // tile i (and W) has landed", "    // tile i"),
    Mutation("column: no barrier between reading x and making dx over it", COLUMN, "      sync_block();  // every warp has read the x tile\n      write_out", "      write_out"),
    Mutation("column: no barrier after the quarters of u", COLUMN, "  sync_block();  // the quarters are written", ""),
    Mutation("column: no barrier before dx is stored", COLUMN, "  sync_block();  // the tile is complete", ""),
    Mutation("row: early return before a barrier", ROW, "  if (p.x) shrink_rows", "  if (warp_id() * 16 >= rows) return;\n  if (p.x) shrink_rows"),
    Mutation("softmax: lanes leave before a shuffle", ROUTING, "    value = warp_sum(value);\n    if (lane_id() == 0) warp_sums[warp_id() * (a.experts", "    if (!valid) return;\n    value = warp_sum(value);\n    if (lane_id() == 0) warp_sums[warp_id() * (a.experts"),
    Mutation("mix: no barrier after the weights", ROUTING, "  sync_block();\n  const int64_t i = int64_t(block_id().x) * 256 + thread_id(), elements", "  const int64_t i = int64_t(block_id().x) * 256 + thread_id(), elements"),
    # asynchronous copies
    Mutation("row: wait_group off by one", ROW, "cp_async_wait<C::stages - 2>();", "cp_async_wait<C::stages - 1>();"),
    Mutation("row: wait_group off by one in phase 2", ROW, "cp_async_wait<C::stages - 2>();", "cp_async_wait<C::stages - 1>();", 1),
    Mutation("column: wait_group off by one", COLUMN, "cp_async_wait<C::stages - 2>();", "cp_async_wait<C::stages - 1>();"),
    Mutation("row: commit only where something was loaded", ROW, "    }\n    cp_async_commit();\n  };\n  float acc", "      cp_async_commit();\n    }\n  };\n  float acc"),
    Mutation("cluster: no wait", CLUSTER, "    cp_async_wait<0>();\n    sync_block();  // tile", "    sync_block();  // tile"),
    Mutation("row: the ring is one stage short", ROW, "ring + i % C::stages * C::stage1", "ring + i % (C::stages - 1) * C::stage1"),
    # bounds, fill
    Mutation("load: no row guard", TILE, "int valid = row < rows ? cols - col : 0;", "int valid = cols - col;"),
    Mutation("load: no column guard", TILE, "int valid = row < rows ? cols - col : 0;", "int valid = row < rows ? chunk : 0;"),
    Mutation("store: no row guard", TILE, "    if (row >= rows) continue;\n    if (vec", "    if (vec"),
    Mutation("store: no column guard", TILE, "if (vec && col + chunk <= cols)", "if (vec && col < cols)"),
    Mutation("hidden: padded rank not zeroed", ROW, "    hidden[row * C::ld_r + k] = rounded<E>(t);", "    if (k < p.rank) hidden[row * C::ld_r + k] = rounded<E>(t);"),
    Mutation("gradient: no rank guard", COLUMN, "if (column < cols && k < rank) grad", "if (column < cols) grad"),
    Mutation("tile rows not padded to 16 bytes", TILE, "width + 16 / static_cast<int>(sizeof(E))", "width + 4"),
    Mutation("row: shared memory one stage short", ROW, "ring = stages * (stage1", "ring = (stages - 1) * (stage1"),
    # fragments
    Mutation("fragment: second row half at + 4", TILE, "lane_id() / 4 + 8 * (i >> 1)", "lane_id() / 4 + 4 * (i >> 1)"),
    Mutation("fragment: operand B's halves swapped", TILE, "fa[m], fb[0], fb[1]);", "fa[m], fb[1], fb[0]);", numbers=True),
    Mutation("fragment: A's depth and rows swapped", TILE, "8 * (is_a ? j & 1 : j >> 1), depth = 8 * (is_a ? j >> 1 : j & 1)", "8 * (is_a ? j >> 1 : j >> 1), depth = 8 * (is_a ? j & 1 : j & 1)", numbers=True),
    Mutation("fragment: transposed load not transposed", TILE, "ldmatrix_x4_trans(regs", "ldmatrix_x4(regs", numbers=True),
    Mutation("row: a warp's quarter of the depth", ROW, "C::block_k / C::warps * warp_id()", "C::block_k / C::warps * (warp_id() ^ 1) * (warp_id() < 2)", numbers=True),
    Mutation("row: only three of four partial sums", ROW, " + sums[i + 3 * block_m * R];", ";", numbers=True),
    Mutation("softmax: shuffle offset", ROUTING, "for (int step = 16; step; step /= 2)", "for (int step = 8; step; step /= 2)", numbers=True),
    # blocks that meet
    Mutation("row: blocks own overlapping rows", ROW, "int64_t(block_id().x) * block_m, row0", "int64_t(block_id().x) * (block_m - 1), row0"),
    Mutation("column: splits own overlapping rows", COLUMN, "block_id().y * p.split_rows;", "block_id().y * (p.split_rows - 8);"),
    Mutation("column: all splits write one partial", COLUMN, "const int split = block_id().z * grid_blocks().y + block_id().y;", "const int split = block_id().z * grid_blocks().y;"),
    Mutation("sum: one partial left out", "reduce.cuh", "for (int s = 0; s < p.count; s++)", "for (int s = 0; s < p.count - (p.count > 1); s++)", numbers=True),
    # clusters
    Mutation("cluster: no barrier before the shares are read", COLUMN, "  sync_cluster();  // the shares are complete everywhere", "  sync_block();"),
    Mutation("cluster: no barrier before exit", CLUSTER, "  sync_cluster();  // nobody reads", "  // nobody reads"),
    Mutation("cluster: shares not double-buffered", CLUSTER, "shares + i % 2 * C::block_m * R", "shares"),
    Mutation("cluster: one share left out", COLUMN, "for (int block = 0; block < blocks; block++)", "for (int block = 0; block < blocks - (blocks > 1); block++)", numbers=True),
    Mutation("cluster gradient: no barrier before exit", COLUMN, "  if constexpr (mode == kClusterRows) sync_cluster();", ""),
    Mutation("cluster gradient: shares not double-buffered", COLUMN, "shares + i % 2 * C::block_m * R, row0", "shares, row0"),
    Mutation("cluster gradient: every block adds every share", COLUMN, "C::threads * cluster_rank() + thread_id()", "thread_id()"),
    Mutation("cluster gradient: clusters write one partial", COLUMN, "block_id().x / p.blocks * p.tokens", "0 * p.tokens"),
    Mutation("cluster gradient: a block without columns leaves early", COLUMN, "  cp_async_wait<0>();\n  if constexpr (mode", "  cp_async_wait<0>();\n  if (col0 >= p.cols) return;\n  if constexpr (mode"),
    # dropout, masks
    Mutation("dropout: counter of the next row", TILE, "static_cast<uint64_t>(row0 + row);", "static_cast<uint64_t>(row0 + row + 1);", numbers=True),
    Mutation("dropout: nine rounds", TILE, "round < 10", "round < 9", numbers=True),
    Mutation("sum: the activity mask is ignored", "reduce.cuh", "|| !p.active || p.active[k / p.target.group];", "|| true;", numbers=True),
    Mutation("softmax: the token mask is ignored", ROUTING, "valid && (!a.token_mask || a.token_mask[row])", "valid", numbers=True),
)  # fmt: skip
