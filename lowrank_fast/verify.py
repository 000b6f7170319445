"""Every op x backend x dtype x gradient mask that this machine can run, against float64 mathematics.

The truth is `reference.py` in float64 on the CPU, differentiated by autograd. For each tensor that comes back (the
output and every gradient) the error is `|got - truth|_F / |truth|_F`, pooled over a few random draws. It must be

* at most twice the error of the same expression in plain PyTorch, in the same dtype (or the unit roundoff of the dtype
  it comes back in, which no result can be asked to beat), and
* under a bound: float32 1e-5, float16 2e-3, bfloat16 1e-2.

Also checked: two calls give the same bits; a gradient exists where it was asked for and only there; an inactive
expert's gradient is exactly zero. Inputs are seeded, so a machine gives the same answer every time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from . import backends, functional
from . import reference as ref

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SCALE = 1.5
DROPOUT_P = 0.25
DROPOUT_ROUTINGS = (("batch", "t"), ("token", "x"))  # Lily's router and EffiLoRA's; masks are slow to make

# An error of few degrees of freedom scatters (the router's gradient has E of them); four draws of seven or eight
# experts hold the ratio of two equally accurate results well under 2: 1.4 at most was seen.
DRAWS = 4


@dataclass(frozen=True)
class Shape:
    """`x [*lead, d_in]`, `y [*lead, d_out]`, rank and number of experts."""

    lead: tuple[int, ...]
    d_in: int
    d_out: int
    rank: int
    experts: int


ODD = Shape((3, 43), 203, 131, 5, 7)  # nothing is a multiple of a vector, a tile or a block of rows
ALIGNED = Shape((2, 96), 128, 256, 16, 8)


@dataclass(frozen=True)
class Problem:
    """An op on inputs of one dtype; `variant` is "plain", "dropout", "token_mask" or "active"."""

    op: str
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    shape: Shape
    routing: str | None = None
    router_input: str | None = None
    variant: str = "plain"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that can need a gradient, in the order of the public function."""
        if self.op == "residual_add":
            return "y", "x", "A", "B"
        if self.op == "shrink":
            return "x", "A"
        if self.op == "expand_add":
            return "y", "t", "B"
        return "y", "x", "A", "B", "weights" if self.routing == "static" else "R"

    @property
    def label(self) -> str:
        return (
            self.op
            if self.routing is None
            else f"{self.op} {self.routing}" + ("" if self.routing == "static" else f" on {self.router_input}")
        )


@dataclass(frozen=True)
class TensorError:
    """One compared tensor: its error, that of the same-dtype expression, and what it had to stay under."""

    error: float
    expression: float
    limit: float

    def to_dict(self) -> dict[str, float | None]:
        """As JSON types, which have no NaN or infinity: those become None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass
class Case:
    """One way of calling one problem on one backend. `mode` is "forward", "out", "inplace" or "gradients"."""

    problem: Problem
    backend: str
    mode: str
    needs: tuple[str, ...]
    tensors: dict[str, TensorError] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        problem = self.problem
        return {
            "op": problem.op,
            "routing": problem.routing,
            "router_input": problem.router_input,
            "variant": problem.variant,
            "backend": self.backend,
            "dtype": DTYPE_NAMES[problem.dtype],
            "parameter_dtype": DTYPE_NAMES[problem.parameter_dtype],
            "shape": asdict(problem.shape),
            "mode": self.mode,
            "needs": list(self.needs),
            "tensors": {name: error.to_dict() for name, error in self.tensors.items()},
            "passed": self.passed,
            "failures": self.failures,
        }


# ------------------------------------------------------------------------------------------------ what is run


def problems(quick: bool) -> Iterator[Problem]:
    """All problems; `quick` keeps one shape and parameters in the dtype of the activations."""
    for shape, dtype in itertools.product((ODD,) if quick else (ODD, ALIGNED), DTYPE_NAMES):
        for parameter_dtype in {dtype: None} if quick else {dtype: None, torch.float32: None}:
            for op in ("residual_add", "shrink", "expand_add"):
                yield Problem(op, dtype, parameter_dtype, shape)
            for op in ("residual_add", "shrink"):
                yield Problem(op, dtype, parameter_dtype, shape, variant="dropout")
            for routing, router_input in itertools.product(ref.ROUTINGS, ref.ROUTER_INPUTS):
                if routing == "static" and router_input == "x":
                    continue  # the same call: static routing has no router
                variants = ["plain", "active"]
                if routing in ("batch", "sample"):
                    variants.append("token_mask")
                if (routing, router_input) in DROPOUT_ROUTINGS:
                    variants.append("dropout")
                for variant in variants:
                    yield Problem("routed_projection", dtype, parameter_dtype, shape, routing, router_input, variant)


def cases(problem: Problem, backend: str, quick: bool) -> Iterator[Case]:
    """The ways to call a problem: without gradients, and with every set of needed gradients.

    Variants other than "plain", and a quick run, take the sets with one input and the set of all.
    """
    yield Case(problem, backend, "forward", ())
    if problem.variant == "plain":
        if problem.op == "residual_add":
            yield Case(problem, backend, "out", ())
        if problem.op != "shrink":
            yield Case(problem, backend, "inplace", ())
    inputs = problem.inputs
    for count in range(1, len(inputs) + 1):
        if (quick or problem.variant != "plain") and 1 < count < len(inputs):
            continue
        for needs in itertools.combinations(inputs, count):
            yield Case(problem, backend, "gradients", needs)


# ------------------------------------------------------------------------------------------------ inputs


@dataclass
class Draw:
    """Random inputs of a problem on the CPU, and what they must give: output and gradient by name."""

    seed: int
    tensors: dict[str, Tensor]
    extras: dict[str, Any]
    upstream: Tensor
    truth: dict[str, Tensor]
    expression: dict[str, Tensor]

    @cached_property
    def norms(self) -> dict[str, tuple[float, float]]:
        """Of each result: the norm of the expression's error, and of the truth."""
        return {name: (distance(self.expression[name], truth), norm(truth)) for name, truth in self.truth.items()}


