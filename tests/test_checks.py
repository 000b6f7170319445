"""Bad input gets an error before any work: of the right type, naming the operation, the argument, what it was and what
it must be, and with no tensor changed.

A case is an operation, a change to a valid call, the error's type and fragments that its message must hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_fast import functional, use_backend

from .support.accuracy import assert_same_bits

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]

D_IN, D_OUT, RANK, EXPERTS = 8, 10, 3, 4


def _valid(op: str) -> Arguments:
    """Arguments of a call of the public function `op` that is fine."""
    torch.manual_seed(0)
    y, x, t = torch.randn(2, 6, D_OUT), torch.randn(2, 6, D_IN), torch.randn(2, 6, RANK)
    A, B, bank = torch.randn(RANK, D_IN), torch.randn(D_OUT, RANK), torch.randn(EXPERTS, D_OUT, RANK)
    return {
        "residual_add": {"y": y, "x": x, "A": A, "B": B},
        "shrink": {"x": x, "A": A},
        "expand_add": {"y": y, "t": t, "B": B},
        "routed_projection": {"y": y, "x": x, "A": A, "B": bank, "R": torch.randn(EXPERTS, RANK)},
    }[op]


def _assert_refused(op: str, change: Change, error: type[Exception], says: tuple[str, ...]) -> None:
    arguments = change(_valid(op))
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor) and not value.is_meta}
    before = {name: (value.detach().clone(), value._version) for name, value in tensors.items()}
    with pytest.raises(error) as caught:
        getattr(functional, op)(**arguments)
    message = str(caught.value)
    for fragment in (f"{op}: ", *says):
        assert fragment in message, f"{fragment!r} is not in {message!r}"
    for name, value in tensors.items():
        assert_same_bits(value.detach(), before[name][0], name)
        assert value._version == before[name][1], f"{name} counts as modified"


def _with(**changes: Any) -> Change:
    return lambda arguments: {**arguments, **changes}


def _to(name: str, where: Any) -> Change:
    return lambda arguments: {**arguments, name: arguments[name].to(where)}


# ------------------------------------------------------------------------------------------------ shapes

SHAPES = [
    ("residual_add", "x", (2, 7, D_IN), ("leading dimensions of y [2, 6, 10]",)),
    ("residual_add", "x", (6, D_IN), ("leading dimensions of y [2, 6, 10]",)),
    ("residual_add", "x", (12, D_IN), ("leading dimensions of y [2, 6, 10]",)),
    ("residual_add", "A", (RANK, D_IN + 1), ("[r, d_in=8]",)),
    ("residual_add", "A", (D_IN, RANK), ("[r, d_in=8]",)),
    ("residual_add", "A", (D_IN,), ("[r, d_in=8]",)),
    ("residual_add", "A", (1, RANK, D_IN), ("[r, d_in=8]",)),
    ("residual_add", "A", (0, D_IN), ("r >= 1",)),
    ("residual_add", "B", (D_OUT + 1, RANK), ("[d_out=10, r=3]",)),
    ("residual_add", "B", (D_OUT, RANK + 1), ("[d_out=10, r=3]",)),
    ("residual_add", "B", (RANK, D_OUT), ("[d_out=10, r=3]",)),
    ("residual_add", "B", (D_OUT,), ("[d_out=10, r=3]",)),
    ("residual_add", "B", (1, D_OUT, RANK), ("[d_out=10, r=3]",)),
    ("shrink", "A", (RANK, D_IN - 1), ("[r, d_in=8]",)),
    ("shrink", "A", (0, D_IN), ("r >= 1",)),
    ("expand_add", "t", (2, 5, RANK), ("leading dimensions of y [2, 6, 10]",)),
    ("expand_add", "t", (12, RANK), ("leading dimensions of y [2, 6, 10]",)),
    ("expand_add", "t", (2, 6, 0), ("r >= 1",)),
    ("expand_add", "B", (D_OUT, RANK + 1), ("[d_out=10, r=3]",)),
    ("expand_add", "B", (D_OUT + 1, RANK), ("[d_out=10, r=3]",)),
    ("routed_projection", "x", (2, 7, D_IN), ("leading dimensions of y [2, 6, 10]",)),
    ("routed_projection", "A", (RANK, D_IN + 1), ("[r, d_in=8]",)),
    ("routed_projection", "A", (0, D_IN), ("r >= 1",)),
    ("routed_projection", "B", (EXPERTS, D_OUT, RANK + 1), ("bank [E >= 1, d_out=10, r=3]",)),
    ("routed_projection", "B", (EXPERTS, D_OUT + 1, RANK), ("bank [E >= 1, d_out=10, r=3]",)),
    ("routed_projection", "B", (D_OUT, RANK), ("bank [E >= 1, d_out=10, r=3]",)),
    ("routed_projection", "B", (0, D_OUT, RANK), ("E >= 1",)),
    ("routed_projection", "R", (EXPERTS + 1, RANK), ("[E=4, 3]", "bank B")),
    ("routed_projection", "R", (EXPERTS, RANK + 1), ("[E=4, 3]", "router_input='t'")),
    ("routed_projection", "R", (EXPERTS,), ("[E=4, 3]",)),
]


@pytest.mark.parametrize(("op", "name", "shape", "says"), SHAPES, ids=lambda value: str(value).replace(" ", ""))
def test_a_wrong_shape_is_refused(op, name, shape, says):
    _assert_refused(op, _with(**{name: torch.randn(shape)}), ValueError, (name, *says, f"got {list(shape)}"))


@pytest.mark.parametrize(
    ("op", "name"), [("residual_add", "y"), ("residual_add", "x"), ("shrink", "x"), ("expand_add", "y")]
)
def test_a_scalar_is_refused(op, name):
    _assert_refused(op, _with(**{name: torch.tensor(1.0)}), ValueError, (name, "0-dimensional"))


def test_a_scalar_t_is_refused():
    _assert_refused("expand_add", _with(t=torch.tensor(1.0)), ValueError, ("t must be", "got []"))


# ------------------------------------------------------------------------------------------------ dtypes and devices

TENSORS = [(op, name) for op in ("residual_add", "shrink", "expand_add", "routed_projection") for name in _valid(op)]
PARAMETERS = [(op, name) for op, name in TENSORS if name not in "yx"]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_a_tensor_that_is_not_floating_is_refused(op, name, dtype):
    _assert_refused(op, _to(name, dtype), TypeError, (name, "float32", f"got {dtype}"))


@pytest.mark.parametrize("op", ["residual_add", "routed_projection"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_x_of_another_dtype_than_y_is_refused(op, dtype):
    _assert_refused(op, _to("x", dtype), TypeError, ("x must have the dtype of y, torch.float32", f"got {dtype}"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_a_parameter_of_a_third_dtype_is_refused(op, name, dtype):
    _assert_refused(op, _to(name, dtype), TypeError, (f"{name} must have the dtype", "torch.float32", f"got {dtype}"))


@pytest.mark.parametrize(("op", "name"), PARAMETERS)
def test_float32_parameters_beside_float64_activations_are_refused(op, name):
    def change(arguments: Arguments) -> Arguments:
        return {key: value if key == name else value.double() for key, value in arguments.items()}

    _assert_refused(op, change, TypeError, (f"{name} must have the dtype", "torch.float64", "got torch.float32"))


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if (op, name) != ("shrink", "x")])
def test_a_tensor_on_another_device_is_refused(op, name):
    """The stream decides the device, so with `y` elsewhere it is the next tensor that is wrong."""
    if name == "y":
        wrong = "t" if op == "expand_add" else "x"
        _assert_refused(op, _to(name, "meta"), ValueError, (f"{wrong} must be on the device of", "meta", "got cpu"))
    else:
        _assert_refused(op, _to(name, "meta"), ValueError, (f"{name} must be on the device of", "cpu", "got meta"))


# ------------------------------------------------------------------------------------------------ scalars


@pytest.mark.parametrize("op", ["residual_add", "expand_add", "routed_projection"])
def test_a_scale_beyond_every_float_is_refused(op):
    _assert_refused(op, lambda arguments: arguments | {"scale": 10**400}, ValueError, ("scale must fit a float",))


@pytest.mark.parametrize("op", ["residual_add", "expand_add", "routed_projection"])
@pytest.mark.parametrize("scale", ["1", None, torch.tensor(1.0), 1j], ids=repr)
def test_a_scale_that_is_no_number_is_refused(op, scale):
    _assert_refused(op, _with(scale=scale), TypeError, ("scale must be a float", f"got {type(scale).__name__}"))


@pytest.mark.parametrize("op", ["residual_add", "shrink", "routed_projection"])
@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, float("nan"), float("inf")])
def test_a_dropout_probability_outside_zero_to_one_is_refused(op, p):
    """Also in evaluation, where it would do nothing: the mistake shows before the first training step."""
    for training in (False, True):
        change = _with(dropout_p=p, training=training)
        _assert_refused(op, change, ValueError, ("dropout_p must be in [0, 1)", f"got {p}"))


# ------------------------------------------------------------------------------------------------ routing

ROUTED = [
    (
        "unknown routing",
        {"routing": "tokens"},
        ValueError,
        ("routing", "'batch', 'sample', 'token', 'static'", "'tokens'"),
    ),
    ("routing None", {"routing": None}, ValueError, ("routing", "'batch', 'sample', 'token', 'static'", "got None")),
    ("unknown router input", {"router_input": "y"}, ValueError, ("router_input must be 't' or 'x'", "got 'y'")),
    ("router on x of width r", {"router_input": "x"}, ValueError, ("R must be [E=4, 8]", "router_input='x'", "[4, 3]")),
    ("no router", {"R": None}, ValueError, ("R must be [E=4, 3]", "routing='batch'", "got None")),
    ("static with a router", {"routing": "static", "weights": torch.ones(4)}, ValueError, ("R must be None", "[4, 3]")),
    ("static without weights", {"routing": "static", "R": None}, ValueError, ("weights", "[E=4]", "got None")),
    (
        "static weights of another E",
        {"routing": "static", "R": None, "weights": torch.ones(5)},
        ValueError,
        ("weights", "[E=4]", "got [5]"),
    ),
    (
        "static weights per sample",
        {"routing": "static", "R": None, "weights": torch.ones(2, 4)},
        ValueError,
        ("weights", "[E=4]", "got [2, 4]"),
    ),
    (
        "integer weights",
        {"routing": "static", "R": None, "weights": torch.ones(4, dtype=torch.int64)},
        ValueError,
        ("weights must be a floating tensor", "torch.int64"),
    ),
    (
        "weights elsewhere",
        {"routing": "static", "R": None, "weights": torch.ones(4, device="meta")},
        ValueError,
        ("weights must be on the device of x, cpu", "got meta"),
    ),
    ("weights beside a router", {"weights": torch.ones(4)}, ValueError, ("weights must be None unless", "got [4]")),
    (
        "token mask of another shape",
        {"token_mask": torch.ones(2, 5, dtype=torch.bool)},
        ValueError,
        ("token_mask must be [2, 6]", "got [2, 5]"),
    ),
    ("float token mask", {"token_mask": torch.ones(2, 6)}, TypeError, ("token_mask must be bool", "torch.float32")),
    ("integer token mask", {"token_mask": torch.ones(2, 6).long()}, TypeError, ("token_mask must be bool", "int64")),
    (
        "token mask elsewhere",
        {"token_mask": torch.ones(2, 6, dtype=torch.bool, device="meta")},
        ValueError,
        ("token_mask must be on the device of x, cpu", "got meta"),
    ),
    (
        "active of another E",
        {"active": torch.ones(3, dtype=torch.bool)},
        ValueError,
        ("active must be [4]", "got [3]"),
    ),
    ("float active", {"active": torch.ones(4)}, TypeError, ("active must be bool", "torch.float32")),
    ("active number", {"active": 1}, TypeError, ("active must be a bool", "[E=4]", "got int")),
    ("active list", {"active": [True] * 4}, TypeError, ("active must be a bool", "[E=4]", "got list")),
    (
        "active elsewhere",
        {"active": torch.ones(4, dtype=torch.bool, device="meta")},
        ValueError,
        ("active must be on the device of x, cpu", "got meta"),
    ),
]


@pytest.mark.parametrize(("changes", "error", "says"), [case[1:] for case in ROUTED], ids=[case[0] for case in ROUTED])
def test_a_wrong_routing_argument_is_refused(changes, error, says):
    _assert_refused("routed_projection", _with(**changes), error, says)


def test_sample_routing_of_two_dimensional_input_is_refused():
    """Its leading dimension is tokens: there are no samples to take means over."""

    def change(arguments: Arguments) -> Arguments:
        return {**arguments, "y": arguments["y"][0], "x": arguments["x"][0], "routing": "sample"}

    says = ("routing='sample'", "at least 3 dimensions", "got [6, 8]")
    _assert_refused("routed_projection", change, ValueError, says)


# ------------------------------------------------------------------------------------------------ memory and autograd


def _inplace(**changes: Any) -> Change:
    return _with(inplace=True, **changes)


INPLACE = ["residual_add", "expand_add", "routed_projection"]


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_a_leaf_that_requires_grad_is_refused(op):
    change = _inplace(y=torch.randn(2, 6, D_OUT, requires_grad=True))
    _assert_refused(op, change, RuntimeError, ("inplace=True", "leaf y", "inplace=False"))


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_a_view_of_a_leaf_that_requires_grad_is_refused(op):
    leaf = torch.randn(12, D_OUT, requires_grad=True)
    _assert_refused(op, _inplace(y=leaf.view(2, 6, D_OUT)), RuntimeError, ("inplace=True", "leaf"))


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_one_of_several_views_is_refused(op):
    whole = torch.randn(4, 6, D_OUT, requires_grad=True) * 1.0
    _assert_refused(op, _inplace(y=whole.chunk(2)[0]), RuntimeError, ("inplace=True", "several views"))


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_a_view_made_without_grad_mode_is_refused(op):
    whole = torch.randn(12, D_OUT, requires_grad=True) * 1.0
    with torch.no_grad():
        y = whole.view(2, 6, D_OUT)
    change: Change = lambda arguments: _inplace(y=y, B=arguments["B"].requires_grad_())(arguments)  # noqa: E731
    _assert_refused(op, change, RuntimeError, ("inplace=True", "no_grad"))


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_an_inference_tensor_that_autograd_would_record_is_refused(op):
    with torch.inference_mode():
        y = torch.randn(2, 6, D_OUT)

    def change(arguments: Arguments) -> Arguments:
        return {**arguments, "y": y, "B": arguments["B"].requires_grad_(), "inplace": True}

    before = y.clone()
    with pytest.raises(RuntimeError, match=r"(?i)inference"):
        getattr(functional, op)(**change(_valid(op)))
    assert_same_bits(y, before)


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_on_an_expanded_y_is_refused(op):
    change = _inplace(y=torch.randn(1, 1, D_OUT).expand(2, 6, D_OUT))
    _assert_refused(op, change, RuntimeError, ("y is expanded", "clone"))


@pytest.mark.parametrize("op", ["residual_add", "routed_projection"])
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_inplace_where_y_overlaps_x_is_refused(op, shift):
    """Equal to `x`, or a view that begins `shift` elements into it."""
    memory = torch.randn(2 * 6 * D_OUT + shift)
    x, y = memory[: 2 * 6 * D_OUT].view(2, 6, D_OUT), memory[shift:].view(2, 6, D_OUT)
    change = _inplace(y=y, x=x, A=torch.randn(RANK, D_OUT))
    _assert_refused(op, change, RuntimeError, ("y and x", "overlap"))


def test_inplace_where_y_overlaps_t_is_refused():
    memory = torch.randn(2, 6, D_OUT)
    change = _inplace(y=memory, t=memory[..., :RANK])
    _assert_refused("expand_add", change, RuntimeError, ("y and t", "overlap"))


@pytest.mark.parametrize("op", INPLACE)
def test_inplace_where_y_overlaps_a_parameter_is_refused(op):
    memory = torch.randn(2 * 6 * D_OUT)
    size = (EXPERTS if op == "routed_projection" else 1) * D_OUT * RANK
    bank = torch.randn(size)
    memory = torch.cat([memory, bank])
    y = memory[: 2 * 6 * D_OUT].view(2, 6, D_OUT)
    shape = (EXPERTS, D_OUT, RANK) if op == "routed_projection" else (D_OUT, RANK)
    B = memory[2 * 6 * D_OUT - 1 :][:size].view(shape)
    _assert_refused(op, _inplace(y=y, B=B), RuntimeError, ("y and B", "overlap"))


WRITABLE = ["residual_add", "expand_add", "routed_projection"]


@pytest.mark.parametrize("op", WRITABLE)
def test_inplace_on_an_inference_tensor_outside_inference_mode_is_refused(op):
    def change(arguments: Arguments) -> Arguments:
        with torch.inference_mode():
            y = torch.ones_like(arguments["y"])
        return arguments | {"y": y, "inplace": True}

    with torch.no_grad():
        arguments = change(_valid(op))
        with pytest.raises(RuntimeError, match=f"{op}: y was made under torch.inference_mode"):
            getattr(functional, op)(**arguments)
    assert torch.equal(arguments["y"], torch.ones(2, 6, D_OUT))


@pytest.mark.parametrize("op", WRITABLE)
def test_inplace_on_a_view_with_the_negative_bit_is_refused(op):
    y = torch.randn(2, 6, D_OUT, dtype=torch.complex64).conj().imag
    assert y.is_neg()
    _assert_refused(op, _inplace(y=y), RuntimeError, ("y is a view with the negative bit set", "resolve_neg"))


@pytest.mark.parametrize("yes", [1, np.bool_(True)])
def test_inplace_may_be_anything_that_is_true(yes):
    arguments = _valid("residual_add")
    expected = functional.residual_add(**arguments)
    assert functional.residual_add(**arguments, inplace=yes) is arguments["y"]
    assert_same_bits(arguments["y"], expected, "inplace")


@pytest.mark.parametrize("op", WRITABLE)
def test_inplace_on_tensors_without_memory_finds_no_overlap(op):
    arguments = {name: value.to("meta") for name, value in _valid(op).items()}
    assert getattr(functional, op)(**arguments, inplace=True) is arguments["y"]
    with FakeTensorMode() as mode:
        arguments = {name: mode.from_tensor(value) for name, value in _valid(op).items()}
        assert getattr(functional, op)(**arguments, inplace=True) is arguments["y"]


@pytest.mark.parametrize(
    ("op", "name"),
    [("residual_add", name) for name in ("y", "x", "A", "B")]
    + [("shrink", "A"), ("expand_add", "t"), ("routed_projection", "y"), ("routed_projection", "B")],
)
@pytest.mark.parametrize("wrong", [np.ones((2, 6, D_OUT), np.float32), None, [1.0]], ids=["numpy", "None", "list"])
def test_what_is_no_tensor_is_refused_by_name(op, name, wrong):
    says = (f"{name} must be a tensor", type(wrong).__name__)
    _assert_refused(op, lambda arguments: arguments | {name: wrong}, TypeError, says)


def test_an_out_that_is_no_tensor_is_refused():
    says = ("out must be a tensor", "list")
    _assert_refused("residual_add", lambda arguments: arguments | {"out": [1.0]}, TypeError, says)


def test_neighbours_in_one_buffer_do_not_overlap():
    memory = torch.randn(2 * 6 * D_OUT * 2)
    y, x = (half.view(2, 6, D_OUT) for half in memory.view(2, -1))
    out = functional.residual_add(y, x, torch.randn(RANK, D_OUT), torch.randn(D_OUT, RANK), inplace=True)
    assert out is y


def test_out_together_with_inplace_is_refused():
    change = _inplace(out=torch.randn(2, 6, D_OUT))
    _assert_refused("residual_add", change, ValueError, ("out must be None with inplace=True",))


@pytest.mark.parametrize("name", ["y", "x", "A", "B"])
def test_out_where_autograd_records_is_refused(name):
    def change(arguments: Arguments) -> Arguments:
        arguments[name].requires_grad_()
        return {**arguments, "out": torch.zeros(2, 6, D_OUT)}

    _assert_refused("residual_add", change, RuntimeError, ("out=", "torch.no_grad()"))


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (torch.zeros(2, 6, D_OUT + 1), ValueError, ("out must be [2, 6, 10] torch.float32 on cpu", "got [2, 6, 11]")),
        (torch.zeros(12, D_OUT), ValueError, ("out must be [2, 6, 10]", "got [12, 10]")),
        (torch.zeros(2, 6, D_OUT).half(), ValueError, ("out must be [2, 6, 10] torch.float32", "torch.float16")),
        (torch.zeros(2, 6, D_OUT, device="meta"), ValueError, ("on cpu", "on meta")),
        (torch.zeros(D_OUT).expand(2, 6, D_OUT), RuntimeError, ("out is expanded", "clone")),
    ],
    ids=["width", "leading", "dtype", "device", "expanded"],
)
def test_an_unfit_out_is_refused(out, error, says):
    _assert_refused("residual_add", _with(out=out), error, says)


@pytest.mark.parametrize("name", ["x", "A", "B"])
def test_an_out_that_overlaps_an_input_is_refused(name):
    memory = torch.randn(2 * 6 * D_OUT + 200)
    shape = {"x": (2, 6, D_IN), "A": (RANK, D_IN), "B": (D_OUT, RANK)}[name]
    tensor = memory[2 * 6 * D_OUT - 1 :][: torch.Size(shape).numel()].view(shape)
    change = _with(out=memory[: 2 * 6 * D_OUT].view(2, 6, D_OUT), **{name: tensor})
    _assert_refused("residual_add", change, RuntimeError, (f"out and {name}", "overlap"))


def test_an_out_shifted_against_y_is_refused():
    memory = torch.randn(2 * 6 * D_OUT + 1)
    y, out = memory[:-1].view(2, 6, D_OUT), memory[1:].view(2, 6, D_OUT)
    _assert_refused("residual_add", _with(y=y, out=out), RuntimeError, ("out must be y itself",))


# ------------------------------------------------------------------------------------------------ backend


@pytest.mark.parametrize("op", ["residual_add", "shrink", "expand_add", "routed_projection"])
def test_an_unknown_backend_is_refused_before_any_call(op):
    arguments = _valid(op)
    before = {name: value.clone() for name, value in arguments.items()}
    says = "backend must be one of 'cuda', 'triton', 'cpu', 'reference'; got 'gpu'"
    with pytest.raises(ValueError, match=says), use_backend("gpu"):
        getattr(functional, op)(**arguments)
    for name, value in arguments.items():
        assert_same_bits(value, before[name], name)
