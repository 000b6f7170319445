"""Float32 products go through six bfloat16 products on matrix instructions: as exact as IEEE float32 in sums of 256
products or more, and never half as exact.

What a kernel adds up, `acc + a @ b` tile by tile, in the model of a matrix instruction that the interpreter uses
(`interpreter.py`: exact products, 16 of them to a sum, every sum truncated), against one fused multiply-add after the
other, each rounded as IEEE 754 says.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowrank_fast import triton_backend as backend

ROOT = Path(__file__).resolve().parents[2]
TILE = 64
ROWS = 64


def by_matrix_instructions(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    product = backend.kernels("interpreter").float32_product
    total = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for first in range(0, a.shape[1], TILE):
        total = total + product(a[:, first : first + TILE], b[first : first + TILE])
    return total


def by_fused_multiply_adds(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return backend.kernels("interpreter").ieee_product(a, b, np.zeros((a.shape[0], b.shape[1]), np.float32))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def positive(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.random(shape).astype(np.float32)


def of_many_sizes(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return normal(rng, *shape) * np.exp2(rng.integers(-20, 20, shape)).astype(np.float32)


@pytest.mark.parametrize(("width", "allowed"), [(16, 2.0), (64, 2.0), (256, 1.0), (1024, 1.0), (4096, 1.0)])
@pytest.mark.parametrize("draw", [normal, positive, of_many_sizes])
def test_errors_beside_those_of_ieee_fused_multiply_adds(
    draw: Callable[..., np.ndarray], width: int, allowed: float
) -> None:
    rng = np.random.default_rng(0)
    a, b = draw(rng, ROWS, width), draw(rng, width, ROWS)
    size = np.abs(a).astype(np.float64) @ np.abs(b).astype(np.float64)  # what rounding errors are proportional to
    truth = a.astype(np.float64) @ b.astype(np.float64)
    ours, theirs = (
        float(np.sqrt(np.mean(((found - truth) / size) ** 2)))
        for found in (by_matrix_instructions(a, b), by_fused_multiply_adds(a, b))
    )
    assert ours <= allowed * theirs, (ours, theirs)


def test_a_fused_multiply_add_rounds_once() -> None:
    """`(1 + 2^-12)^2 - (1 + 2^-11)` is 2^-24, which a product that is rounded first loses."""
    factor, acc = np.full((1, 1), 1 + 2.0**-12, np.float32), np.full((1, 1), -1 - 2.0**-11, np.float32)
    assert backend.kernels("interpreter").ieee_product(factor, factor, acc) == 2.0**-24


def test_ieee_products_where_they_are_asked_for() -> None:
    """In the interpreter, in a process of its own: the choice is made when the kernels are imported."""
    code = """
import torch
from lowrank_fast import triton_backend as b
x, A = torch.randn(40, 96), torch.randn(16, 96)
one = b.shrink(x, A, 0.0, None)
total = torch.zeros(40, 16)
for tile in range(0, 96, 32):
    run = torch.from_numpy(b.kernels("interpreter").ieee_product(
        x[:, tile:tile + 32].numpy(), A[:, tile:tile + 32].T.numpy(), torch.zeros(40, 16).numpy()))
    total += run
assert torch.equal(one, total)
"""
    environment = os.environ | {"TRITON_INTERPRET": "1", "LOWRANK_FAST_TRITON_PRECISION": "ieee"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_a_single_product_keeps_24_bits() -> None:
    a, b = normal(np.random.default_rng(1), 256, 1), normal(np.random.default_rng(2), 1, 256)
    truth = a.astype(np.float64) * b.astype(np.float64)
    assert np.max(np.abs(by_matrix_instructions(a, b) / truth - 1)) <= 2.0**-22