def draw_inputs(problem: Problem, seed: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Normal random inputs, scaled so that the update is as large as the stream and logits are of order one."""
    shape = problem.shape
    generator = torch.Generator().manual_seed(1000 + seed)

    def normal(*size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(dtype)

    activation, parameter = problem.dtype, problem.parameter_dtype
    bank = (shape.experts,) if problem.op == "routed_projection" else ()
    made = {
        "y": normal(*shape.lead, shape.d_out, dtype=activation),
        "x": normal(*shape.lead, shape.d_in, dtype=activation),
        "t": normal(*shape.lead, shape.rank, dtype=ref.accumulate_dtype(activation)),
        "A": normal(shape.rank, shape.d_in, dtype=parameter, scale=shape.d_in**-0.5),
        "B": normal(*bank, shape.d_out, shape.rank, dtype=parameter, scale=shape.rank**-0.5),
        "R": normal(shape.experts, shape.rank, dtype=parameter, scale=shape.rank**-0.5),
        "weights": torch.rand(shape.experts, generator=generator).to(ref.accumulate_dtype(activation)),
    }
    if problem.router_input == "x":
        made["R"] = normal(shape.experts, shape.d_in, dtype=parameter, scale=shape.d_in**-0.5)
    extras: dict[str, Any] = {}
    if problem.variant == "token_mask":
        extras["token_mask"] = torch.rand(shape.lead, generator=generator) < 0.7
    if problem.variant == "active":
        extras["active"] = torch.arange(shape.experts) % 3 != 1
    return {name: made[name] for name in problem.inputs}, extras


def seed_generator(seed: int, device: str) -> None:
    """Seed the default generator of one device (`torch.manual_seed` also keeps a stack trace for each absent GPU)."""
    if device == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


def dropout_mask(problem: Problem, seed: int, device: str) -> Tensor | None:
    """The keep mask `[*lead, d_in]` that the public function uses right after `seed_generator(seed, device)`."""
    if problem.variant != "dropout":
        return None
    seed_generator(seed, device)
    philox_seed = functional.dropout_seed(torch.device(device)).cpu()
    shape = problem.shape
    mask = ref.dropout_mask(philox_seed, math.prod(shape.lead), shape.d_in, DROPOUT_P)
    return mask.view(*shape.lead, shape.d_in)


def draw(problem: Problem, seed: int, device: str) -> Draw:
    """Inputs, the float64 truth and the same-dtype expression's results, all gradients included."""
    tensors, extras = draw_inputs(problem, seed)
    mask = dropout_mask(problem, seed, device)
    rows = problem.shape.rank if problem.op == "shrink" else problem.shape.d_out
    generator = torch.Generator().manual_seed(2000 + seed)
    dtype = ref.accumulate_dtype(problem.dtype) if problem.op == "shrink" else problem.dtype
    upstream = torch.randn(*problem.shape.lead, rows, generator=generator).to(dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    truth = results(lambda leaves: reference_call(problem, leaves, extras, mask), exact, upstream.double())
    plain = results(lambda leaves: expression(problem, leaves, extras, mask), tensors, upstream)
    return Draw(seed, tensors, extras, upstream, truth, plain)


def results(
    call: Callable[[dict[str, Tensor]], Tensor], tensors: dict[str, Tensor], upstream: Tensor
) -> dict[str, Tensor]:
    """`{"out": .., "dA": ..}` of a differentiable call with every input needing a gradient."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    out = call(leaves)
    out.backward(upstream.to(out.dtype))
    return {"out": out.detach()} | {f"d{name}": _gradient(leaf) for name, leaf in leaves.items()}


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def reference_call(problem: Problem, v: dict[str, Tensor], extras: dict[str, Any], mask: Tensor | None) -> Tensor:
    """The problem by `reference.py`."""
    p = 0.0 if mask is None else DROPOUT_P
    if problem.op == "shrink":
        return ref.shrink(v["x"], v["A"], mask, p)
    if problem.op == "expand_add":
        return ref.expand_add(v["y"], v["t"], v["B"], SCALE)
    if problem.op == "residual_add":
        return ref.residual_add(v["y"], v["x"], v["A"], v["B"], SCALE, mask, p)
    assert problem.routing is not None
    assert problem.router_input is not None
    return ref.routed_projection(
        v["y"], v["x"], v["A"], v["B"], v.get("R"), SCALE,
        routing=problem.routing, router_input=problem.router_input, weights=v.get("weights"), mask=mask, dropout_p=p,
        **extras,
    )  # fmt: skip


def expression(problem: Problem, v: dict[str, Tensor], extras: dict[str, Any], mask: Tensor | None) -> Tensor:
    """What a PyTorch user writes: every product and sum in the dtype of the activations."""
    dtype = problem.dtype
    v = {name: tensor.to(dtype) for name, tensor in v.items()}
    if "x" in v:
        dropped = v["x"] if mask is None else v["x"] * mask.to(dtype) / (1.0 - DROPOUT_P)
        t = dropped @ v["A"].mT
    else:
        t = v["t"]
    if problem.op == "shrink":
        return t
    if problem.op != "routed_projection":
        return v["y"] + SCALE * (t @ v["B"].mT)
    bank = v["B"]
    if "active" in extras:
        bank = torch.where(extras["active"][:, None, None], bank, bank.detach())
    if problem.routing == "static":
        return v["y"] + SCALE * (t @ torch.einsum("e,eor->or", v["weights"], bank).mT)
    p = torch.softmax((t if problem.router_input == "t" else v["x"]) @ v["R"].mT, -1)  # [.., E]
    if problem.routing == "token":
        z = (p[..., :, None] * t[..., None, :]).flatten(-2)  # [.., E r]
        return v["y"] + SCALE * (z @ bank.transpose(0, 1).flatten(1).mT)
    keep = extras["token_mask"].to(dtype)[..., None] if "token_mask" in extras else torch.ones_like(p[..., :1])
    means = (p * keep).sum(1) / keep.sum(1) if problem.routing == "sample" else (p * keep).sum((0, 1)) / keep.sum()
    mix = torch.einsum("...e,eor->...or", means, bank)  # [d_out, r] or [S, d_out, r]
    return v["y"] + SCALE * (t @ mix.mT)


# ------------------------------------------------------------------------------------------------ running


def public_call(problem: Problem, v: dict[str, Tensor], extras: dict[str, Any], **settings: Any) -> Tensor:
    """The problem through `lowrank_fast.functional`, on the backend that is in force."""
    if problem.variant == "dropout":
        settings |= {"dropout_p": DROPOUT_P, "training": True}
    if problem.op == "shrink":
        return functional.shrink(v["x"], v["A"], **settings)
    if problem.op == "expand_add":
        return functional.expand_add(v["y"], v["t"], v["B"], SCALE, **settings)
    if problem.op == "residual_add":
        return functional.residual_add(v["y"], v["x"], v["A"], v["B"], SCALE, **settings)
    settings |= {"routing": problem.routing, "router_input": problem.router_input, "weights": v.get("weights")}
    return functional.routed_projection(v["y"], v["x"], v["A"], v["B"], v.get("R"), SCALE, **extras, **settings)


def run_case(case: Case, data: Draw, device: str) -> dict[str, Tensor]:
    """Call it once: the output and the gradients that were asked for, by name; a missing gradient is left out."""
    leaves = {
        name: tensor.to(device, copy=True).requires_grad_(name in case.needs) for name, tensor in data.tensors.items()
    }
    extras = {name: value.to(device) for name, value in data.extras.items()}
    settings: dict[str, Any] = {}
    if case.mode == "inplace":
        settings["inplace"] = True
    elif case.mode == "out":
        settings["out"] = torch.full_like(leaves["y"], float("nan"))
    seed_generator(data.seed, device)
    with backends.use_backend(case.backend):
        out = public_call(case.problem, leaves, extras, **settings)
        if case.needs:
            out.backward(data.upstream.to(device))
    found = {"out": out.detach()}
    return found | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check(case: Case, draws: Sequence[Draw], device: str) -> Case:
    """Run a case on every draw and fill in its errors and failures."""
    wanted = ["out", *(f"d{name}" for name in case.needs)]
    try:
        runs = [run_case(case, data, device) for data in draws]
        again = run_case(case, draws[0], device)
    except Exception as error:  # a backend that raises has failed; the table must still come out
        case.failures.append(f"raised {type(error).__name__}: {error}")
        return case
    if any(list(found) != wanted for found in runs):
        case.failures.append(f"must return {', '.join(wanted)}; got {', '.join(runs[0])}")
        return case
    if not all(torch.equal(again[name], runs[0][name]) for name in wanted):
        case.failures.append("two calls with the same inputs gave different bits")
    for name in wanted:
        compare(case, name, [found[name].cpu() for found in runs], draws)
    if "active" in draws[0].extras and "B" in case.needs:
        frozen = ~draws[0].extras["active"]
        if any(found["dB"].cpu()[frozen].count_nonzero() for found in runs):
            case.failures.append("dB of an inactive expert must be zero")
    return case


def compare(case: Case, name: str, got: Sequence[Tensor], draws: Sequence[Draw]) -> None:
    """Record the pooled error of one tensor, and a failure for each rule that it breaks."""
    truth = [data.truth[name] for data in draws]
    expected = case.problem.dtype if name in ("out", "dy", "dx") else draws[0].tensors[name[1:]].dtype
    if name == "out" and case.problem.op == "shrink":
        expected = ref.accumulate_dtype(case.problem.dtype)
    if got[0].dtype is not expected or got[0].shape != truth[0].shape:
        must = f"{list(truth[0].shape)} {expected}"
        case.failures.append(f"{name} must be {must}; got {list(got[0].shape)} {got[0].dtype}")
        return
    of_expression, size = (math.hypot(*values) for values in zip(*(data.norms[name] for data in draws), strict=True))
    error = math.hypot(*map(distance, got, truth)) / (size or 1.0)
    by_expression = of_expression / (size or 1.0)
    bound, twice = BOUNDS[case.problem.dtype], max(2.0 * by_expression, torch.finfo(expected).eps / 2.0)
    case.tensors[name] = TensorError(error, by_expression, min(bound, twice))
    if not error <= bound:
        case.failures.append(f"{name}: relative error {error:.2e} is above the bound {bound:.0e}")
    if not error <= twice:
        case.failures.append(f"{name}: error {error:.2e} is above twice that of the expression, {by_expression:.2e}")


def norm(values: Tensor) -> float:
    """Frobenius norm; NaN where there is one."""
    return float(torch.linalg.vector_norm(values))


def distance(got: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference, in float64."""
    return norm(got - truth)


def device_of(backend: str) -> str:
    """Where a backend is verified: GPU kernels on a GPU (without one, Triton's interpreter), others on the CPU."""
    return "cuda" if backend in ("cuda", "triton") and torch.cuda.is_available() else "cpu"


def plan(names: Sequence[str], quick: bool) -> list[Case]:
    """Every case, problem by problem, so that one problem's truth serves all its cases."""
    return [case for problem in problems(quick) for name in names for case in cases(problem, name, quick)]


def run(names: Sequence[str], quick: bool = False) -> Iterator[Case]:
    """Check the cases of `plan(names, quick)` one after the other, on the backends `names`.

    Raises RuntimeError, with the reason, for a backend that cannot run here and ValueError for an unknown one.
    """
    for name in names:
        reason = backends.unavailable_reason(name)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} is not available: {reason}")
    for (problem, device), group in itertools.groupby(
        plan(names, quick), key=lambda case: (case.problem, device_of(case.backend))
    ):
        draws = [draw(problem, seed, device) for seed in range(DRAWS)]
        for case in group:
            yield check(case, draws, device)
