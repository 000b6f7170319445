"""Runs the CUDA kernels on CPU tensors: the ops of `lowrank_fast.ops`, executed by the SIMT harness.

    simt = Simt(seed=3)
    out, t = simt.residual_add(y, x, A, B, 1.0, 0.0, None, True)
    assert simt.findings == ""

Each method has the signature of its op. Buffers are declared to the harness with their exact extent: inputs are
read-only, outputs and workspace start as NaN and count as uninitialised until written. Findings (races, bounds,
divergence ...) are collected, and raised as `KernelFault` unless `check=False`.
"""

from __future__ import annotations

import ctypes
import math
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_fast.cuda_codegen import demangled
from lowrank_fast.reference import dropout_threshold

from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ROUTINGS = {"batch": 0, "sample": 1, "token": 2, "static": 3}
COUNTERS = (
    "global_read", "global_written", "shared_accesses", "mma", "ldmatrix", "ldmatrix_phases", "ldmatrix_ideal",
    "barriers", "async_copies", "launches",
)  # fmt: skip

_pointer, _i64, _i32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Factor(ctypes.Structure):
    _fields_ = [
        ("data", _pointer), ("rank_stride", _i64), ("n_stride", _i64), ("group_stride", _i64), ("group", _i32),
        ("wide", _i32),
    ]  # fmt: skip


class _Rows(ctypes.Structure):
    _fields_ = [("data", _pointer), ("stride", _i64)]


class _Dropout(ctypes.Structure):
    _fields_ = [("seed", _pointer), ("threshold", ctypes.c_uint32), ("keep_scale", ctypes.c_float)]


class _Forward(ctypes.Structure):
    _fields_ = [
        ("tokens", _i64), ("dtype", _i32), ("d_in", _i32), ("d_out", _i32), ("rank", _i32), ("scale", ctypes.c_float),
        ("x", _Rows), ("y", _Rows), ("out", _Rows), ("A", _Factor), ("B", _Factor), ("t_in", _pointer),
        ("t_out", _pointer), ("dropout", _Dropout),
    ]  # fmt: skip


class _Backward(ctypes.Structure):
    _fields_ = [
        ("tokens", _i64), ("dtype", _i32), ("d_in", _i32), ("d_out", _i32), ("rank", _i32), ("scale", ctypes.c_float),
        ("g", _Rows), ("x", _Rows), ("dx", _Rows), ("t", _pointer), ("dt_in", _pointer), ("dt_out", _pointer),
        ("A", _Factor), ("B", _Factor), ("dA", _Factor), ("dB", _Factor), ("dropout", _Dropout),
    ]  # fmt: skip


class _Routed(ctypes.Structure):
    _fields_ = [
        ("tokens", _i64), ("segments", _i64), ("dtype", _i32), ("d_in", _i32), ("d_out", _i32), ("rank", _i32),
        ("experts", _i32), ("routing", _i32), ("router_on_x", _i32), ("scale", ctypes.c_float), ("x", _Rows),
        ("A", _Factor), ("B", _Factor), ("R", _Factor), ("token_mask", _pointer), ("dropout", _Dropout),
        ("y", _Rows), ("out", _Rows), ("weights", _pointer), ("t_out", _pointer), ("p_out", _pointer),
        ("w_out", _pointer), ("g", _Rows), ("dx", _Rows), ("t", _pointer), ("p", _pointer), ("w", _pointer),
        ("active", _pointer), ("dA", _Factor), ("dB", _Factor), ("dR", _Factor), ("dweights", _pointer),
    ]  # fmt: skip


class KernelFault(AssertionError):
    """The harness found something wrong with a kernel; the text has one finding a line, with file and line."""


