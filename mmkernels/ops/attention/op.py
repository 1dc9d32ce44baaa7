"""The ops `mmkernels::attention_fwd` and `mmkernels::attention_bwd`: schema, fake, backward.

q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv] -> out [Tq, H, Dv] in q's dtype, lse [H, Tq] natural log (float32; float64
for float64). lo, hi int32 [Tq] and first_q, last_q int32 [Tk] are the rows of an AttentionMask.
"""

from __future__ import annotations

from typing import Any

import torch

from mmkernels.runtime.register import Op

from . import native, reference

__all__ = ["attention_bwd_op", "attention_fwd_op"]


def _triton_fwd(*args: Any) -> Any:
    from .triton_fwd import attention_fwd

    return attention_fwd(*args)


def _triton_bwd(*args: Any) -> Any:
    from .triton_bwd import attention_bwd

    return attention_bwd(*args)


def _fwd_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((q.shape[0], q.shape[1], v.shape[2]))
    return out, q.new_empty((q.shape[1], q.shape[0]), dtype=lse_dtype)


def _bwd_fake(
    grad_out: torch.Tensor, grad_lse: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, lo, hi, first_q, last_q, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, first_q, last_q)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, *rest = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = attention_bwd_op(grad_out, grad_lse, q, k, v, out, *rest, ctx.scale, ctx.backend)
    return (*grads, *(None,) * 6)


attention_bwd_op = Op(
    "attention_bwd",
    "(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, float scale, str backend) -> (Tensor, Tensor, Tensor)",
    impls={"native": native.attention_bwd, "triton": _triton_bwd, "reference": reference.attention_bwd},
    fake=_bwd_fake,
)

attention_fwd_op = Op(
    "attention_fwd",
    "(Tensor q, Tensor k, Tensor v, Tensor lo, Tensor hi, Tensor first_q, Tensor last_q, float scale, str backend)"
    " -> (Tensor, Tensor)",
    impls={"native": native.attention_fwd, "triton": _triton_fwd, "reference": reference.attention_fwd},
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
