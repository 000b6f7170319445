"""Fragment layouts of the primitives, against a second encoding that shares nothing with the harness or the kernels.

The layouts are written here as CuTe does for SM80_16x8x16: nested (shape : stride) pairs that send (lane, register
element) to a position in the matrix. The mask generator is checked against `reference.philox`.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_fast.reference import philox

from . import build

# ((lane % 4, lane / 4), (element ...)) with strides into the column-major matrix, as in cute/atom/mma_traits_sm80.hpp
A_LAYOUT = ((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128))  # 16 x 16, index m + 16 k
B_LAYOUT = ((4, 8), (2, 2)), ((16, 1), (8, 64))  # 8 x 16, index n + 8 k
C_LAYOUT = ((4, 8), (2, 2)), ((32, 1), (16, 8))  # 16 x 8, index m + 16 n


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build.build(entry=Path(__file__).parent / "primitives.cpp")))
    loaded.simt_findings.restype = ctypes.c_char_p
    return loaded


def run(library: ctypes.CDLL, name: str, given: Tensor, out: Tensor, option: int = 0) -> Tensor:
    library.simt_reset(ctypes.c_uint64(1), ctypes.c_double(0.0))
    for label, tensor, writable in ((b"in", given, 0), (b"out", out, 1)):
        size = ctypes.c_size_t(tensor.numel() * tensor.element_size())
        library.simt_buffer(
            label, ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(1), size, size, writable, 1 - writable
        )
    assert library.primitive(name.encode(), ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()), option)
    assert library.simt_findings() == b""
    return out


def positions(layout) -> list[list[int]]:
    """Index into the matrix for every lane and register element, elements in register order."""
    (lanes, elements), (lane_strides, strides) = layout
    table = []
    for lane in range(32):
        base = lane % lanes[0] * lane_strides[0] + lane // lanes[0] * lane_strides[1]
        inner = [
            sum(i * s for i, s in zip(index[::-1], strides, strict=True))
            for index in product(*map(range, elements[::-1]))
        ]
        table.append([base + offset for offset in inner])
    return table


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mma_multiplies_matrices_packed_by_the_cute_layouts(library, dtype):
    generator = torch.Generator().manual_seed(4)
    A, B, C = (torch.randn(s, generator=generator) for s in ((16, 16), (16, 8), (16, 8)))
    A, B = A.to(dtype), B.to(dtype)
    columns_of_A, columns_of_B = A.T.reshape(-1), B.reshape(-1)  # m + 16 k; n + 8 k
    packed = torch.empty(32, 10, dtype=torch.int32)
    for lane in range(32):
        a = columns_of_A[positions(A_LAYOUT)[lane]].view(torch.int32)
        b = columns_of_B[positions(B_LAYOUT)[lane]].view(torch.int32)
        c = C.T.reshape(-1)[positions(C_LAYOUT)[lane]].view(torch.int32)
        packed[lane] = torch.cat([a, b, c])
    out = run(library, "mma", packed, torch.empty(32, 4), int(dtype is torch.float16))
    result = torch.empty(128)
    for lane in range(32):
        result[positions(C_LAYOUT)[lane]] = out[lane]
    expected = C.double() + A.double() @ B.double()
    assert torch.allclose(result.view(8, 16).T.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_gives_each_lane_two_neighbours_of_every_matrix(library, transposed):
    matrices = torch.arange(256, dtype=torch.int16).view(4, 8, 8)
    out = run(library, "ldmatrix", matrices.contiguous(), torch.empty(32, 4, dtype=torch.int32), int(transposed))
    seen = out.view(torch.int16).view(32, 4, 2)
    source = matrices.transpose(1, 2) if transposed else matrices
    for matrix in range(4):
        assert torch.equal(seen[:, matrix].reshape(8, 8), source[matrix])


@pytest.mark.parametrize("mask", [1, 2, 4, 8, 16])
def test_shuffle_exchanges_lanes(library, mask):
    values = torch.randn(32)
    assert torch.equal(run(library, "shuffle", values, torch.empty(32), mask), values[torch.arange(32) ^ mask])


@pytest.mark.parametrize("size", [0, 2, 8, 14, 16])
def test_cp_async_reads_part_of_its_source_and_zeroes_the_rest(library, size):
    given = torch.randint(1, 255, (32, 16), dtype=torch.uint8)
    expected = given.clone()
    expected[:, size:] = 0
    assert torch.equal(run(library, "async_copy", given, torch.empty(32, 16, dtype=torch.uint8), size), expected)


def test_conversions_round_like_torch(library):
    special = [
        0.0,
        -0.0,
        1.0,
        65504.0,
        65520.0,
        1e-8,
        6e-8,
        3.3895e38,
        float("inf"),
        -float("inf"),
        float("nan"),
        1.00390625,
    ]
    values = torch.cat([torch.tensor(special), torch.randn(32 - len(special)) * 100])
    got = run(library, "convert", values, torch.empty(32, 2))
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        expected = values.to(dtype).float()
        assert torch.equal(got[:, column].isnan(), expected.isnan())
        assert torch.equal(got[:, column].nan_to_num(), expected.nan_to_num())


def test_philox_is_the_reference_generator(library):
    words = torch.randint(0, 2**32, (32, 6), dtype=torch.int64)
    got = run(library, "random_words", words.to(torch.uint32).contiguous(), torch.empty(32, 4, dtype=torch.uint32))
    c0, c1, c2, c3, k0, k1 = words.unbind(1)
    assert torch.equal(got.to(torch.int64), torch.stack(philox((c0, c1, c2, c3), (k0, k1)), 1))


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_distributed_shared_memory_reads_the_named_block(library, offset):
    values = torch.randn(4, 32)
    got = run(library, "cluster_share", values, torch.empty(4, 32), offset)
    assert torch.equal(got, values.roll(-offset, 0))
