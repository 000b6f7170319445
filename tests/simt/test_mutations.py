"""Every planted bug of `mutations.py` is caught by the cases below, and the unchanged kernels pass all of them.

A bug that breaks a rule of the machine must be named by the harness (`KernelFault`), whatever the numbers are; the
others must show in the numbers. Mutants are built for bfloat16 and rank <= 16 only (LOWRANK_SMALL_BUILD): seconds each.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_fast import fallback

from . import build
from .harness import KernelFault, Simt
from .mutations import MUTATIONS, Mutation

BF16 = torch.bfloat16
WRONG = "wrong numbers"
SMALL = ("-DLOWRANK_SMALL_BUILD",)


def _random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def _wrong(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    for value, truth in zip(got, expected, strict=True):
        if truth.numel() == 0:
            continue
        error = (value.double() - truth.double()).norm() / truth.double().norm()
        if not error <= 1e-2:  # NaN is wrong too
            return True
    return False


def _exact(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]


def _forward(simt: Simt, tokens: int, d_in: int, d_out: int, rank: int, p: float = 0.0) -> bool:
    y, x = _random(tokens, d_out, seed=1), _random(tokens, d_in, seed=2)
    A, B = _random(rank, d_in, seed=3, scale=d_in**-0.5), _random(d_out, rank, seed=4, scale=rank**-0.5)
    seed = torch.tensor([987654321987, 5]) if p else None
    got = simt.residual_add(y, x, A, B, 0.7, p, seed, True)
    return _wrong(got, fallback.residual_add(*_exact(y, x, A, B), 0.7, p, seed, True))


def _backward(
    simt: Simt, tokens: int, d_in: int, d_out: int, rank: int, p: float = 0.0, needs: tuple[bool, ...] = (True,) * 3
) -> bool:
    g, x, t = _random(tokens, d_out, seed=1), _random(tokens, d_in, seed=2), _random(tokens, rank, seed=5).float()
    A, B = _random(rank, d_in, seed=3, scale=d_in**-0.5), _random(d_out, rank, seed=4, scale=rank**-0.5)
    seed = torch.tensor([987654321987, 5]) if p else None
    got = simt.residual_add_backward(g, x, t, A, B, 0.7, p, seed, *needs)
    return _wrong(got, fallback.residual_add_backward(*_exact(g, x, t, A, B), 0.7, p, seed, *needs))


def _in_place_padded_rows(simt: Simt, tokens: int, d_in: int, d_out: int, rank: int) -> bool:
    """Rows of `y` and `x` that end inside an aligned chunk of 16 bytes: whole chunks and a remainder."""
    stream, x = _random(tokens, d_out + 3, seed=1)[:, :d_out], _random(tokens, d_in + 5, seed=2)[:, :d_in]
    A, B = _random(rank, d_in, seed=3, scale=d_in**-0.5), _random(d_out, rank, seed=4, scale=rank**-0.5)
    truth = fallback.residual_add(*_exact(stream, x, A, B), 0.7, 0.0, None, False)[0]
    simt.residual_add_(stream, x, A, B, 0.7, 0.0, None, False)
    return _wrong((stream,), (truth,))


def _routed(simt: Simt, routing: str) -> bool:
    samples, tokens, d_in, d_out, rank, experts = 2, 35, 72, 136, 4, 3
    y, x, g = (_random(samples, tokens, d, seed=s) for d, s in ((d_out, 1), (d_in, 2), (d_out, 6)))
    A, B = _random(rank, d_in, seed=3, scale=d_in**-0.5), _random(experts, d_out, rank, seed=4, scale=rank**-0.5)
    R = _random(experts, rank, seed=7)
    mask = torch.rand(samples, tokens, generator=torch.Generator().manual_seed(8)) < 0.5
    active = torch.tensor([True, False, True])
    arguments = (None, mask, 0.7, routing, "t", 0.0, None)
    got = simt.routed_projection(y, x, A, B, R, *arguments)
    exact = fallback.routed_projection(*_exact(y, x, A, B, R), *arguments)
    if _wrong(got, exact):
        return True
    needs = [True, True, True, True, False]
    tail = (mask, active, 0.7, routing, "t", 0.0, None, needs)
    gradients = simt.routed_projection_backward(g, x, *got[1:], A, B, R, *tail)
    return _wrong(gradients, fallback.routed_projection_backward(*_exact(g, x, *exact[1:], A, B, R), *tail))


# Each returns whether the numbers are wrong. Shapes: tails of rows, columns and rank, at least three tiles a block.
CASES: dict[str, tuple[bool, Callable[[Simt], bool]]] = {
    "forward, large blocks": (False, lambda s: _forward(s, 293, 520, 200, 12)),
    "forward, small blocks": (False, lambda s: _forward(s, 21, 520, 1000, 16)),
    "forward, in place, padded rows": (False, lambda s: _in_place_padded_rows(s, 37, 531, 197, 16)),
    "backward": (False, lambda s: _backward(s, 293, 264, 72, 12)),
    "backward, clusters": (True, lambda s: _backward(s, 69, 1100, 600, 16)),
    "gradient pass, clusters": (True, lambda s: _backward(s, 293, 72, 2100, 12, needs=(False, True, True))),
    "dropout": (False, lambda s: _forward(s, 21, 136, 72, 8, p=0.4) or _backward(s, 45, 136, 72, 8, p=0.4)),
    "routed, batch": (False, lambda s: _routed(s, "batch")),
    "routed, token": (False, lambda s: _routed(s, "token")),
    "backward, two tiles a cluster": (True, lambda s: _backward(s, 2112, 40, 520, 16)),  # the slowest
}


def caught_by(library: Path) -> Iterator[str]:
    """The cases that fail, with what the harness said."""
    for name, (clusters, case) in CASES.items():
        try:
            if case(Simt(seed=1, library=library, clusters=clusters)):
                yield f"{name}: {WRONG}"
        except KernelFault as fault:
            yield f"{name}: {str(fault).splitlines()[0]}"


def mutated(mutation: Mutation, folder: Path) -> Path:
    """A copy of the kernel sources with the bug in it."""
    shutil.copytree(build.CUDA, folder, dirs_exist_ok=True)
    path = folder / mutation.file
    parts = path.read_text().split(mutation.old)
    assert len(parts) > mutation.occurrence + 1, (
        f"{mutation.name}: {mutation.old!r} is not in {mutation.file}; update mutations.py"
    )
    at = mutation.occurrence + 1
    path.write_text(mutation.old.join(parts[:at]) + mutation.new + mutation.old.join(parts[at:]))
    return folder


def test_every_mutation_applies(tmp_path):
    for mutation in MUTATIONS:
        mutated(mutation, tmp_path)
        shutil.rmtree(tmp_path)


def test_the_unchanged_kernels_pass_every_case():
    assert list(caught_by(build.build(flags=SMALL))) == []


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_planted_bug_is_caught(tmp_path, mutation):
    library = build.build(mutated(mutation, tmp_path / "kernels"), flags=SMALL, target=tmp_path / "mutant.so")
    caught = next(caught_by(library), None)
    assert caught is not None, f"no case caught: {mutation.name}"
    assert caught.endswith(WRONG) == mutation.numbers, f"{mutation.name}: {caught}"
