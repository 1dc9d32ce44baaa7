"""The pooling ops: schema, fake, backward.

mmkernels::packing_segment_pool_fwd   one row per segment: sum, mean, max (and its winners) or first
mmkernels::packing_segment_pool_bwd
mmkernels::packing_weighted_pool_fwd  the weighted sum of each segment's rows
mmkernels::packing_weighted_pool_bwd  gradients of rows and weights, in one pass over the rows
"""

from __future__ import annotations

from typing import Any

import torch

from mmkernels.ops.packing._impls import check_cu_seqlens, impls
from mmkernels.runtime.register import Op

__all__ = ["MODES", "segment_pool", "segment_pool_bwd", "weighted_pool", "weighted_pool_bwd"]

MODES = ("sum", "mean", "max", "first")


def _unchecked(*args: Any) -> None:
    """The forward has checked them."""


segment_pool_bwd = Op(
    "packing_segment_pool_bwd",
    "(Tensor grad_out, Tensor cu_seqlens, Tensor argmax, SymInt rows, str mode, str backend) -> Tensor",
    impls=impls("segment_pool_bwd", "bwd", _unchecked),
    fake=lambda grad_out, cu_seqlens, argmax, rows, mode, backend: grad_out.new_empty(rows, grad_out.shape[1]),
)


def _pool_fake(x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    return x.new_empty(segments, width), x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)


def _pool_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, cu_seqlens, ctx.mode, ctx.backend = inputs
    ctx.rows = x.shape[0]
    ctx.save_for_backward(cu_seqlens, output[1])


def _pool_backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple[Any, ...]:
    cu_seqlens, argmax = ctx.saved_tensors
    return segment_pool_bwd(grad_out, cu_seqlens, argmax, ctx.rows, ctx.mode, ctx.backend), None, None, None


segment_pool = Op(
    "packing_segment_pool_fwd",
    "(Tensor x, Tensor cu_seqlens, str mode, str backend) -> (Tensor, Tensor)",
    impls=impls("segment_pool", "fwd", lambda x, cu_seqlens, mode: check_cu_seqlens(cu_seqlens, x.shape[0])),
    fake=_pool_fake,
    setup_context=_pool_context,
    backward=_pool_backward,
)


weighted_pool_bwd = Op(
    "packing_weighted_pool_bwd",
    "(Tensor grad_out, Tensor x, Tensor weights, Tensor cu_seqlens, str backend) -> (Tensor, Tensor)",
    impls=impls("weighted_pool_bwd", "bwd", _unchecked),
    fake=lambda grad_out, x, weights, cu_seqlens, backend: (x.new_empty(x.shape), weights.new_empty(x.shape[0])),
)


def _weighted_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weights, cu_seqlens, ctx.backend = inputs
    ctx.save_for_backward(x, weights, cu_seqlens)


def _weighted_backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
    return *weighted_pool_bwd(grad_out, *ctx.saved_tensors, ctx.backend), None, None


weighted_pool = Op(
    "packing_weighted_pool_fwd",
    "(Tensor x, Tensor weights, Tensor cu_seqlens, str backend) -> Tensor",
    impls=impls("weighted_pool", "fwd", lambda x, weights, cu_seqlens: check_cu_seqlens(cu_seqlens, x.shape[0])),
    fake=lambda x, weights, cu_seqlens, backend: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]),
    setup_context=_weighted_context,
    backward=_weighted_backward,
)
