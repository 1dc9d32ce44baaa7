"""Forward of the softmax losses: statistics of rows and columns in one pass.

A program iterates over row tiles of X (BLOCK_M queries) and, for each, over the tiles of its share of Y:

    S = X Yᵀ        [BLOCK_M, BLOCK_N] in registers, float32, over chunks of E; logits = scale · S

With ref the similarity of the largest logit of a row, or of a column, and d = S - ref (both times the sign of the
scale, so that ref is a maximum):

    sum = Σ e^(|scale| d)       dot = Σ e^(|scale| d) d        lse = |scale| ref + log sum,  mean of S = ref + dot / sum

The difference is taken before the multiplication by scale: near the largest logit it is exact, and the mean does not
cancel. Row statistics stay in registers until the row tile is done; column statistics are merged into the program's own
slice of a [groups, FIELDS, M] buffer. Programs share no slice, so there are no atomics and results are reproducible.

`triton_merge.py` merges the slices in float64 and adds each row's target, which the tiles leave out of these sums: when
the target has nearly all of the mass, the rest determines the loss.

EXTRAS adds sums to the same kernel: 1, totals and ids; 2, also a second product S' = X' Y'ᵀ, the teacher's; 3, instead
the guide's, which leaves out pairs above a row's threshold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.reference import own_pairs
from mmkernels.ops.contrastive.triton_merge import FIELDS, Joins, joins_of_columns, joins_of_rows, merge
from mmkernels.ops.contrastive.triton_tile import (
    GUIDE,
    LOWEST,
    NUM_STAGES,
    NUM_WARPS,
    KernelPairs,
    KernelTeacher,
    depth_block,
    extras_of,
    grid_of,
    kernel_guide,
    kernel_pairs,
    kernel_teacher,
    rows_of,
    similarity,
    similarity_of_pairs,
    split_softmax,
    tile_of,
)
from mmkernels.ops.contrastive.types import (
    LSE,
    MEAN,
    POSITIVE,
    STATISTICS,
    TOTAL,
    Guide,
    Pairs,
    Teacher,
    nothing_seen,
)
from mmkernels.ops.triton_common import generation

__all__ = ["infonce_fwd", "softmax_fwd", "softmax_tile"]


def softmax_tile(dtype: torch.dtype, major: int, extras: int) -> dict[str, int]:
    """Tile including BLOCK_E. Extra sums, the teacher's tile and float32's three tf32 products need registers.

    BLOCK_E equals the backward's: with another summation order, a similarity and the lse that it dominates would differ
    by the rounding error times the scale.
    """
    if extras == 0:
        tile = tile_of(major)
    elif dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 32} if extras == 1 else {"BLOCK_M": 32, "BLOCK_N": 64}
    else:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64 if extras == 1 else 32}
    return {**tile, "BLOCK_E": depth_block(dtype)}


@triton.jit
def _add_tile(ref, total, dot, b_t, size, AXIS: tl.constexpr):
    """Merge a tile's ref, sum and dot along AXIS into the running ones; excluded entries of the tile are LOWEST."""
    highest = tl.maximum(ref, tl.max(b_t, AXIS))
    base = tl.where(highest > LOWEST, highest, 0.0)
    below = tl.where(ref > LOWEST, ref - base, 0.0)
    before = tl.exp(below * size)
    b_d = b_t - tl.expand_dims(base, AXIS)  # [BLOCK_M, BLOCK_N]
    b_p = tl.exp(b_d * size)
    return highest, total * before + tl.sum(b_p, AXIS), (dot + total * below) * before + tl.sum(b_p * b_d, AXIS)


