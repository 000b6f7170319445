"""`torch.compile(fullgraph=True)` and `opcheck`: the fakes tell the truth about every op, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from lowrank_fast import functional, ops, use_backend

from ..support.accuracy import assert_same_bits
from ..support.problems import Halves, Problem, ResidualAdd, Routed, evaluate
from ..support.targets import device_of, interpreted


@pytest.fixture(autouse=True)
def _traceable(request: pytest.FixtureRequest) -> None:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if interpreted(str(parameters.get("backend", parameters.get("kernel_backend")))):
        pytest.skip("torch.compile cannot trace Triton's interpreter")


# ------------------------------------------------------------------------------------------------ opcheck


def _dropouts() -> Iterator[tuple[float, torch.Tensor | None]]:
    yield 0.0, None
    yield 0.3, torch.tensor([5, 7])


def _residual_inputs() -> Iterator[tuple[torch.Tensor, ...]]:
    for problem in (
        ResidualAdd((5,), 6, 7, 2),
        ResidualAdd((2, 3), 17, 5, 3, torch.bfloat16, torch.float32, layouts={"y": "padded_rows", "B": "transposed"}),
        ResidualAdd((0, 3), 4, 5, 1, torch.float16, torch.float16),
    ):
        inputs, g = problem.tensors()
        yield (*inputs.values(), g)


def _samples(op: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of `torch.ops.lowrank_fast.<op>`: several shapes, dtypes, layouts, masks of needed gradients."""
    if op.startswith("routed"):
        yield from _routed_samples(op)
        return
    for y, x, A, B, g in _residual_inputs():
        t = (x.float() @ A.float().T).contiguous()
        for p, seed in _dropouts():
            if op in ("residual_add", "residual_add_"):
                yield (y, x, A, B, 0.5, p, seed, p > 0), {}
            elif op == "residual_add_out":
                yield (y, x, A, B, 0.5, p, seed, p > 0), {"out": torch.zeros_like(y)}
            elif op == "residual_add_backward":
                yield (g, x, t, A, B, 0.5, p, seed, True, True, True), {}
                yield (g, None, t, A, B, 0.5, p, seed, True, False, False), {}
                yield (g, None, t, A, B, 0.5, p, seed, False, False, True), {}
            elif op == "residual_add_backward_out":
                gradients = {"dx": torch.zeros_like(x), "dA": torch.zeros_like(A), "dB": torch.zeros_like(B)}
                yield (g, x, t, A, B, 0.5, p, seed), gradients
            elif op == "residual_add_norm":
                weight, bias = torch.full(y.shape[-1:], 2.0), torch.ones(y.shape[-1:], dtype=y.dtype)
                yield (y, x, A, B, 0.5, weight, bias if p else None, 1e-5, p > 0), {}
            elif op == "shrink":
                yield (x, A, p, seed), {}
            elif op == "shrink_backward":
                yield (t, x, A, p, seed, x.dtype, True, True), {}
                yield (t, None, A, p, seed, x.dtype, True, False), {}
                yield (t, x, A, p, seed, x.dtype, False, True), {}
        if op in ("expand_add", "expand_add_"):
            yield (y, t, B, 0.5), {}
        elif op == "expand_add_backward":
            for needs in ((True, True), (True, False), (False, True)):
                yield (g, t, B, 0.5, *needs), {}


