"""Backward of the softmax losses: the gradient of any function of their statistics.

Given coefficients u, v, ... of rows and columns, `triton_gradients.py` runs on tiles of

    G_ij = scale (u_i p_ij + v_j q_ij) + positive (..) + seen (..) + teacher (..)

with p and q the softmax over rows and columns. A separate kernel computes each target's entry in float64, because there
the gradient is 1 - p with p close to 1. EXTRAS as in the forward; 0 is the plain loss, whose G is p + q - 2 [j =
target].

With the forward: four products for InfoNCE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.reference import own_pairs
from mmkernels.ops.contrastive.triton_gradients import HIGHEST_G, feature_gradients, gradient_tile
from mmkernels.ops.contrastive.triton_tile import (
    GUIDE,
    NUM_STAGES,
    NUM_WARPS,
    KernelPairs,
    KernelTeacher,
    depth_block,
    extras_of,
    kernel_guide,
    kernel_pairs,
    kernel_teacher,
    lines_of,
    rows_of,
    similarity,
    similarity_of_pairs,
    split_softmax,
)
from mmkernels.ops.contrastive.types import COEFFICIENTS, LSE, Guide, Need, Pairs, Teacher
from mmkernels.ops.triton_common import cast, generation

__all__ = ["infonce_bwd", "softmax_bwd", "softmax_gradient_tile"]

TARGETS_BLOCK = 128


def softmax_gradient_tile(dtype: torch.dtype, major: int, extras: int) -> dict[str, int]:
    """Tile of G; additional terms of G need registers."""
    full = dtype == torch.float32
    if extras > 1:
        return {"BLOCK_M": 32 if full else 64, "BLOCK_N": 64}
    if extras > 0:
        return {"BLOCK_M": 64 if full else 128, "BLOCK_N": 64}
    return gradient_tile(dtype, major)


@triton.jit(do_not_specialize=["columns"])
def _at_target_kernel(
    pair_ptr, target_ptr, lse_q_ptr, lse_k_ptr,  # [N] similarities, [N], [N], [M]
    coefficient_q_ptr, coefficient_k_ptr, scale_ptr, unit_ptr,  # [4, N], [4, M], [], []; coefficients None for EXTRAS 0
    out_ptr,  # [N]: G of each row and its target, without totals and teacher
    n, m, columns, unit,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n
    target = tl.load(target_ptr + o_i, mask=m_i, other=-1)
    m_j = m_i & (target >= 0) & (target < m) & (columns != 0)
    scale = tl.load(scale_ptr).to(tl.float64)
    logit = scale * tl.load(pair_ptr + o_i, mask=m_i, other=0.0).to(tl.float64)
    p = tl.exp(logit - tl.load(lse_q_ptr + o_i, mask=m_i, other=0.0))
    q = tl.exp(logit - tl.load(lse_k_ptr + target, mask=m_j, other=float("inf")))
    if coefficient_q_ptr is None:
        g = ((p - 1.0) + (q - 1.0)) * unit
    else:
        g = scale * tl.load(coefficient_q_ptr + o_i, mask=m_i, other=0.0) * p
        g += tl.load(coefficient_q_ptr + n + o_i, mask=m_i, other=0.0)
        g += scale * tl.load(coefficient_k_ptr + target, mask=m_j, other=0.0) * q
        g += tl.load(coefficient_k_ptr + m + target, mask=m_j, other=0.0)
        g *= tl.load(unit_ptr).to(tl.float64)
    tl.store(out_ptr + o_i, g.to(tl.float32), mask=m_i)


@triton.jit
def softmax_of(b_a, line_ptr, count, mask, scale, AXIS: tl.constexpr):
    """exp(scale · a - lse) of a tile whose rows (AXIS 1) or columns (AXIS 0) have the lse."""
    ref, rest = tl.load(line_ptr, mask=mask, other=0.0), tl.load(line_ptr + count, mask=mask, other=0.0)
    return split_softmax(b_a, ref, rest, scale, AXIS)


@triton.jit
def weighted_softmax(b_a, line_ptr, weight_ptr, count, mask, scale, AXIS: tl.constexpr):
    """The same times a weight per row or column."""
    weight = tl.load(weight_ptr, mask=mask, other=0.0)
    return softmax_of(b_a, line_ptr, count, mask, scale, AXIS) * tl.expand_dims(weight, AXIS)


@triton.jit(do_not_specialize=["has_ids", "by_id", "ignore"])
def _softmax_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, target_ptr, at_target_ptr,  # [N, E], [M, E], [], [N], [N]
    line_q_ptr, line_k_ptr,  # [6, N], [6, M] of lines_of; [2, N], [2, M] for EXTRAS 0
    row_id_ptr, column_id_ptr,  # [N], [M]
    teacher_x_ptr, teacher_y_ptr,  # [N, F], [M, F]: of the teacher or the guide
    teacher_row_ptr, teacher_column_ptr,  # [2, N], [2, M]; the guide's thresholds [N], and None
    teacher_pair_ptr,  # [N]: the teacher's similarity of each row and its target
    g_ptr,  # [rows, cols] of the superblock at (row0, column0)
    row0, column0, rows, cols, n, m, e, stride_x, stride_y, f, stride_teacher_x, stride_teacher_y, stride_g,
    has_ids, by_id, ignore, unit,
    EXTRAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_r < rows, o_c < cols
    o_i, o_j = row0 + o_r, column0 + o_c
    scale = tl.load(scale_ptr)
    b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
    line_q_ptr += o_i
    line_k_ptr += o_j
    if EXTRAS == 0:
        b_g = softmax_of(b_s, line_q_ptr, n, m_i, scale, 1)  # [BLOCK_M, BLOCK_N]
        b_g = (b_g + softmax_of(b_s, line_k_ptr, m, m_j, scale, 0)) * unit
    else:
        b_g = weighted_softmax(b_s, line_q_ptr, line_q_ptr + 2 * n, n, m_i, scale, 1)
        b_g += weighted_softmax(b_s, line_k_ptr, line_k_ptr + 2 * m, m, m_j, scale, 0)
    target = tl.load(target_ptr + o_i, mask=m_i, other=-1).to(tl.int32)
    m_target = o_j[None, :] == target[:, None]
    b_g = tl.where(m_target, tl.load(at_target_ptr + o_i, mask=m_i, other=0.0)[:, None], b_g)
    if EXTRAS > 0:
        row_id = tl.load(row_id_ptr + o_i, mask=m_i & (has_ids != 0), other=0)
        column_id = tl.load(column_id_ptr + o_j, mask=m_j & (has_ids != 0), other=0)
        m_same = row_id[:, None] == column_id[None, :]
        of_row = tl.load(line_q_ptr + 3 * n, mask=m_i, other=0.0)
        of_column = tl.load(line_k_ptr + 3 * m, mask=m_j, other=0.0)
        b_g += tl.where(m_same & (by_id != 0), of_row[:, None] + of_column[None, :], 0.0)
        of_row = tl.load(line_q_ptr + 4 * n, mask=m_i, other=0.0)
        of_column = tl.load(line_k_ptr + 4 * m, mask=m_j, other=0.0)
        b_g += of_row[:, None] + of_column[None, :]
        if EXTRAS == 2:
            b_teacher = similarity(
                teacher_x_ptr, teacher_y_ptr, o_i, o_j, m_i, m_j, f, stride_teacher_x, stride_teacher_y,
                BLOCK_M, BLOCK_N, BLOCK_E,
            )  # fmt: skip
            teacher_pair = tl.load(teacher_pair_ptr + o_i, mask=m_i, other=0.0)
            b_teacher = tl.where(m_target, teacher_pair[:, None], b_teacher)
            b_g += weighted_softmax(b_teacher, teacher_row_ptr + o_i, line_q_ptr + 5 * n, n, m_i, scale, 1)
            b_g += weighted_softmax(b_teacher, teacher_column_ptr + o_j, line_k_ptr + 5 * m, m, m_j, scale, 0)
        m_ignored = m_same & (ignore != 0)
        if EXTRAS == 3:
            b_guide = similarity(
                teacher_x_ptr, teacher_y_ptr, o_i, o_j, m_i, m_j, f, stride_teacher_x, stride_teacher_y,
                BLOCK_M, BLOCK_N, BLOCK_E,
            )  # fmt: skip
            threshold = tl.load(teacher_row_ptr + o_i, mask=m_i, other=0.0)
            m_ignored = m_ignored | (b_guide > threshold[:, None])
        b_g = tl.where(m_ignored & ~m_target, 0.0, b_g)
    o_g = o_r.to(tl.int64)[:, None] * stride_g + o_c[None, :]
    tl.store(g_ptr + o_g, cast(b_g, g_ptr.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


def _unit(coefficients: tuple[Tensor, Tensor], scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor G is stored with, [] float32."""
    if dtype != torch.float16:
        return scale.new_ones((), dtype=torch.float32)
    bound = torch.zeros((), dtype=torch.float64, device=scale.device)
    for of in coefficients:
        if of.shape[1] > 0:
            largest = of.abs().amax(1)
            bound = bound + largest[LSE] * scale.abs() + largest[LSE + 1 :].sum()
    power = (HIGHEST_G / torch.where(bound > 0, bound, 1.0)).log2().floor().clamp(-100, 100)
    return power.exp2().float()