@triton.jit(do_not_specialize=["columns", "has_ids", "by_id", "ignore"])
def _softmax_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, target_ptr,  # [N, E], [M, E], [], [N]
    row_id_ptr, column_id_ptr,  # [N], [M]
    teacher_x_ptr, teacher_y_ptr,  # [N, F], [M, F]: of the teacher or the guide
    teacher_row_ptr, teacher_column_ptr,  # [2, N], [2, M]; the guide's thresholds [N], and None
    teacher_pair_ptr, pair_ptr,  # [N], [N]: similarities of each row and its target, teacher's and own
    row_ptr, column_ptr,  # [splits, FIELDS, N], [groups, FIELDS, M]
    n, m, e, stride_x, stride_y, f, stride_teacher_x, stride_teacher_y, split_size, columns, has_ids, by_id, ignore,
    EXTRAS: tl.constexpr, FIELDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr)
    sign = tl.where(scale < 0, -1.0, 1.0)
    # Not 0, so that excluded entries get no weight.
    size = tl.maximum(tl.abs(scale), 1e-30)
    size = tl.where(scale == scale, size, scale)
    row_ptr += part.to(tl.int64) * FIELDS * n
    column_ptr += group.to(tl.int64) * FIELDS * m
    for tile in range(group, tl.cdiv(n, BLOCK_M), tl.num_programs(0)):
        # Writes of this program's other threads to its column slice must be visible.
        tl.debug_barrier()
        o_i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_i = o_i < n
        target = tl.load(target_ptr + o_i, mask=m_i, other=-1).to(tl.int32)  # [BLOCK_M]
        row_ref = tl.full((BLOCK_M,), LOWEST, tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        row_dot = tl.zeros((BLOCK_M,), tl.float32)
        if EXTRAS > 0:
            row_id = tl.load(row_id_ptr + o_i, mask=m_i & (has_ids != 0), other=0)
            row_total = tl.zeros((BLOCK_M,), tl.float32)
            row_positive = tl.zeros((BLOCK_M,), tl.float32)
            row_best = tl.full((BLOCK_M,), LOWEST, tl.float32)
        if EXTRAS == 2:
            row_teacher = tl.zeros((BLOCK_M,), tl.float32)
            teacher_ref = tl.load(teacher_row_ptr + o_i, mask=m_i, other=0.0)
            teacher_rest = tl.load(teacher_row_ptr + n + o_i, mask=m_i, other=float("inf"))
            teacher_pair = tl.load(teacher_pair_ptr + o_i, mask=m_i, other=0.0)
            pair = sign * tl.load(pair_ptr + o_i, mask=m_i, other=0.0)
        if EXTRAS == 3:
            threshold = tl.load(teacher_row_ptr + o_i, mask=m_i, other=0.0)
        for j0 in range(part * split_size, tl.minimum((part + 1) * split_size, m), BLOCK_N):
            o_j = j0 + tl.arange(0, BLOCK_N)
            m_j = o_j < m
            b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
            b_s *= sign
            m_target = o_j[None, :] == target[:, None]  # [BLOCK_M, BLOCK_N]
            if EXTRAS == 2:
                b_s = tl.where(m_target, pair[:, None], b_s)
            m_counted = m_i[:, None] & m_j[None, :] & ~m_target
            if EXTRAS > 0:
                column_id = tl.load(column_id_ptr + o_j, mask=m_j & (has_ids != 0), other=0)
                m_same = row_id[:, None] == column_id[None, :]
                m_ignored = m_same & (ignore != 0)
                if EXTRAS == 3:
                    b_guide = similarity(
                        teacher_x_ptr, teacher_y_ptr, o_i, o_j, m_i, m_j, f, stride_teacher_x, stride_teacher_y,
                        BLOCK_M, BLOCK_N, BLOCK_E,
                    )  # fmt: skip
                    m_ignored = m_ignored | (b_guide > threshold[:, None])
                m_seen = m_i[:, None] & m_j[None, :] & (m_target | ~m_ignored)
                m_positive = m_i[:, None] & m_j[None, :] & m_same & (by_id != 0)
                m_counted = m_counted & ~m_ignored
            b_t = tl.where(m_counted, b_s, LOWEST)
            row_ref, row_sum, row_dot = _add_tile(row_ref, row_sum, row_dot, b_t, size, 1)
            if EXTRAS > 0:
                row_total += tl.sum(tl.where(m_seen, b_s, 0.0), 1)
                row_positive += tl.sum(tl.where(m_positive, b_s, 0.0), 1)
                row_best = tl.maximum(row_best, tl.max(tl.where(m_positive, b_s, LOWEST), 1))
            if EXTRAS == 2:
                b_teacher = similarity(
                    teacher_x_ptr, teacher_y_ptr, o_i, o_j, m_i, m_j, f, stride_teacher_x, stride_teacher_y,
                    BLOCK_M, BLOCK_N, BLOCK_E,
                )  # fmt: skip
                b_teacher = tl.where(m_target, teacher_pair[:, None], b_teacher)
                b_p = split_softmax(b_teacher, teacher_ref, teacher_rest, scale, 1)
                row_teacher += tl.sum(tl.where(m_seen, b_p * b_s, 0.0), 1)
            if columns != 0:
                m_old = m_j & (tile != group)
                old_ref = tl.load(column_ptr + o_j, mask=m_old, other=LOWEST)  # [BLOCK_N]
                old_sum = tl.load(column_ptr + m + o_j, mask=m_old, other=0.0)
                old_dot = tl.load(column_ptr + 2 * m + o_j, mask=m_old, other=0.0)
                new_ref, new_sum, new_dot = _add_tile(old_ref, old_sum, old_dot, b_t, size, 0)
                tl.store(column_ptr + o_j, new_ref, mask=m_j)
                tl.store(column_ptr + m + o_j, new_sum, mask=m_j)
                tl.store(column_ptr + 2 * m + o_j, new_dot, mask=m_j)
                if EXTRAS > 0:
                    more = column_ptr + 3 * m + o_j
                    old = tl.load(more, mask=m_old, other=0.0)
                    tl.store(more, old + tl.sum(tl.where(m_seen, b_s, 0.0), 0), mask=m_j)
                    old = tl.load(more + m, mask=m_old, other=0.0)
                    tl.store(more + m, old + tl.sum(tl.where(m_positive, b_s, 0.0), 0), mask=m_j)
                    old = tl.load(more + 2 * m, mask=m_old, other=LOWEST)
                    best = tl.max(tl.where(m_positive, b_s, LOWEST), 0)
                    tl.store(more + 2 * m, tl.maximum(old, best), mask=m_j)
                if EXTRAS == 2:
                    ref = tl.load(teacher_column_ptr + o_j, mask=m_j, other=0.0)
                    rest = tl.load(teacher_column_ptr + m + o_j, mask=m_j, other=float("inf"))
                    b_p = split_softmax(b_teacher, ref, rest, scale, 0)
                    old = tl.load(more + 3 * m, mask=m_old, other=0.0)
                    tl.store(more + 3 * m, old + tl.sum(tl.where(m_seen, b_p * b_s, 0.0), 0), mask=m_j)
        tl.store(row_ptr + o_i, row_ref, mask=m_i)
        tl.store(row_ptr + n + o_i, row_sum, mask=m_i)
        tl.store(row_ptr + 2 * n + o_i, row_dot, mask=m_i)
        if EXTRAS > 0:
            tl.store(row_ptr + 3 * n + o_i, row_total, mask=m_i)
            tl.store(row_ptr + 4 * n + o_i, row_positive, mask=m_i)
            tl.store(row_ptr + 5 * n + o_i, row_best, mask=m_i)
        if EXTRAS == 2:
            tl.store(row_ptr + 6 * n + o_i, row_teacher, mask=m_i)


def _statistics(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pairs: KernelPairs,
    teacher: KernelTeacher | None,
    extras: int,
    columns: Joins | None,
) -> tuple[Tensor, Tensor | None]:
    """Statistics of rows [7, N], and of columns [7, M] if their joins are given."""
    (n, e), m = x.shape, y.shape[0]
    pair = similarity_of_pairs(x, y, pairs.target)
    tile = softmax_tile(x.dtype, generation(x.device), extras)
    groups, splits, split_size = grid_of(n, m, tile, x.device)
    of_rows = x.new_empty(splits, FIELDS[extras], n, dtype=torch.float32)
    of_columns = x.new_empty(groups if columns else 0, FIELDS[extras], m, dtype=torch.float32)
    pointers, sizes = extras_of(pairs, teacher, extras)
    has_ids = pairs.by_id or pairs.ignore
    _softmax_fwd_kernel[(groups, splits)](
        x, y, scale, pairs.target, *pointers, pair if extras == 2 else None, of_rows, of_columns, n, m, e,
        x.stride(0), y.stride(0), *sizes, split_size, int(columns is not None), int(has_ids), int(pairs.by_id),
        int(pairs.ignore), **tile, EXTRAS=extras, FIELDS=FIELDS[extras], num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    merged = merge(of_rows, scale, pair, joins_of_rows(pairs.target, m), extras)
    return merged, None if columns is None else merge(of_columns, scale, pair, columns, extras)


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
    x, y = rows_of(queries), rows_of(keys)
    n, m = x.shape[0], y.shape[0]
    if n == 0 or m == 0:
        return nothing_seen(x), nothing_seen(y if columns else y[:0])
    of_pairs = kernel_pairs(x, pairs)
    extras = int(totals or of_pairs.by_id or of_pairs.ignore)
    extras = 2 if teacher is not None else GUIDE if guide is not None else extras
    joins = joins_of_columns(of_pairs.target, m) if columns else None
    second = kernel_guide(guide) or kernel_teacher(teacher, logit_scale, of_pairs.target)
    of_rows, of_columns = _statistics(x, y, logit_scale, of_pairs, second, extras, joins)
    if not totals:
        for of in (of_rows, of_columns):
            if of is not None:
                of[TOTAL] = 0
    return of_rows, of_rows.new_empty(STATISTICS, 0) if of_columns is None else of_columns


def infonce_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], lse_q [N] and lse_k [N] in float64, d loss / d logit_scale []."""
    x, y = rows_of(queries), rows_of(keys)
    n = x.shape[0]
    if n == 0:
        zero, lse = x.new_zeros((), dtype=torch.float32), x.new_empty(0, dtype=torch.float64)
        return zero, lse, lse.clone(), zero.clone()
    pairs = kernel_pairs(x, own_pairs(x))
    own = Joins(pairs.target, pairs.target, pairs.target + 1)
    of_rows, of_columns = _statistics(x, y, logit_scale, pairs, None, 0, own)
    assert of_columns is not None
    total = (of_rows + of_columns).sum(1) / (2 * n)
    loss, slope = total[LSE] - logit_scale * total[POSITIVE], total[MEAN] - total[POSITIVE]
    return loss.float(), of_rows[LSE].clone(), of_columns[LSE].clone(), slope.float()
