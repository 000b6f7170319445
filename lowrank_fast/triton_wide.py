"""Routed projection on the backend `triton` for ranks that one launch does not take (above 128), a piece of the rank at
a time: kernels for what is as large as an activation, PyTorch for the router, whose tensors are as small as `t`.

    t = x A^T,  p = softmax(router),  out = y + s sum_c sum_e w_e t_c B_ec^T        over pieces c of the rank
    u_c, dB_c, dw_c of each piece by its own pass over g;  dw = sum_c dw_c
    dt = (u_1, u_2, ..) + dlogits R;  dx, dA from dt as in the backward of `shrink`

Arguments and results are those of the ops. A piece costs a pass over `out`, and in backward one over `g` and `dx`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import fallback
from . import reference as ref
from . import triton_backend as backend


def routed_projection(
    y: Tensor, x: Tensor, out: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weights: Tensor | None,
    token_mask: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float, seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`out`, which may be `y`, is written; returns `t`, `p` and `w` for backward."""
    plan, token = backend.plan(), routing == "token"
    t = backend.shrink(x, A, dropout_p, seed)
    if routing == "static":
        assert weights is not None
        p, w = t.new_empty(0), weights.to(torch.float32, copy=True)
    else:
        assert R is not None
        p, w = ref.routing_weights(x, t, A, R, routing, router_input, token_mask)
    groups = x.shape[0] if routing == "sample" else 1
    mixing = {"mix": "token", "p": p.view(-1, B.shape[0])} if token else {"mix": "weights", "w": w, "groups": groups}
    with backend.Target(out) as target:
        source = plan.as_rows(y)
        pieces = [slice(None)] if token else plan.chunks(A.shape[0])  # per token, the kernel walks the ranks itself
        for part in pieces if target.numel() else []:
            some = plan.as_rows(t)[:, part].contiguous()
            plan.expand("routed_projection", source, some, B[:, :, part], target, scale, **mixing)
            source = target
    return t, p, t.new_empty(0) if token else w


def routed_projection_backward(
    g: Tensor, x: Tensor | None, t: Tensor, p: Tensor, w: Tensor, A: Tensor, B: Tensor, R: Tensor | None,
    token_mask: Tensor | None, active: Tensor | None, scale: float, routing: str, router_input: str, dropout_p: float,
    seed: Tensor | None, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`dx, dA, dB, dR, dweights`."""
    need_dx, need_dA, need_dB, need_dR, need_dweights = needs
    experts, token = B.shape[0], routing == "token"
    us, dBs = [], []
    dw = None
    for part in backend.plan().chunks(A.shape[0]):
        state = backend.plan_backward().Backward(
            "routed_projection_backward", g, None, A[part], B[:, :, part], 0.0, None, g.dtype
        )
        state.t, state.scale, state.w = backend.plan().as_rows(t)[:, part].contiguous(), scale, w
        state.groups = g.shape[0] if routing == "sample" else 1
        state.mix, state.p = ("token", p.view(-1, experts)) if token else ("weights", None)
        state.active = None if active is None or not need_dB else active.contiguous().view(torch.uint8)
        state.up(emit_u=True, need_dB=need_dB, need_dw=not token)
        dBs.append(torch.empty_like(B[:, :, part]) if need_dB else B.new_empty(0))
        state.reduce(dB=dBs[-1] if need_dB else None)
        us.append(state.u.sum(0))
        some = state.dw.view(state.groups, -1, experts)
        some = some if token else some.sum(1)
        dw = some if dw is None else dw + some
    assert dw is not None
    u = torch.cat(us, -1).view(t.shape)
    dlogits = None
    if token:
        rows = p.view(1, -1, experts)
        dlogits = rows * (dw - (rows * dw).sum(-1, keepdim=True))  # [1, T, E]
    elif routing != "static":
        dlogits = fallback.mean_softmax_backward(ref.by_sample(p, routing), dw, token_mask)  # [S, N, E]
    dx, dA, dR = g.new_empty(0), A.new_empty(0), A.new_empty(0)
    if dlogits is not None and R is not None:
        flat = dlogits.flatten(0, 1)
        source = t if router_input == "t" else x
        if router_input == "t":
            u = u + (flat @ R.float()).view(t.shape)
        if need_dR:
            assert source is not None
            dR = (flat.mT @ source.reshape(-1, source.shape[-1]).float()).to(R.dtype)
    if need_dx or need_dA:
        dx, dA = backend.shrink_backward(u, x, A, dropout_p, seed, torch.float32, need_dx, need_dA)
        if need_dx and dlogits is not None and R is not None and router_input == "x":
            dx = dx + (dlogits.flatten(0, 1) @ R.float()).view(dx.shape)
    dB = torch.cat(dBs, -1) if need_dB else dBs[0]
    return dx.to(g.dtype), dA, dB, dR, dw[0] if need_dweights else w.new_empty(0)
