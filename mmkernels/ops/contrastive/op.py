"""The statistics ops that every loss is built from: schema, fake, saved tensors, backward.

    targets_fwd         the similarities of rows and their targets, a guide's thresholds
    softmax_fwd/_bwd    statistics of rows and columns of the logits, and the gradient of any function of them: every
                        InfoNCE variant, including one rank's part of a distributed one
    sigmoid_fwd/_bwd    the sum of all pairs' sigmoid losses

Single-op plain losses are in op_plain.py, retrieval in op_search.py, second derivatives in op_second.py.

Forwards also return the derivatives by the scalars, which are free given the statistics; a backward op multiplies them
by the incoming gradient. It computes feature gradients by recomputing the logits. The lse of rows and columns is saved
in float64: rounding it to float32 would put half an ulp of it into every softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import chunks, native
from mmkernels.ops.contrastive.hardness import harder_gradients, harder_statistics
from mmkernels.ops.contrastive.op_second import sigmoid_second, softmax_second
from mmkernels.ops.contrastive.types import (
    COEFFICIENTS,
    LSE,
    MEAN,
    STATISTICS,
    TOTAL,
    Guide,
    Means,
    Need,
    Pairs,
    Teacher,
)
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.register import Context, Op, on_triton

__all__ = [
    "backward_flops",
    "empty_gradients",
    "expect_no_ignored",
    "forward_flops",
    "need_of",
    "of_targets",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "with_scalars",
]


# Shared by all backward ops


def need_of(ctx: Context) -> Need:
    """Which features require a gradient."""
    return Need("queries" in ctx.needs, "keys" in ctx.needs)


def empty_gradients(queries: Tensor, keys: Tensor, need: Need) -> tuple[Tensor, Tensor]:
    """Empty dqueries and dkeys; [0, E] if not needed."""
    rows = queries.shape[0] if need.need_queries else 0, keys.shape[0] if need.need_keys else 0
    return queries.new_empty(rows[0], queries.shape[1]), keys.new_empty(rows[1], keys.shape[1])


def with_scalars(
    impls: Mapping[str, Callable[..., tuple[Tensor, Tensor]]],
    fake: Callable[..., tuple[Tensor, ...]],
    scalars: Callable[..., tuple[Tensor, ...]],
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """Implementations of a backward op whose last arguments are the derivatives by the scalars, and the need.

    Args:
        impls: the backends' functions for dqueries and dkeys; they take all arguments except those derivatives.
        fake: the op's fake, which provides the outputs if neither is needed; then no backend runs.
        scalars: computes the scalars' gradients from those derivatives and the preceding arguments.
    """

    def whole(features: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
        def gradients(*args: Any) -> tuple[Tensor, ...]:
            *given, derivatives, need = args
            dqueries, dkeys = features(*given, need) if any(need) else fake(*args)[:2]
            return dqueries, dkeys, *scalars(derivatives, *given)

        return gradients

    return {backend: whole(features) for backend, features in impls.items()}


def expect_no_ignored(*args: Any) -> None:
    """Check of an op that sees all pairs: it takes Pairs but rejects same_id="ignore"."""
    (pairs,) = (arg for arg in args if isinstance(arg, Pairs))
    if pairs.same_id != "positive":
        raise ValueError(f"same_id: expected 'positive', got {pairs.same_id!r}")


def forward_flops(queries: Tensor, keys: Tensor, *_: Any) -> int:
    """One product of all pairs."""
    return 2 * queries.shape[0] * keys.shape[0] * queries.shape[1]


def backward_flops(queries: Tensor, keys: Tensor, need: Need) -> int:
    """The logits again, plus one product per feature gradient needed."""
    return (1 + sum(need)) * forward_flops(queries, keys) if any(need) else 0


def _second_product_flops(teacher: Teacher | None, guide: Guide | None) -> int:
    return sum(forward_flops(of[0], of[1]) for of in (teacher, guide) if of is not None)


def _expect_rows_alone(*args: Any) -> None:
    """Check of the softmax ops: a guide filters rows, by its own product."""
    if any(isinstance(arg, Teacher) for arg in args) and any(isinstance(arg, float) and arg for arg in args):
        raise ValueError("hardness: expected 0 with a teacher, whose logits have none")
    if not any(isinstance(arg, Guide) for arg in args):
        return
    if any(isinstance(arg, Teacher) for arg in args):
        raise ValueError("teacher_queries: expected None with a guide, got a teacher")
    (pairs,) = (arg for arg in args if isinstance(arg, Pairs))
    if pairs.query_ids is not None and pairs.same_id == "positive":
        raise ValueError("same_id: expected 'ignore' with a guide and ids, got 'positive'")


def _expect_no_columns_with_a_guide(*args: Any) -> None:
    _expect_rows_alone(*args)
    columns = args[-1]
    if columns and any(isinstance(arg, Guide) for arg in args):
        raise ValueError("columns: expected False with a guide, got True")


# The similarity [N] of each row and its target, in the statistics' dtype, with the arithmetic of the tiles


def _targets_fake(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], dtype=compute_dtype(queries.dtype))


of_targets = Op(
    "contrastive_targets_fwd",
    fake=_targets_fake,
    impls={
        "native": native.of_targets,
        "triton": on_triton("mmkernels.ops.contrastive.triton_targets", "of_targets"),
        "reference": chunks.of_targets,
    },
    flops=lambda queries, keys, targets: 2 * queries.shape[0] * queries.shape[1],
)


# Softmax statistics [7, N] of rows and [7, M] of columns ([7, 0] if columns=False), float64; see types.py.


def _softmax_fwd_fake(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    hardness: float,
    totals: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    of_rows = queries.new_empty(STATISTICS, queries.shape[0], dtype=torch.float64)
    return of_rows, of_rows.new_empty(STATISTICS, keys.shape[0] if columns else 0)


def _softmax_bwd_fake(
    coefficients_q: Tensor,
    coefficients_k: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    hardness: float,
    means: Means | None,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor]:
    return *empty_gradients(queries, keys, need), logit_scale.new_empty(0 if means is None else ())


def _softmax_scale(
    means: Means | None, of_rows: Tensor, of_columns: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, *_: Any
) -> tuple[Tensor]:
    """The lse of an empty row is constant; its mean is 0."""
    if means is None:
        return (scale.new_empty(0),)
    return (((of_rows[LSE] * means.mean_q).sum() + (of_columns[LSE] * means.mean_k).sum()).to(scale.dtype),)


def _softmax_bwd_flops(of_rows: Tensor, of_columns: Tensor, queries: Tensor, keys: Tensor, *rest: Any) -> int:
    *_, teacher, guide, _hardness, _means, need = rest
    return backward_flops(queries, keys, need) + (_second_product_flops(teacher, guide) if any(need) else 0)


softmax_bwd = Op(
    "contrastive_softmax_bwd",
    fake=_softmax_bwd_fake,
    impls=with_scalars(
        harder_gradients(
            {
                "native": native.softmax_bwd,
                "triton": on_triton("mmkernels.ops.contrastive.triton_bwd", "softmax_bwd"),
                "reference": chunks.softmax_bwd,
            }
        ),
        _softmax_bwd_fake,
        _softmax_scale,
    ),
    check=_expect_rows_alone,
    second=softmax_second,
    flops=_softmax_bwd_flops,
)


def _softmax_backward(ctx: Context, grad_rows: Tensor | None, grad_columns: Tensor | None) -> dict[str, Tensor]:
    inputs, (of_rows, of_columns) = ctx.saved
    coefficients = (
        of.new_zeros(COEFFICIENTS, of.shape[1]) if grad is None else grad[:COEFFICIENTS]
        for grad, of in ((grad_rows, of_rows), (grad_columns, of_columns))
    )
    features = inputs.queries, inputs.keys, inputs.logit_scale
    means = Means(of_rows[MEAN], of_columns[MEAN]) if "logit_scale" in ctx.needs else None
    rules = inputs.pairs, inputs.teacher, inputs.guide, inputs.hardness, means, need_of(ctx)
    dqueries, dkeys, dscale = softmax_bwd(*coefficients, *features, of_rows[LSE], of_columns[LSE], *rules, ctx.backend)
    return {"queries": dqueries, "keys": dkeys, "logit_scale": dscale}


def _softmax_jvp(
    ctx: Context, tangent_queries: Tensor | None, tangent_keys: Tensor | None, tangent_scale: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    inputs, (of_rows, of_columns) = ctx.saved
    features = inputs.queries, inputs.keys, inputs.logit_scale, of_rows[LSE], of_columns[LSE]
    means = Means(of_rows[MEAN], of_columns[MEAN])
    rules = inputs.pairs, inputs.teacher, inputs.guide, inputs.hardness, means, Need(True, True)
    tangents = tangent_queries, tangent_keys, tangent_scale
    moved_rows, moved_columns, *_ = softmax_bwd.second(*tangents, None, None, *features, *rules, ctx.backend)
    return _all_statistics(moved_rows, inputs.totals), _all_statistics(moved_columns, inputs.totals)


def _all_statistics(tangents: Tensor, totals: bool) -> Tensor:
    """Pad with zeros: the other statistics, and totals that were not requested, are constant."""
    *others, teacher = tangents.split(1)
    zero = torch.zeros_like(teacher)
    others[TOTAL] = others[TOTAL] if totals else zero
    return torch.cat([*others, teacher, *[zero] * (STATISTICS - COEFFICIENTS)])


def _softmax_fwd_flops(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    *_: Any,
) -> int:
    return forward_flops(queries, keys) + _second_product_flops(teacher, guide)


softmax_fwd = Op(
    "contrastive_softmax_fwd",
    fake=_softmax_fwd_fake,
    impls=harder_statistics(
        {
            "native": native.softmax_fwd,
            "triton": on_triton("mmkernels.ops.contrastive.triton_fwd", "softmax_fwd"),
            "reference": chunks.softmax_fwd,
        }
    ),
    check=_expect_no_columns_with_a_guide,
    save=lambda inputs, outputs: (inputs, outputs),
    backward=_softmax_backward,
    jvp=_softmax_jvp,
    flops=_softmax_fwd_flops,
)


# Sigmoid: [3] float64, the sum of all pairs' losses (differentiable) and its derivatives by scale and bias.


def _sigmoid_fwd_fake(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs) -> Tensor:
    return queries.new_empty(3, dtype=torch.float64)


def _sigmoid_bwd_fake(
    grad_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    sums: Tensor | None,
    need: Need,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    size = 0 if sums is None else ()
    return *empty_gradients(queries, keys, need), logit_scale.new_empty(size), logit_bias.new_empty(size)


def _sigmoid_scalars(
    sums: Tensor | None, grad_sum: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    if sums is None:
        return scale.new_empty(0), bias.new_empty(0)
    return (grad_sum * sums[1]).to(scale.dtype), (grad_sum * sums[2]).to(bias.dtype)


sigmoid_bwd = Op(
    "contrastive_sigmoid_bwd",
    fake=_sigmoid_bwd_fake,
    impls=with_scalars(
        {
            "native": native.sigmoid_bwd,
            "triton": on_triton("mmkernels.ops.contrastive.triton_sigmoid", "sigmoid_bwd"),
            "reference": chunks.sigmoid_bwd,
        },
        _sigmoid_bwd_fake,
        _sigmoid_scalars,
    ),
    check=expect_no_ignored,
    second=sigmoid_second,
    flops=lambda grad_sum, queries, keys, *rest: backward_flops(queries, keys, need=rest[-1]),
)


def _sigmoid_backward(ctx: Context, grad_sums: Tensor) -> dict[str, Tensor]:
    dqueries, dkeys, dscale, dbias = sigmoid_bwd(grad_sums[0], *ctx.saved, need_of(ctx), ctx.backend)
    return {"queries": dqueries, "keys": dkeys, "logit_scale": dscale, "logit_bias": dbias}


def _sigmoid_jvp(ctx: Context, *tangents: Any) -> Tensor:
    *of_inputs, _pairs = tangents
    moved, *_ = sigmoid_bwd.second(*of_inputs, None, *ctx.saved, Need(True, True), ctx.backend)
    return torch.stack([moved, torch.zeros_like(moved), torch.zeros_like(moved)])


sigmoid_fwd = Op(
    "contrastive_sigmoid_fwd",
    fake=_sigmoid_fwd_fake,
    impls={
        "native": native.sigmoid_fwd,
        "triton": on_triton("mmkernels.ops.contrastive.triton_sigmoid", "sigmoid_fwd"),
        "reference": chunks.sigmoid_fwd,
    },
    check=expect_no_ignored,
    save=lambda inputs, outputs: (*inputs, *outputs),
    backward=_sigmoid_backward,
    jvp=_sigmoid_jvp,
    flops=forward_flops,
)
