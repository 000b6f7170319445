"""Hypothesis strategies for problems: the sizes, layouts and settings where kernels break.

Tokens from 0 to 300 in one to four leading dimensions (or none), dimensions that are multiples of nothing, ranks 1 to
64, 1 to 8 experts, every layout of memory, every mask of needed gradients.
"""

from __future__ import annotations

import math

import torch
from hypothesis import strategies as st

from .memory import ACTIVATION_LAYOUTS, PARAMETER_LAYOUTS
from .problems import Halves, Problem, ResidualAdd, Routed
from .targets import KERNEL_DTYPES, interpreted

# Sizes around the edges of vectors, tiles and blocks, and in between.
TOKENS = (0, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 200, 255, 256, 257, 300)
WIDTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 47, 63, 64, 65, 96, 100, 127, 128, 129, 160, 200, 257, 384, 400)
WIDE = (512, 513, 768, 771, 1024, 1030, 4096, 4097)
RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64)


@st.composite
def leads(draw: st.DrawFn, most: int) -> tuple[int, ...]:
    """Leading dimensions with at most `most` tokens; now and then none at all."""
    tokens = draw(st.one_of(st.sampled_from(TOKENS), st.integers(0, most)).filter(lambda n: n <= most))
    dims = draw(st.sampled_from((1, 1, 2, 2, 3, 4, 0)))
    if dims == 0:
        return ()
    others = draw(st.lists(st.sampled_from((1, 2, 3, 5)), min_size=dims - 1, max_size=dims - 1))
    sizes = [*others, tokens // math.prod(others)]
    return tuple(sizes if draw(st.booleans()) else reversed(sizes))


def widths(small: bool) -> st.SearchStrategy[int]:
    if small:
        return st.sampled_from([n for n in WIDTHS if n <= 65])
    return st.one_of(st.sampled_from(WIDTHS), st.integers(1, 400), st.sampled_from(WIDE))


def _shared(draw: st.DrawFn, backend: str, names: tuple[str, ...], dropout: bool) -> dict[str, object]:
    small = interpreted(backend)
    d_in, d_out = draw(widths(small)), draw(widths(small))
    # The largest activation stays under half a million elements: the suite runs on two cores in minutes.
    most = min(40 if small else 300, 500_000 // max(d_in, d_out))
    dtype = draw(st.sampled_from(KERNEL_DTYPES))
    layouts = {name: draw(st.sampled_from(("contiguous", *ACTIVATION_LAYOUTS))) for name in ("y", "x")}
    layouts["g"] = draw(st.sampled_from(("contiguous", "expanded", *ACTIVATION_LAYOUTS)))
    layouts |= {name: draw(st.sampled_from(("contiguous", *PARAMETER_LAYOUTS))) for name in names if name in "ABR"}
    return {
        "lead": draw(leads(most)),
        "d_in": d_in,
        "d_out": d_out,
        "rank": draw(st.sampled_from([r for r in RANKS if r <= 16] if small else RANKS)),
        "dtype": dtype,
        "parameter_dtype": draw(st.sampled_from((dtype, torch.float32))),
        "scale": draw(st.sampled_from((1.0, 0.5, -2.0, 0.0, 0.37, 16.0))),
        "needs": frozenset(name for name in names if draw(st.sampled_from((True, True, False)))),
        "layouts": layouts,
        "dropout_p": draw(st.sampled_from((0.0, 0.0, 0.1, 0.5))) if dropout else 0.0,
        "seed": draw(st.integers(0, 2**20)),
    }


@st.composite
def residual_adds(draw: st.DrawFn, backend: str) -> Problem:
    return ResidualAdd(**_shared(draw, backend, ("y", "x", "A", "B"), dropout=True))  # type: ignore[arg-type]


@st.composite
def halves(draw: st.DrawFn, backend: str) -> Problem:
    return Halves(**_shared(draw, backend, ("y", "x", "A", "B"), dropout=True))  # type: ignore[arg-type]


@st.composite
def routed(draw: st.DrawFn, backend: str, routing: str) -> Problem:
    mixing = "weights" if routing == "static" else "R"
    shared = _shared(draw, backend, ("y", "x", "A", "B", mixing), dropout=True)
    experts = draw(st.integers(1, 8))
    if routing == "sample" and len(shared["lead"]) < 2:  # type: ignore[arg-type]
        shared["lead"] = (draw(st.integers(1, 4)), *(shared["lead"] or (1,)))  # type: ignore[misc]
    return Routed(
        **shared,  # type: ignore[arg-type]
        experts=experts,
        routing=routing,
        router_input=draw(st.sampled_from(("t", "x"))),
        masked=draw(st.booleans()),
        active=draw(
            st.one_of(st.sampled_from((None, True, False)), st.tuples(*[st.booleans() for _ in range(experts)]))
        ),
    )
