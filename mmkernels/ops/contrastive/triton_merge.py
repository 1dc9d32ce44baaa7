"""The end of the softmax forward: merges slices of statistics into row or column statistics, in float64.

A program owns BLOCK rows and reads their slices twice: for the largest ref, then for the sums relative to it. Then it
adds the targets, which the tiles leave out. The order is fixed, so results are reproducible.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.triton_tile import LOWEST
from mmkernels.ops.contrastive.types import STATISTICS

__all__ = ["FIELDS", "Joins", "joins_of_columns", "joins_of_rows", "merge"]

# Fields of a slice, by EXTRAS: ref, sum, dot; total, positive, best; teacher. A guide adds none.
FIELDS = (3, 6, 7, 6)
MERGE_BLOCK = 128


@triton.jit
def _softmax_merge_kernel(
    part_ptr, scale_ptr,  # [parts, FIELDS, count], []
    pair_ptr, order_ptr, start_ptr, end_ptr,  # [N], [N], [count], [count]: pairs order[start:end] join a row or column
    out_ptr,  # [7, count] float64; see types.py
    count, parts,
    FIELDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    scale = tl.load(scale_ptr)
    sign = tl.where(scale < 0, -1.0, 1.0).to(tl.float64)
    size = tl.maximum(tl.abs(scale), 1e-30)
    size = tl.where(scale == scale, size, scale)
    ptr = part_ptr + o
    highest = tl.full((BLOCK,), LOWEST, tl.float32)
    for _ in range(parts):
        highest = tl.maximum(highest, tl.load(ptr, mask=mask, other=LOWEST))  # [BLOCK]
        ptr += FIELDS * count
    total = tl.zeros((BLOCK,), tl.float64)
    dot = tl.zeros((BLOCK,), tl.float64)
    seen = tl.zeros((BLOCK,), tl.float64)
    positive = tl.zeros((BLOCK,), tl.float64)
    of_teacher = tl.zeros((BLOCK,), tl.float64)
    best = tl.full((BLOCK,), LOWEST, tl.float64)
    ptr = part_ptr + o
    for _ in range(parts):
        b_ref = tl.load(ptr, mask=mask, other=LOWEST)
        below = tl.where(b_ref > LOWEST, b_ref - highest, 0.0)
        weight = tl.exp(below * size).to(tl.float64)
        b_sum = tl.load(ptr + count, mask=mask, other=0.0).to(tl.float64)
        b_dot = tl.load(ptr + 2 * count, mask=mask, other=0.0).to(tl.float64)
        total += weight * b_sum
        dot += weight * (b_dot + b_sum * below.to(tl.float64))
        if FIELDS > 3:
            seen += tl.load(ptr + 3 * count, mask=mask, other=0.0).to(tl.float64)
            positive += tl.load(ptr + 4 * count, mask=mask, other=0.0).to(tl.float64)
            best = tl.maximum(best, tl.load(ptr + 5 * count, mask=mask, other=LOWEST).to(tl.float64))
        if FIELDS > 6:
            of_teacher += tl.load(ptr + 6 * count, mask=mask, other=0.0).to(tl.float64)
        ptr += FIELDS * count

    ref, size = highest.to(tl.float64), size.to(tl.float64)
    start = tl.load(start_ptr + o, mask=mask, other=0)
    joining = tl.load(end_ptr + o, mask=mask, other=0) - start
    for k in range(tl.max(joining, 0)):  # at most one per row
        joins = k < joining
        i = tl.load(order_ptr + start + k, mask=joins, other=0)
        a = tl.load(pair_ptr + i, mask=joins, other=0.0).to(tl.float64) * sign
        higher = tl.where(joins, tl.maximum(ref, a), ref)
        before, e = tl.exp((ref - higher) * size), tl.where(joins, tl.exp((a - higher) * size), 0.0)
        dot = (dot + total * (ref - higher)) * before + tl.where(joins, e * (a - higher), 0.0)
        total = total * before + e
        positive += tl.where(joins, a, 0.0)
        best = tl.where(joins, tl.maximum(best, a), best)
        ref = higher

    nothing = float("-inf")
    size = tl.abs(scale).to(tl.float64)
    any_seen = total != 0
    tl.store(out_ptr + o, tl.where(any_seen, size * ref + tl.log(total), nothing), mask=mask)
    out_ptr += o
    tl.store(out_ptr + count, sign * positive, mask=mask)
    tl.store(out_ptr + 2 * count, sign * seen, mask=mask)
    tl.store(out_ptr + 3 * count, sign * of_teacher, mask=mask)
    tl.store(out_ptr + 4 * count, tl.where(any_seen, sign * (ref + dot / total), 0.0), mask=mask)
    tl.store(out_ptr + 5 * count, tl.where(ref > LOWEST, size * ref, nothing), mask=mask)
    tl.store(out_ptr + 6 * count, tl.where(best > LOWEST, size * best, nothing), mask=mask)


class Joins(NamedTuple):
    """The rows whose targets join row or column o: order[start[o] : end[o]], int64."""

    order: Tensor
    start: Tensor
    end: Tensor


def joins_of_rows(target: Tensor, m: int) -> Joins:
    own_row = torch.arange(target.shape[0], device=target.device)
    return Joins(own_row, own_row, own_row + ((target >= 0) & (target < m)))


def joins_of_columns(target: Tensor, m: int) -> Joins:
    ordered, order = target.sort(stable=True)
    columns = torch.arange(m, device=target.device)
    return Joins(
        order, torch.searchsorted(ordered, columns, right=False), torch.searchsorted(ordered, columns, right=True)
    )


def merge(parts: Tensor, scale: Tensor, pair: Tensor, joins: Joins, extras: int) -> Tensor:
    count = parts.shape[2]
    out = parts.new_empty(STATISTICS, count, dtype=torch.float64)
    _softmax_merge_kernel[(triton.cdiv(count, MERGE_BLOCK),)](
        parts, scale, pair, *joins, out, count, parts.shape[0], FIELDS=FIELDS[extras], BLOCK=MERGE_BLOCK, num_warps=4
    )
    return out
