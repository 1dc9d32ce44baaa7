"""The reference a few rows at a time, for calls no kernel supports (float64 on a GPU), in O(N + M) memory.

Row statistics are concatenated, column statistics merged. Chunks depend only on sizes, so results are reproducible.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import reference
from mmkernels.ops.contrastive.types import STATISTICS, Guide, Need, Pairs, Teacher, merged
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["of_targets", "sigmoid_bwd", "sigmoid_fwd", "softmax_bwd", "softmax_fwd"]

LOGITS = 2**24  # per chunk: 64 MiB of float32


def _chunks(queries: Tensor, keys: Tensor) -> Iterator[slice]:
    """Chunks of the rows, at least one."""
    n, rows = queries.shape[0], max(1, LOGITS // max(keys.shape[0], 1))
    for start in range(0, max(n, 1), rows):
        yield slice(start, start + rows)


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def _pairs_of(pairs: Pairs, rows: slice) -> Pairs:
    return pairs._replace(targets=_part(pairs.targets, rows), query_ids=_part(pairs.query_ids, rows))


def _teacher_of(teacher: Teacher | None, rows: slice) -> Teacher | None:
    if teacher is None:
        return None
    return teacher._replace(teacher_queries=teacher.teacher_queries[rows], teacher_lse_q=teacher.teacher_lse_q[rows])


def _guide_of(guide: Guide | None, rows: slice) -> Guide | None:
    if guide is None:
        return None
    return guide._replace(guide_queries=guide.guide_queries[rows], thresholds=guide.thresholds[rows])


def softmax_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    totals: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of rows [7, N] and columns [7, M] (or [7, 0]) in float64."""
    of_rows = queries.new_empty(STATISTICS, queries.shape[0], dtype=torch.float64)
    of_columns = None
    for rows in _chunks(queries, keys):
        rules = _pairs_of(pairs, rows), _teacher_of(teacher, rows), _guide_of(guide, rows)
        of_rows[:, rows], part = reference.softmax_fwd(queries[rows], keys, logit_scale, *rules, totals, columns)
        of_columns = part if of_columns is None else merged(of_columns, part)
    assert of_columns is not None
    return of_rows, of_columns


def _gradients(queries: Tensor, keys: Tensor, need: Need, chunk: Any) -> tuple[Tensor, Tensor]:
    """dqueries chunk by chunk; dkeys summed over the chunks in the statistics' dtype."""
    dqueries = queries.new_empty(queries.shape[0] if need.need_queries else 0, queries.shape[1])
    dkeys = keys.new_zeros(keys.shape[0] if need.need_keys else 0, keys.shape[1], dtype=compute_dtype(keys.dtype))
    for rows in _chunks(queries, keys):
        of_rows, of_keys = chunk(rows)
        if need.need_queries:
            dqueries[rows] = of_rows
        dkeys += of_keys
    return dqueries, dkeys.to(keys.dtype)


def softmax_bwd(
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
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""

    def chunk(rows: slice) -> tuple[Tensor, Tensor]:
        weights, lse = (coefficients_q[:, rows], coefficients_k), (lse_q[rows], lse_k)
        features = queries[rows], keys, logit_scale
        soft = _teacher_of(teacher, rows), _guide_of(guide, rows)
        return reference.softmax_bwd(*weights, *features, *lse, _pairs_of(pairs, rows), *soft, need)

    return _gradients(queries, keys, need, chunk)


def of_targets(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """[N]: the similarity of each query and its target."""
    parts = [reference.of_targets(queries[rows], keys, targets[rows]) for rows in _chunks(queries, keys)]
    return torch.cat(parts)


def sigmoid_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[3] float64: the sum of the losses of all pairs, and its derivatives by scale and bias."""
    sums = queries.new_zeros(3, dtype=torch.float64)
    for rows in _chunks(queries, keys):
        sums += reference.sigmoid_fwd(queries[rows], keys, logit_scale, logit_bias, _pairs_of(pairs, rows))
    return sums


def sigmoid_bwd(
    grad_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""

    def chunk(rows: slice) -> tuple[Tensor, Tensor]:
        features = queries[rows], keys, logit_scale, logit_bias
        return reference.sigmoid_bwd(grad_sum, *features, _pairs_of(pairs, rows), need)

    return _gradients(queries, keys, need, chunk)
