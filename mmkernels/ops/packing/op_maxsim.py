"""The ops of late interaction: signatures, shapes, derivatives. winners.py computes them.

mmkernels::packing_maxsim_fwd           each document's largest product with each query token, and the row that has it
mmkernels::packing_winners_dot_fwd      products of query tokens with those rows
mmkernels::packing_winners_gather_fwd   weighted sums of those rows for each query token
mmkernels::packing_winners_scatter_fwd  the same for each row, over query tokens

Given the winners, the last three are the derivatives of one trilinear form, and so of each other, to any order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype
from mmkernels.ops.packing import native, reference, winners
from mmkernels.ops.packing.checks import check_cu_seqlens
from mmkernels.runtime.backends import BACKENDS
from mmkernels.runtime.register import Context, Op, on_triton

__all__ = ["maxsim", "winners_dot", "winners_gather", "winners_scatter"]


_POOLS = {
    "native": native.segment_pool,
    "triton": on_triton("mmkernels.ops.packing.triton_fwd", "segment_pool"),
    "reference": reference.segment_pool,
}


def _with_pool_of_each(build: Callable[..., Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    return {backend: build(pool) for backend, pool in _POOLS.items()}


def _saved_inputs(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return tuple(inputs)


def _added(*parts: Tensor | None) -> Tensor:
    """The sum of the parts that there are, at least one."""
    first, *rest = [part for part in parts if part is not None]
    for part in rest:
        first = first + part
    return first


def _dot_fake(queries: Tensor, documents: Tensor, winners: Tensor) -> Tensor:
    return queries.new_empty(winners.shape, dtype=compute_dtype(queries.dtype))


def _dot_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    queries, documents, at = ctx.saved
    grads = {}
    if "queries" in ctx.needs:
        grads["queries"] = winners_gather(grad, documents, at, ctx.backend)
    if "documents" in ctx.needs:
        grads["documents"] = winners_scatter(grad, queries, at, documents.shape[0], ctx.backend)
    return grads


def _dot_jvp(ctx: Context, of_queries: Any, of_documents: Any, *_: None) -> Tensor:
    queries, documents, at = ctx.saved
    return _added(
        None if of_queries is None else winners_dot(of_queries, documents, at, ctx.backend),
        None if of_documents is None else winners_dot(queries, of_documents, at, ctx.backend),
    )


def _dot_flops(queries: Tensor, documents: Tensor, winners: Tensor) -> int:
    return 2 * winners.numel() * queries.shape[1]


winners_dot = Op(
    "packing_winners_dot_fwd",
    fake=_dot_fake,
    impls=dict.fromkeys(BACKENDS, winners.dot),
    save=_saved_inputs,
    backward=_dot_backward,
    jvp=_dot_jvp,
    flops=_dot_flops,
)


def _gather_fake(weights: Tensor, documents: Tensor, winners: Tensor) -> Tensor:
    return documents.new_empty(winners.shape[0], documents.shape[1])


def _gather_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    weights, documents, at = ctx.saved
    grads = {}
    if "weights" in ctx.needs:
        grads["weights"] = winners_dot(grad, documents, at, ctx.backend)
    if "documents" in ctx.needs:
        grads["documents"] = winners_scatter(weights, grad, at, documents.shape[0], ctx.backend)
    return grads


def _gather_jvp(ctx: Context, of_weights: Any, of_documents: Any, *_: None) -> Tensor:
    weights, documents, at = ctx.saved
    return _added(
        None if of_weights is None else winners_gather(of_weights, documents, at, ctx.backend),
        None if of_documents is None else winners_gather(weights, of_documents, at, ctx.backend),
    )


def _gather_flops(weights: Tensor, documents: Tensor, winners: Tensor) -> int:
    return 2 * winners.numel() * documents.shape[1]


winners_gather = Op(
    "packing_winners_gather_fwd",
    fake=_gather_fake,
    impls=_with_pool_of_each(winners.gather_by),
    save=_saved_inputs,
    backward=_gather_backward,
    jvp=_gather_jvp,
    flops=_gather_flops,
)


def _scatter_fake(weights: Tensor, queries: Tensor, winners: Tensor, rows: int) -> Tensor:
    return queries.new_empty(rows, queries.shape[1])


def _scatter_backward(ctx: Context, grad: Tensor) -> dict[str, Tensor]:
    weights, queries, at, _ = ctx.saved
    grads = {}
    if "weights" in ctx.needs:
        grads["weights"] = winners_dot(queries, grad, at, ctx.backend)
    if "queries" in ctx.needs:
        grads["queries"] = winners_gather(weights, grad, at, ctx.backend)
    return grads


def _scatter_jvp(ctx: Context, of_weights: Any, of_queries: Any, *_: None) -> Tensor:
    weights, queries, at, rows = ctx.saved
    return _added(
        None if of_weights is None else winners_scatter(of_weights, queries, at, rows, ctx.backend),
        None if of_queries is None else winners_scatter(weights, of_queries, at, rows, ctx.backend),
    )


def _scatter_flops(weights: Tensor, queries: Tensor, winners: Tensor, rows: int) -> int:
    return 2 * winners.numel() * queries.shape[1]


winners_scatter = Op(
    "packing_winners_scatter_fwd",
    fake=_scatter_fake,
    impls=_with_pool_of_each(winners.scatter_by),
    save=_saved_inputs,
    backward=_scatter_backward,
    jvp=_scatter_jvp,
    flops=_scatter_flops,
)


def _maxsim_fake(queries: Tensor, documents: Tensor, cu_seqlens: Tensor, block: int) -> tuple[Tensor, Tensor]:
    shape = queries.shape[0], cu_seqlens.shape[0] - 1
    best = queries.new_empty(shape, dtype=compute_dtype(queries.dtype))
    return best, queries.new_empty(shape, dtype=torch.int32)


def _maxsim_check(queries: Tensor, documents: Tensor, cu_seqlens: Tensor, block: int) -> None:
    check_cu_seqlens(cu_seqlens, documents.shape[0], "cu_seqlens_k")


def _maxsim_save(inputs: Any, outputs: tuple[Tensor, ...]) -> tuple[Any, ...]:
    return inputs.queries, inputs.documents, outputs[1]


def _maxsim_flops(queries: Tensor, documents: Tensor, cu_seqlens: Tensor, block: int) -> int:
    return 2 * queries.shape[0] * documents.shape[0] * queries.shape[1]


maxsim = Op(
    "packing_maxsim_fwd",
    fake=_maxsim_fake,
    impls=_with_pool_of_each(winners.search_by),
    check=_maxsim_check,
    save=_maxsim_save,
    backward=_dot_backward,
    jvp=_dot_jvp,
    constant_outputs=1,
    flops=_maxsim_flops,
)