class _Lines(NamedTuple):
    """Per-row and per-column inputs of the gradient kernel: lines_of each, and G at the targets [N]."""

    at_target: Tensor
    rows: Tensor
    columns: Tensor


def _at_target(
    x: Tensor,
    y: Tensor,
    target: Tensor,
    lse: tuple[Tensor, Tensor],
    coefficients: tuple[Tensor, Tensor] | tuple[None, None],
    scale: Tensor,
    unit: Tensor | float,
    columns: bool,
) -> Tensor:
    n, m = x.shape[0], y.shape[0]
    out = x.new_empty(n, dtype=torch.float32)
    if n > 0:
        units = (None, unit) if isinstance(unit, float) else (unit, 1.0)
        _at_target_kernel[(triton.cdiv(n, TARGETS_BLOCK),)](
            similarity_of_pairs(x, y, target), target, *lse, *coefficients, scale, units[0], out, n, m, int(columns),
            units[1], BLOCK=TARGETS_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


def _features_from(
    lines: _Lines,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    pairs: KernelPairs,
    teacher: KernelTeacher | None,
    extras: int,
    unit: float,
    factor: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    (n, e), m = x.shape, y.shape[0]
    pointers, sizes = extras_of(pairs, teacher, extras)
    flags = int(pairs.by_id or pairs.ignore), int(pairs.by_id), int(pairs.ignore)
    tile = softmax_gradient_tile(x.dtype, generation(x.device), extras)

    def gradient(i: int, j: int, rows: int, cols: int, g: Tensor, grid: tuple[int, int]) -> None:
        _softmax_gradient_kernel[grid](
            x, y, scale, pairs.target, *lines, *pointers, g, i, j, rows, cols, n, m, e, x.stride(0), y.stride(0),
            *sizes, g.stride(0), *flags, unit, **tile, EXTRAS=extras, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
        )  # fmt: skip

    return feature_gradients(gradient, tile, factor, x, y, need)


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
    x, y = rows_of(queries), rows_of(keys)
    n, m = x.shape[0], y.shape[0]
    of_pairs = kernel_pairs(x, pairs)
    second = kernel_guide(guide) or kernel_teacher(teacher, logit_scale, of_pairs.target)
    unit = _unit((coefficients_q, coefficients_k), logit_scale, x.dtype)
    columns = coefficients_k.shape[1] > 0
    lse = lse_q.contiguous(), lse_k.contiguous() if columns else None
    coefficients = (
        coefficients_q.contiguous(),
        coefficients_k.contiguous() if columns else lse_q.new_zeros(COEFFICIENTS, m),
    )
    # Without column statistics the kernel does not read the columns' lse.
    seen_lse = lse[0], lse[0] if lse[1] is None else lse[1]
    lines = _Lines(
        _at_target(x, y, of_pairs.target, seen_lse, coefficients, logit_scale, unit, columns),
        lines_of(lse[0], logit_scale, n, coefficients[0], unit),
        lines_of(lse[1], logit_scale, m, coefficients[1], unit),
    )
    extras = 2 if teacher is not None else GUIDE if guide is not None else 1
    return _features_from(lines, x, y, logit_scale, of_pairs, second, extras, 1.0, 1 / unit, need)


def infonce_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    x, y = rows_of(queries), rows_of(keys)
    n, pairs = x.shape[0], kernel_pairs(x, own_pairs(x))
    lse = lse_q.contiguous(), lse_k.contiguous()
    unit = HIGHEST_G / 2 if x.dtype == torch.float16 else 1.0
    lines = _Lines(
        _at_target(x, y, pairs.target, lse, (None, None), logit_scale, unit, True),
        lines_of(lse[0], logit_scale, n),
        lines_of(lse[1], logit_scale, n),
    )
    factor = (grad_loss * logit_scale / (2 * max(n, 1) * unit)).float()
    return _features_from(lines, x, y, logit_scale, pairs, None, 0, unit, factor, need)
