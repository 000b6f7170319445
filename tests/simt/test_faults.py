"""The harness names every kind of fault in small kernels under every schedule, and nothing in clean ones."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from . import build

FAULTS = {
    "missing_barrier": ("RACE", "UNINITIALISED"),
    "warp_barrier_across_warps": ("RACE", "UNINITIALISED"),
    "missing_warp_barrier": ("RACE", "UNINITIALISED"),
    "write_after_read": ("RACE",),
    "write_write": ("RACE",),
    "blocks_overlap": ("RACE",),
    "past_global": ("OUT OF BOUNDS",),
    "read_past_global": ("OUT OF BOUNDS",),
    "past_shared": ("OUT OF BOUNDS",),
    "null_pointer": ("WILD",),
    "write_input": ("READ-ONLY",),
    "uninitialised": ("UNINITIALISED",),
    "uninitialised_output": ("UNINITIALISED",),
    "misaligned": ("MISALIGNED",),
    "divergent": ("DIVERGENT",),
    "half_a_block": ("EXIT", "DEADLOCK"),
    "leaves_a_shuffle": ("EXIT", "DEADLOCK"),
    "deadlock": ("DIVERGENT", "DEADLOCK", "EXIT"),
    "copy_not_awaited": ("IN FLIGHT",),
    "copy_never_awaited": ("COPY",),
    "copy_without_barrier": ("RACE", "IN FLIGHT", "UNINITIALISED"),
    "cluster_too_early": ("CLUSTER",),
    "cluster_exits_too_early": ("CLUSTER",),
}
CLEAN = ("clean", "clean_within_a_warp", "clean_copy", "clean_cluster")


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.build(entry=Path(__file__).parent / "faults.cpp")))
    loaded.simt_findings.restype = ctypes.c_char_p
    return loaded


def findings(library: ctypes.CDLL, name: str, seed: int, preempt: float = 0.0, shared_bytes: int = 1024) -> list[str]:
    values, out = torch.ones(64), torch.zeros(64)
    library.simt_reset(ctypes.c_uint64(seed), ctypes.c_double(preempt))
    size = ctypes.c_size_t(256)
    for label, tensor, writable in ((b"in", values, 0), (b"out", out, 1)):
        library.simt_buffer(
            label, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(1), size, size, writable, 1 - writable
        )
    pointers = ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr())
    assert library.fault(name.encode(), *pointers, shared_bytes) == 1
    return library.simt_findings().decode().splitlines()


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_under_every_schedule(library, name):
    shared_bytes = 800 if name == "past_shared" else 1024
    for seed in range(1, 21):
        found = findings(library, name, seed, shared_bytes=shared_bytes)
        assert found, f"{name}: nothing reported with seed {seed}"
        assert found[0].startswith(FAULTS[name]), found


def test_a_finding_names_the_line_of_the_source(library):
    assert any("faults.cpp:" in line for line in findings(library, "missing_barrier", 3))


@pytest.mark.parametrize("preempt", [0.0, 0.05])
@pytest.mark.parametrize("name", CLEAN)
def test_clean_kernels_have_no_findings(library, name, preempt):
    for seed in range(1, 31):
        assert findings(library, name, seed, preempt) == []


def test_more_shared_memory_than_a_block_can_have_is_refused(library):
    assert findings(library, "clean", 1, shared_bytes=300_000)[0].startswith("LAUNCH")
