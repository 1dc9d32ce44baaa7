"""The pooling ops: signatures, shapes, derivatives.

mmkernels::packing_segment_pool_fwd   one row per segment: sum, mean, max (and its winners) or first
mmkernels::packing_segment_pool_bwd
mmkernels::packing_weighted_pool_fwd  the weighted sum of each segment's rows
mmkernels::packing_weighted_pool_bwd  gradients of rows and weights, in one pass over the rows

Each is linear in rows, weights and gradients separately, so every derivative is composed of these ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.packing import native, reference
from mmkernels.ops.packing.checks import check_cu_seqlens
from mmkernels.runtime.register import Context, Op, on_triton

__all__ = ["MODES", "segment_pool", "segment_pool_bwd", "weighted_pool", "weighted_pool_bwd"]

MODES = ("sum", "mean", "max", "first")


def _pool_like(rows: Tensor, cu_seqlens: Tensor, argmax: Tensor, mode: str, backend: str) -> Tensor:
    """Pool rows as a previous call did: for "max", take the rows that won there (-1 in an empty segment)."""
    if mode != "max":
        pooled: Tensor = segment_pool(rows, cu_seqlens, mode, backend)[0]
        return pooled
    if rows.shape[0] == 0:
        return rows.new_zeros(argmax.shape)
    won = rows.gather(0, argmax.long().clamp(min=0))
    return torch.where(argmax < 0, torch.zeros_like(won), won)


def _pool_bwd_fake(grad_out: Tensor, cu_seqlens: Tensor, argmax: Tensor, rows: int, mode: str) -> Tensor:
    return grad_out.new_empty(rows, grad_out.shape[1])


def _pool_bwd_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple(inputs[1:])


def _pool_bwd_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    cu_seqlens, argmax, _, mode = ctx.saved
    return {"grad_out": _pool_like(grad, cu_seqlens, argmax, mode, ctx.backend)}


def _pool_bwd_jvp(ctx: Context, grad_out: Tensor, *_: None) -> Tensor:
    return segment_pool_bwd(grad_out, *ctx.saved, ctx.backend)


segment_pool_bwd = Op(
    "packing_segment_pool_bwd",
    fake=_pool_bwd_fake,
    impls={
        "native": native.segment_pool_bwd,
        "triton": on_triton("mmkernels.ops.packing.triton_bwd", "segment_pool_bwd"),
        "reference": reference.segment_pool_bwd,
    },
    save=_pool_bwd_save,
    backward=_pool_bwd_backward,
    jvp=_pool_bwd_jvp,
)


def _pool_fake(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    return x.new_empty(segments, width), x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)


def _pool_check(x: Tensor, cu_seqlens: Tensor, mode: str) -> None:
    check_cu_seqlens(cu_seqlens, x.shape[0])


def _pool_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.cu_seqlens, outputs[1], inputs.x.shape[0], inputs.mode


def _pool_backward(ctx: Context, grad_out: Tensor) -> dict[str, Tensor]:
    return {"x": segment_pool_bwd(grad_out, *ctx.saved, ctx.backend)}


def _pool_jvp(ctx: Context, x: Tensor, *_: None) -> Tensor:
    cu_seqlens, argmax, _, mode = ctx.saved
    return _pool_like(x, cu_seqlens, argmax, mode, ctx.backend)


segment_pool = Op(
    "packing_segment_pool_fwd",
    fake=_pool_fake,
    impls={
        "native": native.segment_pool,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "segment_pool"),
        "reference": reference.segment_pool,
    },
    check=_pool_check,
    save=_pool_save,
    backward=_pool_backward,
    jvp=_pool_jvp,
    constant_outputs=1,
)


def _saved_inputs(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(inputs)


def _or_zeros(moved: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if moved is None else moved


def _weighted_bwd_fake(grad_out: Tensor, x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(x.shape[0])


def _weighted_bwd_backward(ctx: Context, of_rows: Tensor | None, of_weights: Tensor | None) -> dict[str, Tensor]:
    grad_out, x, weights, cu_seqlens = ctx.saved
    rest = cu_seqlens, ctx.backend
    of_rows, of_weights = _or_zeros(of_rows, x), _or_zeros(of_weights, weights)
    grad = weighted_pool(of_rows, weights, *rest) + weighted_pool(x, of_weights, *rest)
    grad_x, grad_weights = weighted_pool_bwd(grad_out, of_rows, of_weights, *rest)
    return {"grad_out": grad, "x": grad_x, "weights": grad_weights}


def _weighted_bwd_jvp(ctx: Context, of_grad: Any, of_rows: Any, of_weights: Any, _: None) -> tuple[Tensor, ...]:
    grad_out, x, weights, cu_seqlens = ctx.saved
    rest = cu_seqlens, ctx.backend
    moved = weighted_pool_bwd(grad_out, _or_zeros(of_rows, x), _or_zeros(of_weights, weights), *rest)
    linear = weighted_pool_bwd(_or_zeros(of_grad, grad_out), x, weights, *rest)
    return linear[0] + moved[0], linear[1] + moved[1]


weighted_pool_bwd = Op(
    "packing_weighted_pool_bwd",
    fake=_weighted_bwd_fake,
    impls={
        "native": native.weighted_pool_bwd,
        "triton": on_triton("mmkernels.ops.packing.triton_bwd", "weighted_pool_bwd"),
        "reference": reference.weighted_pool_bwd,
    },
    save=_saved_inputs,
    backward=_weighted_bwd_backward,
    jvp=_weighted_bwd_jvp,
)


def _weighted_fake(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    return x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])


def _weighted_check(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> None:
    check_cu_seqlens(cu_seqlens, x.shape[0])


def _weighted_backward(ctx: Context, grad_out: Tensor) -> dict[str, Tensor]:
    grad_x, grad_weights = weighted_pool_bwd(grad_out, *ctx.saved, ctx.backend)
    return {"x": grad_x, "weights": grad_weights}


def _weighted_jvp(ctx: Context, of_rows: Any, of_weights: Any, _: None) -> Tensor:
    x, weights, cu_seqlens = ctx.saved
    rest = cu_seqlens, ctx.backend
    by_rows: Tensor = weighted_pool(_or_zeros(of_rows, x), weights, *rest)
    return by_rows + weighted_pool(x, _or_zeros(of_weights, weights), *rest)


weighted_pool = Op(
    "packing_weighted_pool_fwd",
    fake=_weighted_fake,
    impls={
        "native": native.weighted_pool,
        "triton": on_triton("mmkernels.ops.packing.triton_fwd", "weighted_pool"),
        "reference": reference.weighted_pool,
    },
    check=_weighted_check,
    save=_saved_inputs,
    backward=_weighted_backward,
    jvp=_weighted_jvp,
)
