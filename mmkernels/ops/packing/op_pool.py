"""The pooling ops: schema, fake, backward.

mmkernels::packing_segment_pool_fwd   one row per segment: sum, mean, max (and its winners) or first
mmkernels::packing_segment_pool_bwd
mmkernels::packing_weighted_pool_fwd  the weighted sum of each segment's rows
mmkernels::packing_weighted_pool_bwd  gradients of rows and weights, in one pass over the rows

All are linear in rows, weights and gradients, each: every derivative is made of these ops again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.packing._impls import check_cu_seqlens, impls
from mmkernels.runtime.legacy_register import Op

__all__ = ["MODES", "segment_pool", "segment_pool_bwd", "weighted_pool", "weighted_pool_bwd"]

MODES = ("sum", "mean", "max", "first")


def _unchecked(*args: Any) -> None:
    """The forward has checked them."""


def _pool_like(ctx: Any, rows: Tensor) -> Tensor:
    """Pool rows as others were pooled: for "max", the rows that won there, which are -1 in an empty segment."""
    cu_seqlens, argmax = ctx.saved_tensors
    if ctx.mode != "max":
        return segment_pool(rows, cu_seqlens, ctx.mode, ctx.backend)[0]
    if rows.shape[0] == 0:
        return rows.new_zeros(argmax.shape)
    won = rows.gather(0, argmax.long().clamp(min=0))
    return torch.where(argmax < 0, torch.zeros_like(won), won)


def _pool_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cu_seqlens, argmax, ctx.rows, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(cu_seqlens, argmax)


def _pool_bwd_backward(ctx: Any, tangent: Tensor) -> tuple[Any, ...]:
    return _pool_like(ctx, tangent), *(None,) * 5


def _pool_bwd_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    return segment_pool_bwd(tangent, *ctx.saved_tensors, ctx.rows, ctx.mode, ctx.backend)


segment_pool_bwd = Op(
    "packing_segment_pool_bwd",
    "(Tensor grad_out, Tensor cu_seqlens, Tensor argmax, SymInt rows, str mode, str backend) -> Tensor",
    impls=impls("segment_pool_bwd", "bwd", _unchecked),
    fake=lambda grad_out, cu_seqlens, argmax, rows, mode, backend: grad_out.new_empty(rows, grad_out.shape[1]),
    setup_context=_pool_bwd_context,
    backward=_pool_bwd_backward,
    jvp=_pool_bwd_jvp,
)


def _pool_fake(x: Tensor, cu_seqlens: Tensor, mode: str, backend: str) -> tuple[Tensor, Tensor]:
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    return x.new_empty(segments, width), x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, cu_seqlens, ctx.mode, ctx.backend = inputs
    ctx.rows = x.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(cu_seqlens, output[1])


def _pool_backward(ctx: Any, grad_out: Tensor, _: Any) -> tuple[Any, ...]:
    cu_seqlens, argmax = ctx.saved_tensors
    return segment_pool_bwd(grad_out, cu_seqlens, argmax, ctx.rows, ctx.mode, ctx.backend), None, None, None


def _pool_jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
    return _pool_like(ctx, tangent), None


segment_pool = Op(
    "packing_segment_pool_fwd",
    "(Tensor x, Tensor cu_seqlens, str mode, str backend) -> (Tensor, Tensor)",
    impls=impls("segment_pool", "fwd", lambda x, cu_seqlens, mode: check_cu_seqlens(cu_seqlens, x.shape[0])),
    fake=_pool_fake,
    setup_context=_pool_context,
    backward=_pool_backward,
    jvp=_pool_jvp,
)


def _weighted_bwd_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _weighted_bwd_backward(ctx: Any, of_rows: Tensor, of_weights: Tensor) -> tuple[Any, ...]:
    grad_out, x, weights, cu_seqlens = ctx.saved_tensors
    rest = cu_seqlens, ctx.backend
    grad = weighted_pool(of_rows, weights, *rest) + weighted_pool(x, of_weights, *rest)
    return grad, *weighted_pool_bwd(grad_out, of_rows, of_weights, *rest), None, None


def _weighted_bwd_jvp(ctx: Any, of_grad: Any, of_rows: Any, of_weights: Any, *_: Any) -> tuple[Tensor, ...]:
    grad_out, x, weights, cu_seqlens = ctx.saved_tensors
    rest = cu_seqlens, ctx.backend
    of_rows, of_weights = _zeros_if_none(of_rows, x), _zeros_if_none(of_weights, weights)
    moved = weighted_pool_bwd(grad_out, of_rows, of_weights, *rest)
    linear = weighted_pool_bwd(_zeros_if_none(of_grad, grad_out), x, weights, *rest)
    return linear[0] + moved[0], linear[1] + moved[1]


def _zeros_if_none(tangent: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tangent is None else tangent


weighted_pool_bwd = Op(
    "packing_weighted_pool_bwd",
    "(Tensor grad_out, Tensor x, Tensor weights, Tensor cu_seqlens, str backend) -> (Tensor, Tensor)",
    impls=impls("weighted_pool_bwd", "bwd", _unchecked),
    fake=lambda grad_out, x, weights, cu_seqlens, backend: (x.new_empty(x.shape), weights.new_empty(x.shape[0])),
    setup_context=_weighted_bwd_context,
    backward=_weighted_bwd_backward,
    jvp=_weighted_bwd_jvp,
)


def _weighted_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(x, weights, cu_seqlens)


def _weighted_backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    return *weighted_pool_bwd(grad_out, *ctx.saved_tensors, ctx.backend), None, None


def _weighted_jvp(ctx: Any, of_rows: Any, of_weights: Any, *_: Any) -> Tensor:
    x, weights, cu_seqlens = ctx.saved_tensors
    rest = cu_seqlens, ctx.backend
    return weighted_pool(_zeros_if_none(of_rows, x), weights, *rest) + weighted_pool(
        x, _zeros_if_none(of_weights, weights), *rest
    )


weighted_pool = Op(
    "packing_weighted_pool_fwd",
    "(Tensor x, Tensor weights, Tensor cu_seqlens, str backend) -> Tensor",
    impls=impls("weighted_pool", "fwd", lambda x, weights, cu_seqlens: check_cu_seqlens(cu_seqlens, x.shape[0])),
    fake=lambda x, weights, cu_seqlens, backend: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]),
    setup_context=_weighted_context,
    backward=_weighted_backward,
    jvp=_weighted_jvp,
)