def _routed_samples(op: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    for routing, router_input in (("batch", "t"), ("batch", "x"), ("sample", "t"), ("token", "x"), ("static", "t")):
        problem = Routed((2, 3), 17, 5, 3, torch.bfloat16, torch.float32, routing=routing, router_input=router_input)
        inputs, g = problem.tensors()
        y, x, A, B = (inputs[name] for name in ("y", "x", "A", "B"))
        R, weights = inputs.get("R"), inputs.get("weights")
        mask = torch.tensor([[True, True, False], [True, False, False]])
        for p, seed in _dropouts():
            forward = (x, A, B, R, weights, mask, 0.5, routing, router_input, p, seed)
            if op != "routed_projection_backward":
                yield (y, *forward), {}
                continue
            _, t, probabilities, w = torch.ops.lowrank_fast.routed_projection(y, *forward)
            state = (t, probabilities, w, A, B, R, mask, torch.tensor([True, False, True]))
            settings = (0.5, routing, router_input, p, seed)
            yield (g, x, *state, *settings, [True, True, True, R is not None, R is None]), {}
            yield (g, x, *state, *settings, [False, False, True, False, False]), {}
            yield (g, x, *state, *settings, [True, False, False, False, False]), {}


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(op):
    """Schema (mutation, aliasing), fake against real results, and tracing with dynamic shapes."""
    samples = list(_samples(op))
    assert len(samples) >= 3
    for index, (arguments, keywords) in enumerate(samples):
        # Tracing takes a second or more: once is enough, the other inputs vary what the cheap checks look at.
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        if index == 0:
            checks += ("test_aot_dispatch_dynamic",)
        opcheck(getattr(torch.ops.lowrank_fast, op).default, arguments, keywords, test_utils=checks)


def _on_meta(argument: object) -> object:
    return argument.to("meta") if isinstance(argument, torch.Tensor) else argument


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_fakes_give_the_sizes_dtypes_and_strides_of_the_real_results(op):
    for arguments, keywords in _samples(op):
        real = getattr(torch.ops.lowrank_fast, op)(*arguments, **keywords)
        fake = ops.FAKES[op](*map(_on_meta, arguments), **{name: _on_meta(a) for name, a in keywords.items()})
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple | list) else [(real, fake)]
        for got, expected in pairs:
            if got is None:
                continue
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            assert got.numel() <= 1 or got.stride() == expected.stride()


# ------------------------------------------------------------------------------------------------ torch.compile

EVERYTHING = frozenset(("y", "x", "A", "B", "R", "weights"))
COMPILED: list[Problem] = [
    ResidualAdd((2, 9), 24, 40, 4, needs=EVERYTHING & frozenset("yxAB")),
    ResidualAdd((2, 9), 24, 40, 4, torch.bfloat16, torch.float32, needs=frozenset("xB")),
    Halves((2, 9), 24, 40, 4, needs=frozenset("yxAB")),
    Routed((2, 9), 24, 40, 4, needs=EVERYTHING, routing="batch", masked=True),
    Routed((2, 9), 24, 40, 4, needs=EVERYTHING, routing="sample", active=(True, False, True)),
    Routed((2, 9), 24, 40, 4, needs=EVERYTHING, routing="token", router_input="x"),
    Routed((2, 9), 24, 40, 4, needs=EVERYTHING, routing="static", active=False),
]


def _assert_compiles(problem: Problem, backend: str, compiler: str) -> None:
    """Output and gradients of the compiled call have the bits of the plain one."""
    inputs, g = problem.tensors(device_of(backend))
    torch._dynamo.reset()
    results = []
    with use_backend(backend):
        plainly = problem.prepared(g.device)
        for call in (plainly, torch.compile(plainly, fullgraph=True, backend=compiler)):
            leaves = {name: value.detach().requires_grad_(name in problem.needs) for name, value in inputs.items()}
            out = call(**leaves)
            out.backward(g)
            results.append([out.detach(), *(leaf.grad for leaf in leaves.values())])
    for plain, compiled in zip(*results, strict=True):
        assert (plain is None) == (compiled is None)
        if plain is not None:
            assert_same_bits(compiled, plain)


