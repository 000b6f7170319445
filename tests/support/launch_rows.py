"""Which rows of Triton's launch table a configuration reaches."""

from __future__ import annotations

from unittest import mock

from lowrank_fast import codegen
from lowrank_fast import triton_backend as backend

Row = tuple[str, int, object]  # kernel, bytes of an element, tile


def reached(config: codegen.Config, architecture: str) -> set[Row]:
    """The rows that the launches of `config` on `architecture` take their tiles from."""
    table = backend.kernels("table")
    found: set[Row] = set()
    plain = table._row

    def noted(kernel: str, arch: str, size: int, width: int, bucket: int) -> object:
        tile = plain(kernel, arch, size, width, bucket)
        found.add((kernel, size, tile))
        return tile

    with mock.patch.object(table, "_row", noted):
        codegen.launches(config, architecture)
    return found


def covering(architecture: str) -> list[codegen.Config]:
    """Configurations that reach every row that any of them does, those of the largest ranks first."""
    seen: set[Row] = set()
    chosen = []
    for config in sorted(codegen.configurations(), key=lambda config: -config.rank):
        rows = reached(config, architecture)
        if rows - seen:
            seen |= rows
            chosen.append(config)
    return chosen
