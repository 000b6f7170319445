"""Every shipped CUDA kernel, executed by the harness, against float64 and the accuracy rule of the project.

Shapes reach each tail: rows, columns and rank that fill no tile, one row, no row, at least three tiles per block, more
blocks than rows, both block sizes of the row kernel. A finding of the harness (race, bounds, uninitialised memory ...)
fails the test that caused it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ..support.problems import Halves, ResidualAdd, Routed
from ..support.targets import KERNEL_DTYPES
from .harness import Simt

ALL = frozenset("yxAB")
# (tokens, d_in, d_out, rank): per template rank 16, 32, 64, 128, one that fills its tiles and one that fills none
SHAPES = [
    (1, 64, 64, 16),
    (3, 24, 40, 1),
    (37, 136, 72, 16),
    (100, 520, 264, 8),
    (300, 130, 66, 20),
    (70, 392, 200, 32),
    (150, 264, 300, 40),
    (70, 200, 136, 100),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_residual_add_and_its_gradients(simt, dtype, shape):
    tokens, d_in, d_out, rank = shape
    ResidualAdd((tokens,), d_in, d_out, rank, dtype, dtype, needs=ALL).assert_solved_by("simt")


# A cluster of one block, of several, more blocks than one of the tensors has columns, several tiles per cluster
@pytest.mark.parametrize(
    "shape", [(1, 64, 64, 16), (45, 600, 1100, 3), (150, 520, 40, 20), (2112, 40, 520, 8)], ids=str
)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_sm90_backward(simt, dtype, shape):
    simt.clusters = True
    tokens, d_in, d_out, rank = shape
    problem = ResidualAdd((tokens,), d_in, d_out, rank, dtype, dtype, needs=ALL)
    problem.assert_solved_by("simt")
    if tokens < 100:
        problem.but(dropout_p=0.3, seed=2).assert_solved_by("simt")


# Clusters of the gradient pass: several with a block that has no columns (nine slices), one of two blocks, one block;
# at least three tiles per block. Each shape in one rank of the templates.
@pytest.mark.parametrize(
    ("shape", "needs"), [((9, 40, 2100, 12), "xB"), ((70, 40, 300, 25), "AB"), ((45, 72, 260, 48), "xAB"),
                         ((130, 40, 1100, 100), "xB"), ((3, 40, 24, 128), "xAB")], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_sm90_gradient_pass(simt, dtype, shape, needs):
    simt.clusters = True
    tokens, d_in, d_out, rank = shape
    ResidualAdd((tokens,), d_in, d_out, rank, dtype, dtype, needs=frozenset(needs)).assert_solved_by("simt")


@pytest.mark.parametrize("needs", ["x", "A", "B", "xA", "xB", "AB"])
@pytest.mark.parametrize("rank", [8, 48])
def test_every_mask_of_needed_gradients(simt, rank, needs):
    ResidualAdd((45,), 136, 80, rank, torch.bfloat16, torch.bfloat16, needs=frozenset(needs)).assert_solved_by("simt")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_float32_parameters_beside_16_bit_activations(simt, dtype, rank):
    ResidualAdd((45,), 136, 80, rank, dtype, torch.float32, needs=ALL).assert_solved_by("simt")


@pytest.mark.parametrize("layout", ["transposed", "padded_rows", "offset"])
@pytest.mark.parametrize("name", ["A", "B"])
def test_parameter_layouts(simt, name, layout):
    ResidualAdd((33,), 72, 80, 8, torch.bfloat16, torch.bfloat16, needs=ALL, layouts={name: layout}).assert_solved_by(
        "simt"
    )


@pytest.mark.parametrize("layout", ["padded_rows", "offset", "transposed_leading", "inner_stride", "expanded"])
@pytest.mark.parametrize("name", ["y", "x", "g"])
def test_activation_layouts(simt, name, layout):
    ResidualAdd((4, 9), 64, 80, 8, torch.bfloat16, torch.bfloat16, needs=ALL, layouts={name: layout}).assert_solved_by(
        "simt"
    )


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_the_two_halves(simt, dtype):
    Halves((2, 35), 136, 72, 12, dtype, dtype, needs=ALL).assert_solved_by("simt")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("rank", [8, 40])
def test_dropout_is_regenerated_from_its_counter(simt, dtype, rank):
    ResidualAdd((75,), 200, 136, rank, dtype, dtype, needs=ALL, dropout_p=0.3, seed=5).assert_solved_by("simt")


@pytest.mark.parametrize("lead", [(0,), (), (1,), (2, 3, 2)], ids=str)
def test_leading_dimensions(simt, lead):
    ResidualAdd(lead, 72, 40, 4, torch.bfloat16, torch.bfloat16, needs=ALL).assert_solved_by("simt")


@pytest.mark.parametrize(("routing", "router_input"), [*product(("batch", "sample", "token"), "tx"), ("static", "t")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clusters", [False, True])
def test_routed_projection_and_its_gradients(simt, clusters, dtype, routing, router_input):
    simt.clusters = clusters
    needs = frozenset({"y", "x", "A", "B", "weights" if routing == "static" else "R"})
    problem = Routed(
        (3, 29), 136, 72, 8, dtype, dtype, needs=needs, experts=4, routing=routing, router_input=router_input
    )
    problem.but(masked=routing in ("batch", "sample"), active=(True, False, True, True)).assert_solved_by("simt")


@pytest.mark.parametrize("needs", ["xAB", "xAw", "xABw", "xBw"])
@pytest.mark.parametrize("shape", [(45, 600, 1100, 3), (70, 40, 600, 20), (40, 40, 4200, 4)], ids=str)
def test_static_routing_on_sm90(simt, shape, needs):
    """One launch over g and x; two where a gradient is not asked for or no cluster is wide enough."""
    simt.clusters = True
    tokens, d_in, d_out, rank = shape
    named = frozenset(needs.replace("w", "")) | ({"weights"} if "w" in needs else set())
    problem = Routed((tokens,), d_in, d_out, rank, torch.bfloat16, torch.bfloat16, needs=named, experts=3)
    problem = problem.but(routing="static", active=(True, False, True))
    problem.assert_solved_by("simt")
    if rank == 20:
        problem.but(dropout_p=0.3, seed=2).assert_solved_by("simt")


@pytest.mark.parametrize("routing", ["batch", "sample", "token"])
def test_routed_projection_over_several_row_tiles_and_chunks(simt, routing):
    needs = frozenset({"x", "A", "B", "R"})
    Routed(
        (2, 300), 72, 264, 16, torch.bfloat16, torch.bfloat16, needs=needs, experts=3, routing=routing
    ).assert_solved_by("simt")


@pytest.mark.parametrize(("routing", "router_input"), [("batch", "x"), ("token", "x"), ("token", "t"), ("sample", "t")])
def test_routed_projection_with_dropout(simt, routing, router_input):
    needs = frozenset({"x", "A", "B", "R"})
    problem = Routed(
        (2, 21), 136, 72, 8, torch.float16, torch.float16, needs=needs, routing=routing, router_input=router_input
    )
    problem.but(dropout_p=0.25, seed=3).assert_solved_by("simt")


@pytest.mark.parametrize("needs", ["x", "A", "B", "R", "xB", "AR", "BR"])
@pytest.mark.parametrize(("routing", "router_input"), [("batch", "t"), ("batch", "x"), ("token", "t"), ("token", "x")])
def test_every_mask_of_routed_gradients(simt, routing, router_input, needs):
    problem = Routed((2, 13), 72, 40, 4, torch.float32, torch.float32, needs=frozenset(needs), experts=3)
    problem.but(routing=routing, router_input=router_input).assert_solved_by("simt")


@pytest.mark.parametrize("experts", [8, 12])
def test_a_bank_in_the_layout_of_peft_is_read_in_place(simt, experts):
    problem = Routed(
        (25,), 72, 80, 8, torch.bfloat16, torch.bfloat16, needs=frozenset("xB"), experts=experts, routing="token"
    )
    problem.but(layouts={"B": "transposed"}).assert_solved_by("simt")


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d_out", "gap"), [(37, 197, 3), (5, 40, 0), (280, 66, 62)])
def test_in_place_writes_the_stream_and_nothing_beside_it(dtype, tokens, d_out, gap):
    generator = torch.Generator().manual_seed(tokens)
    buffer = torch.randn(tokens, d_out + gap, generator=generator).to(dtype)
    y, before = buffer[:, :d_out], buffer.clone()
    x, A, B = (torch.randn(s, generator=generator).to(dtype) for s in ((tokens, 72), (8, 72), (d_out, 8)))
    out_of_place = Simt().residual_add(y.clone(), x, A, B, 0.1, 0.0, None, False)[0]
    Simt().residual_add_(y, x, A, B, 0.1, 0.0, None, False)
    assert torch.equal(y, out_of_place)
    assert torch.equal(buffer[:, d_out:], before[:, d_out:])


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_every_kernel_that_ships_runs_and_is_accurate(simt, dtype):
    """All template instances of the library, each within the accuracy rule and without a finding."""
    for rank in (16, 30, 60, 100):  # one per template rank
        small, large = (ResidualAdd((tokens,), 72, 136, rank, dtype, dtype, needs=ALL) for tokens in (5, 260))
        small.assert_solved_by("simt")  # the forms for few rows and for many
        large.assert_solved_by("simt")
        simt.clusters = True
        small.assert_solved_by("simt")
        simt.clusters = False
    for routing in ("batch", "token"):
        needs = frozenset({"y", "x", "A", "B", "R"})
        Routed((2, 9), 72, 40, 4, dtype, dtype, needs=needs, experts=3, routing=routing).assert_solved_by("simt")
    simt.clusters = True
    for rank in (4, 30):
        Routed((2, 9), 72, 40, rank, dtype, dtype, needs=frozenset("xB"), experts=3).assert_solved_by("simt")
    element = {torch.float32: "float", torch.bfloat16: "Bf16", torch.float16: "F16"}[dtype]
    shipped = {name for name in simt.kernels() if f"<{element}" in name}
    assert len(shipped) >= 24 and shipped <= simt.kernels_run(), shipped - simt.kernels_run()
