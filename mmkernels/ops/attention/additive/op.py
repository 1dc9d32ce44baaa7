"""The ops `mmkernels::attention_additive_fwd`, `_bwd` and `_second`: arguments, shapes, derivatives.

q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, H, Dv] in q's dtype, lse [H, Tq]. w, bias [H, D] and lse are
float32 (float64 for float64). A backend's dq is in w's dtype: the bias's gradient is its sum over the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.attention.additive import native, reference
from mmkernels.ops.attention.additive.second import additive_second
from mmkernels.ops.attention.flops import bwd_flops, fwd_flops, second_flops
from mmkernels.ops.attention.types import Visible
from mmkernels.runtime.register import Context, Op, Second, on_triton

__all__ = ["additive_bwd", "additive_fwd"]


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, mask: Visible) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), w.new_empty((q.shape[1], q.shape[0]))


def _bwd_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Visible,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dw, dbias = (x.new_empty(x.shape) for x in (q, k, v, w, bias))
    return dq, dk, dv, dw, dbias


def _second_fake(*args: Any) -> tuple[Tensor, ...]:
    grad_out, _, q, k, v, w, bias, _, _, mask = args[5:]
    grads = (x.new_empty(0 if grad_out is None else x.shape) for x in (q, k, v, w, bias))
    return *_fwd_fake(q, k, v, w, bias, mask), *grads


def _with_bias(run: Callable[..., Any]) -> Callable[..., Any]:
    """A backend's gradients, with dq cast to q's dtype, plus the bias gradient."""

    def gradients(grad_out: Tensor, grad_lse: Any, q: Tensor, *args: Any) -> tuple[Tensor, ...]:
        dq, *others = run(grad_out, grad_lse, q, *args)
        return dq.to(q.dtype), *others, dq.sum(0)

    return gradients


additive_bwd = Op(
    "attention_additive_bwd",
    fake=_bwd_fake,
    impls={
        "native": _with_bias(native.additive_bwd),
        "triton": _with_bias(on_triton("mmkernels.ops.attention.additive.triton_bwd", "additive_bwd")),
        "reference": _with_bias(reference.additive_bwd),
    },
    second=Second(
        additive_second,
        _second_fake,
        grads=("grad_out", "grad_lse"),
        wrt=("q", "k", "v", "w", "bias"),
        flops=lambda *args: second_flops(args[5], args[7], args[9], args[-1]),
    ),
    flops=lambda do, dlse, q, k, v, w, bias, out, lse, mask: bwd_flops(q, v, mask),
)


def _save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    *tensors, mask = inputs
    return *tensors, *outputs, mask


def _backward(ctx: Context, grad_out: Tensor | None, grad_lse: Tensor | None) -> dict[str, Tensor]:
    *_, out, _, _ = ctx.saved
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = additive_bwd(grad_out, grad_lse, *ctx.saved, ctx.backend)
    return dict(zip(("q", "k", "v", "w", "bias"), grads, strict=True))


def _jvp(ctx: Context, q: Any, k: Any, v: Any, w: Any, bias: Any, mask: Visible) -> tuple[Tensor, ...]:
    moved: tuple[Tensor, ...] = additive_bwd.second(q, k, v, w, bias, None, None, *ctx.saved, ctx.backend)
    return moved[:2]


additive_fwd = Op(
    "attention_additive_fwd",
    fake=_fwd_fake,
    impls={
        "native": native.additive_fwd,
        "triton": on_triton("mmkernels.ops.attention.additive.triton_fwd", "additive_fwd"),
        "reference": reference.additive_fwd,
    },
    save=_save,
    backward=_backward,
    jvp=_jvp,
    flops=lambda q, k, v, w, bias, mask: fwd_flops(q, v, mask),
)