class Simt:
    """The harness with one schedule: `seed` draws it, `preempt` is the chance of a switch at each memory access.

    `clusters` runs the sm_90 forms of the kernels where they apply.
    """

    def __init__(
        self,
        seed: int = 0,
        preempt: float = 0.0,
        library: Path | None = None,
        check: bool = True,
        clusters: bool = False,
    ) -> None:
        self.library = ctypes.CDLL(str(library or build.build()))
        self.library.simt_findings.restype = self.library.simt_kernels_run.restype = ctypes.c_char_p
        for name in ("forward", "backward", "routed_forward", "routed_backward"):
            function = getattr(self.library, f"lowrank_{name}", None)
            if function is not None:
                function.restype = ctypes.c_size_t
        self.seed, self.preempt, self.check, self.clusters = seed, preempt, check, clusters
        self.findings = ""
        self.counters: dict[str, int] = {}
        self.traffic: dict[str, tuple[int, int]] = {}  # bytes read and written per declared buffer
        self._buffers: list[tuple[str, Tensor, bool, bool]] = []

    def kernels_run(self) -> set[str]:
        """The names of all kernels that this process has run, such as `row_kernel<Bf16, 16, 64>`."""
        return set(demangled(self.library.simt_kernels_run().decode().split()))

    def kernels(self) -> set[str]:
        """The names of all kernels in the library: those that nvcc compiles too."""
        done = subprocess.run(["nm", "--defined-only", self.library._name], capture_output=True, text=True, check=True)
        symbols = [line.split()[-1] for line in done.stdout.splitlines()]
        return set(
            demangled([symbol for symbol in symbols if re.match(r"_ZN7lowrank9simt_host\d+\w+_kernelI", symbol)])
        )

    # -------------------------------------------------------------------------------------------- buffers

    def _declare(self, name: str, tensor: Tensor | None, written: bool = False, initialised: bool = True) -> int | None:
        """Remember a buffer for the next run; its address, or None for an absent or empty one."""
        if tensor is None or tensor.numel() == 0:
            return None
        self._buffers.append((name, tensor, written, initialised))
        return tensor.data_ptr()

    def _register(self) -> None:
        for name, tensor, written, initialised in self._buffers:
            size = tensor.element_size()
            if tensor.dim() == 2 and tensor.stride(1) == 1 and tensor.stride(0) > tensor.shape[1]:
                rows = tensor.shape[0]  # rows with gaps between them, which nobody may touch
                shape = (rows, tensor.shape[-1] * size, tensor.stride(-2) * size)
            else:
                reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                shape = (1, (reach + 1) * size, (reach + 1) * size)
            self.library.simt_buffer(
                name.encode(), _pointer(tensor.data_ptr()), *map(ctypes.c_size_t, shape), int(written), int(initialised)
            )

    def _run(self, function: str, arguments: ctypes.Structure) -> None:
        call = getattr(self.library, f"lowrank_{function}")
        error = ctypes.c_int(0)
        self.library.lowrank_use_clusters(int(self.clusters))
        workspace = torch.empty(call(ctypes.byref(arguments), None, ctypes.byref(error)) + 16, dtype=torch.uint8)
        base = (workspace.data_ptr() + 15) // 16 * 16
        self.library.simt_reset(ctypes.c_uint64(self.seed + 1), ctypes.c_double(self.preempt))
        self._register()
        call(ctypes.byref(arguments), _pointer(base), ctypes.byref(error))
        self.findings = self.library.simt_findings().decode()
        values = (ctypes.c_uint64 * len(COUNTERS))()
        self.library.simt_counters(values)
        self.counters = dict(zip(COUNTERS, values, strict=True))
        self.traffic = {}
        for index, (name, *_) in enumerate(self._buffers):
            read, written = ctypes.c_uint64(), ctypes.c_uint64()
            self.library.simt_buffer_traffic(index, ctypes.byref(read), ctypes.byref(written))
            self.traffic[name] = (read.value, written.value)
        self._buffers = []
        if self.check and self.findings:
            raise KernelFault(self.findings)

    def _rows(self, name: str, tensor: Tensor | None, written: bool = False, initialised: bool = True) -> _Rows:
        if tensor is None or tensor.numel() == 0:
            return _Rows()
        flat = as_rows(tensor)
        self._declare(name, flat, written, initialised)
        return _Rows(flat.data_ptr(), flat.stride(0))

    def _factor(self, name: str, tensor: Tensor | None, like: torch.dtype, kind: str, written: bool = False) -> _Factor:
        """`kind`: "A" [r, n], "B" [n, r], "bank" [E, n, r]. Element (k, n) of a factor."""
        if tensor is None or tensor.numel() == 0:
            return _Factor(group=1)
        self._declare(name, tensor, written, not written)
        wide = int(tensor.dtype is torch.float32 and like is not torch.float32)
        strides = tensor.stride()
        if kind == "bank":
            return _Factor(tensor.data_ptr(), strides[2], strides[1], strides[0], tensor.shape[2], wide)
        rank, n = (strides[0], strides[1]) if kind == "A" else (strides[1], strides[0])
        return _Factor(tensor.data_ptr(), rank, n, 0, 1 << 30, wide)

    def _dropout(self, p: float, seed: Tensor | None) -> _Dropout:
        if p == 0.0 or seed is None:
            return _Dropout()
        return _Dropout(self._declare("seed", seed), dropout_threshold(p), 1.0 / (1.0 - p))

    def _output(self, name: str, tensor: Tensor) -> int | None:
        return self._declare(name, tensor, written=True, initialised=False)

    # -------------------------------------------------------------------------------------------- ops

    def residual_add_out(
        self, y: Tensor | None, x: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float, p: float,
        seed: Tensor | None, save_t: bool, *, out: Tensor | None, t_in: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        like = x if x is not None else y
        assert like is not None
        rank = A.shape[0] if A is not None else t_in.shape[-1]  # type: ignore[union-attr]
        t = torch.empty(*like.shape[:-1], rank) if save_t else torch.empty(0)
        a = _Forward(tokens=like.numel() // like.shape[-1], dtype=DTYPES[like.dtype], rank=rank, scale=scale)
        a.x = self._rows("x", x)
        inplace = out is not None and y is not None and out.data_ptr() == y.data_ptr()
        if inplace:
            a.y = a.out = self._rows("y", y, written=True)
        else:
            a.y, a.out = self._rows("y", y), self._rows("out", out, True, False)
        if x is not None and A is not None:
            a.d_in, a.A = x.shape[-1], self._factor("A", A, like.dtype, "A")
        if out is not None and B is not None:
            a.d_out, a.B = out.shape[-1], self._factor("B", B, like.dtype, "B")
        a.t_in = self._declare("t", t_in)
        a.t_out = self._output("t", t)
        a.dropout = self._dropout(p, seed)
        self._run("forward", a)
        return t

    def residual_add(self, y, x, A, B, scale, p, seed, save_t):  # type: ignore[no-untyped-def]
        out = torch.empty(y.shape, dtype=y.dtype)
        return out, self.residual_add_out(y, x, A, B, scale, p, seed, save_t, out=out)

    def residual_add_(self, y, x, A, B, scale, p, seed, save_t):  # type: ignore[no-untyped-def]
        return self.residual_add_out(y, x, A, B, scale, p, seed, save_t, out=y)

    def shrink(self, x, A, p, seed):  # type: ignore[no-untyped-def]
        return self.residual_add_out(None, x, A, None, 1.0, p, seed, True, out=None)

    def expand_add(self, y, t, B, scale):  # type: ignore[no-untyped-def]
        out = torch.empty(y.shape, dtype=y.dtype)
        self.residual_add_out(y, None, None, B, scale, 0.0, None, False, out=out, t_in=t.float().contiguous())
        return out

    def expand_add_(self, y, t, B, scale):  # type: ignore[no-untyped-def]
        self.residual_add_out(y, None, None, B, scale, 0.0, None, False, out=y, t_in=t.float().contiguous())

    def _backward(
        self, g: Tensor | None, x: Tensor | None, t: Tensor | None, dt_in: Tensor | None, A: Tensor | None,
        B: Tensor | None, scale: float, p: float, seed: Tensor | None, dtype: torch.dtype,
        need: tuple[bool, bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """dx, dA, dB, dt, each empty unless `need` says so."""
        like = g if g is not None else dt_in
        factor = A if A is not None else B
        assert like is not None and factor is not None
        rank = A.shape[0] if A is not None else B.shape[1]  # type: ignore[union-attr]
        a = _Backward(tokens=math.prod(like.shape[:-1]), dtype=DTYPES[dtype], rank=rank, scale=scale)
        leading = like.shape[:-1]
        dx = torch.empty(*leading, A.shape[1], dtype=dtype) if need[0] and A is not None else torch.empty(0)
        dA = torch.empty_strided(A.shape, A.stride(), dtype=A.dtype) if need[1] and A is not None else torch.empty(0)
        dB = torch.empty_strided(B.shape, B.stride(), dtype=B.dtype) if need[2] and B is not None else torch.empty(0)
        dt = torch.empty(*leading, rank) if need[3] else torch.empty(0)
        a.g = self._rows("g", g)
        a.x = self._rows("x", x) if need[1] else _Rows()
        a.dx = self._rows("dx", dx, True, False)
        a.t = self._declare("t", t) if need[2] else None
        a.dt_in, a.dt_out = self._declare("dt", dt_in), self._output("dt", dt)
        if A is not None:
            a.d_in, a.A, a.dA = A.shape[1], self._factor("A", A, dtype, "A"), self._factor("dA", dA, dtype, "A", True)
        if B is not None:
            a.d_out, a.B, a.dB = B.shape[0], self._factor("B", B, dtype, "B"), self._factor("dB", dB, dtype, "B", True)
        a.dropout = self._dropout(p, seed)
        self._run("backward", a)
        return dx, dA, dB, dt

    def residual_add_backward(self, g, x, t, A, B, scale, p, seed, need_dx, need_dA, need_dB):  # type: ignore[no-untyped-def]
        return self._backward(g, x, t, None, A, B, scale, p, seed, g.dtype, (need_dx, need_dA, need_dB, False))[:3]

    def shrink_backward(self, dt, x, A, p, seed, dx_dtype, need_dx, need_dA):  # type: ignore[no-untyped-def]
        return self._backward(None, x, None, dt, A, None, 1.0, p, seed, dx_dtype, (need_dx, need_dA, False, False))[:2]

    def expand_add_backward(self, g, t, B, scale, need_dt, need_dB):  # type: ignore[no-untyped-def]
        _, _, dB, dt = self._backward(
            g, None, t, None, None, B, scale, 0.0, None, g.dtype, (False, False, need_dB, need_dt)
        )
        return dt, dB

    # -------------------------------------------------------------------------------------------- routed projection

    def _routed(self, like: Tensor, x, A, B, R, token_mask, scale, routing, router_input, p, seed) -> Any:  # type: ignore[no-untyped-def]
        a = _Routed(
            tokens=math.prod(like.shape[:-1]), segments=like.shape[0] if routing == "sample" else 1,
            dtype=DTYPES[like.dtype], d_in=A.shape[1], d_out=B.shape[1], rank=A.shape[0], experts=B.shape[0],
            routing=ROUTINGS[routing], router_on_x=int(router_input == "x"), scale=scale,
        )  # fmt: skip
        a.x = self._rows("x", x)
        a.A, a.B = self._factor("A", A, like.dtype, "A"), self._factor("B", B, like.dtype, "bank")
        a.R = self._factor("R", R, like.dtype, "B")
        a.token_mask = self._declare("token_mask", None if token_mask is None else token_mask.contiguous())
        a.dropout = self._dropout(p, seed)
        return a

    def routed_projection(self, y, x, A, B, R, weights, token_mask, scale, routing, router_input, p, seed):  # type: ignore[no-untyped-def]
        a = self._routed(x, x, A, B, R, token_mask, scale, routing, router_input, p, seed)
        out, leading, experts = torch.empty(y.shape, dtype=y.dtype), x.shape[:-1], B.shape[0]
        t = torch.empty(*leading, A.shape[0])
        probabilities = torch.empty(0) if routing == "static" else torch.empty(*leading, experts)
        w_shape = {"token": (0,), "sample": (x.shape[0], experts)}.get(routing, (experts,))
        w = torch.empty(w_shape)
        a.y, a.out = self._rows("y", y), self._rows("out", out, True, False)
        a.weights = self._declare("weights", None if weights is None else weights.float().contiguous())
        a.t_out, a.p_out, a.w_out = self._output("t", t), self._output("p", probabilities), self._output("w", w)
        self._run("routed_forward", a)
        return out, t, probabilities, w

    def routed_projection_backward(
        self, g, x, t, p, w, A, B, R, token_mask, active, scale, routing, router_input, dropout_p, seed,
        needs: Sequence[bool],
    ):  # type: ignore[no-untyped-def]  # fmt: skip
        need_dx, need_dA, need_dB, need_dR, need_dweights = needs
        keep_x = need_dA or (need_dR and router_input == "x")
        a = self._routed(g, x if keep_x else None, A, B, R, token_mask, scale, routing, router_input, dropout_p, seed)
        dx = torch.empty(*g.shape[:-1], A.shape[1], dtype=g.dtype) if need_dx else torch.empty(0)
        dA, dB, dR = (
            torch.empty_strided(f.shape, f.stride(), dtype=f.dtype) if need and f is not None else torch.empty(0)
            for f, need in ((A, need_dA), (B, need_dB), (R, need_dR))
        )
        dweights = torch.empty(B.shape[0]) if need_dweights else torch.empty(0)
        a.g, a.dx = self._rows("g", g), self._rows("dx", dx, True, False)
        a.t, a.p, a.w = self._declare("t", t), self._declare("p", p), self._declare("w", w)
        a.active = self._declare("active", active)
        a.dA = self._factor("dA", dA, g.dtype, "A", True)
        a.dB = self._factor("dB", dB, g.dtype, "bank", True)
        a.dR = self._factor("dR", dR, g.dtype, "B", True)
        a.dweights = self._output("dweights", dweights)
        self._run("routed_backward", a)
        return dx, dA, dB, dR, dweights


def as_rows(tensor: Tensor) -> Tensor:
    """`[.., d]` as `[T, d]` with unit inner stride; a copy only where no stride fits."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