@pytest.mark.parametrize("problem", COMPILED, ids=lambda p: f"{getattr(p, 'routing', type(p).__name__)}-{p.dtype}")
def test_one_graph_compiles_with_the_bits_of_the_plain_call(backend, problem):
    _assert_compiles(problem, backend, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("problem", COMPILED, ids=lambda p: f"{getattr(p, 'routing', type(p).__name__)}-{p.dtype}")
def test_inductor_compiles_with_the_bits_of_the_plain_call(kernel_backend, problem):
    _assert_compiles(problem, kernel_backend, "inductor")


DYNAMIC: list[Problem] = [
    ResidualAdd((2, 9), 24, 40, 4, needs=frozenset("yxAB")),
    Halves((2, 9), 24, 40, 4, needs=frozenset("yxAB"), dropout_p=0.3),
    Routed((2, 9), 24, 40, 4, needs=frozenset("yxABR"), routing="batch", masked=True),
    Routed((2, 9), 24, 40, 4, needs=frozenset("yxABR"), routing="sample"),
    Routed((2, 9), 24, 40, 4, needs=frozenset("yxABR"), routing="token", router_input="x", dropout_p=0.3),
    Routed((2, 9), 24, 40, 4, needs=frozenset(("x", "B", "weights")), routing="static"),
]


@pytest.mark.parametrize("problem", DYNAMIC, ids=lambda p: getattr(p, "routing", type(p).__name__))
def test_dynamic_shapes_do_not_recompile_for_every_length(kernel_backend, problem):
    """Forward and backward of every function, with and without dropout, one graph for all lengths."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    settings = problem.prepared(device_of(kernel_backend))
    if isinstance(problem, Routed):
        settings = partial(settings.func, **{**settings.keywords, "token_mask": None})

    def call(token_mask, **tensors):
        return settings(**tensors, token_mask=token_mask) if token_mask is not None else settings(**tensors)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    with use_backend(kernel_backend):
        for tokens in (9, 5, 17, 33):
            longer = problem.but(lead=(2, tokens))
            inputs, g = longer.tensors(device_of(kernel_backend))
            mask = longer.token_mask(device_of(kernel_backend)) if isinstance(longer, Routed) else None
            results = []
            for function in (call, compiled):
                torch.manual_seed(tokens)
                results.append(evaluate(partial(function, mask), inputs, problem.needs, g))
            for name, value in results[0].items():
                assert_same_bits(results[1][name], value, name)
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, graphs


def test_changing_which_experts_train_does_not_recompile(backend):
    """The Reducer changes its mask every step."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    inputs, _ = Routed().tensors(device_of(backend))
    inputs["B"].requires_grad_()
    compiled = torch.compile(
        lambda active: functional.routed_projection(**inputs, active=active), fullgraph=True, backend=counter
    )
    graphs = []
    with use_backend(backend):
        for active in ([True, True, True], [True, False, True], [False, False, False]):
            compiled(torch.tensor(active, device=inputs["y"].device)).sum().backward()
            assert [bool(rows.any()) for rows in inputs["B"].grad] == active
            inputs["B"].grad = None
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, graphs


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("op", ["residual_add", "expand_add", "routed_projection"])
def test_inplace_compiles(backend, op, recorded):
    y, x, A, B, R = Routed((7,)).tensors(device_of(backend))[0].values()
    t = (x @ A.T).detach()
    rest = {"residual_add": (x, A, B[0]), "expand_add": (t, B[0]), "routed_projection": (x, A, B, R)}[op]
    rest = tuple(value.detach().requires_grad_(recorded) for value in rest)
    function = getattr(functional, op)

    def step(y, *rest):
        stream = y * 1.0
        return function(stream, *rest, inplace=True) * 2.0

    torch._dynamo.reset()
    results = []
    with use_backend(backend):
        for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            out = call(y, *rest)
            gradients = torch.autograd.grad(out.sum(), rest) if recorded else ()
            results.append([out.detach(), *gradients])
    for plain, compiled in zip(*results, strict=True):
        assert_same_bits(compiled, plain)


def test_out_compiles(backend):
    y, x, A, B = ResidualAdd().tensors(device_of(backend))[0].values()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda out: functional.residual_add(y, x, A, B, 0.7, out=out), fullgraph=True, backend="aot_eager"
    )
    out = torch.full_like(y, float("nan"))
    with use_backend(backend), torch.no_grad():
        compiled(out)
        assert_same_bits(out, functional.residual_add(y, x, A, B, 0.7))


def test_dropout_compiles_and_draws_anew_in_every_call(backend):
    torch._dynamo.reset()
    inputs, g = ResidualAdd((40,), dropout_p=0.5).tensors(device_of(backend))
    leaves = [value.requires_grad_() for value in inputs.values()]

    def step(y, x, A, B):
        return functional.residual_add(y, x, A, B, dropout_p=0.5, training=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        first, second = compiled(*leaves), compiled(*leaves)
        assert not torch.equal(first, second)
        first.backward(g)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_autocast_compiles(backend):
    torch._dynamo.reset()
    y, x, A, B = ResidualAdd().tensors(device_of(backend))[0].values()
    stream = y.bfloat16()

    def step(x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return functional.residual_add(stream, x, A, B)

    with use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
        assert compiled.dtype is torch.bfloat16
        assert_same_bits(compiled, step(x))
