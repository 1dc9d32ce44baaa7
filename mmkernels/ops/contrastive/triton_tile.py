"""The tile engine of the contrastive Triton kernels: a tile of S = X Yᵀ, its pairs, and its launch grid.

Epilogues process the tile: `triton_fwd.py`, `triton_bwd.py`, `triton_sigmoid.py`, `triton_search.py`.

The similarity of a query and its target, the largest of a well-trained row, comes from a separate kernel that adds up
many short sums for accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.types import Guide, Pairs, Teacher
from mmkernels.ops.triton_common import dot

__all__ = [
    "GUIDE",
    "LOWEST",
    "NUM_STAGES",
    "NUM_WARPS",
    "SMALL_TILE",
    "TILE",
    "TRITON_TYPES",
    "KernelPairs",
    "KernelTeacher",
    "depth_block",
    "extras_of",
    "grid_of",
    "kernel_guide",
    "kernel_pairs",
    "kernel_teacher",
    "lines_of",
    "log1p_of_unit",
    "processors",
    "rows_of",
    "sigmoid_of_sign",
    "similarity",
    "similarity_of_pairs",
    "split_softmax",
    "tile_of",
]

# Epilogues hold three or four float32 tiles at once: 32 elements of each per thread, with 256 threads. On sm_100 that
# does not fit in registers.
TILE = {"BLOCK_M": 128, "BLOCK_N": 64}
SMALL_TILE = {"BLOCK_M": 64, "BLOCK_N": 64}
NUM_WARPS, NUM_STAGES = 8, 3
VECTOR_BLOCK = 128
PAIRS_BLOCK = {"BLOCK": 16, "BLOCK_E": 128}

TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

GUIDE = 3  # EXTRAS of the softmax kernels with a guide

# Marks excluded entries. Finite, so that differences give 0 and never NaN.
LOWEST = tl.constexpr(-(2.0**126))


def depth_block(dtype: torch.dtype) -> int:
    """BLOCK_E: 128 bytes of a row."""
    return 32 if dtype == torch.float32 else 64


def rows_of(features: Tensor) -> Tensor:
    """Features with a contiguous last dimension; other layouts are copied."""
    return features if features.stride(-1) == 1 or features.shape[-1] <= 1 else features.contiguous()


class KernelPairs(NamedTuple):
    """Pairs in kernel form.

    target: [N] int64, -1 for none. row_ids, column_ids: [N], [M] int64, or a dummy pointer without ids. by_id: pairs
    with equal ids are positive. ignore: pairs with equal ids are not seen, except the target.
    """

    target: Tensor
    row_ids: Tensor
    column_ids: Tensor
    by_id: bool
    ignore: bool


def kernel_pairs(queries: Tensor, pairs: Pairs) -> KernelPairs:
    """Kernel form of `pairs`; absent targets or ids become a dummy pointer that kernels do not read."""
    targets, query_ids, key_ids, same_id = pairs
    ids = query_ids is not None and key_ids is not None
    by_id = ids and same_id == "positive"
    if targets is None or by_id:
        target = torch.full((queries.shape[0],), -1, dtype=torch.int64, device=queries.device)
    else:
        target = targets.contiguous()
    if query_ids is None or key_ids is None:
        return KernelPairs(target, target, target, False, False)
    return KernelPairs(target, query_ids.contiguous(), key_ids.contiguous(), by_id, not by_id)


# Tiles


@triton.jit
def similarity(
    x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows o_i of X times rows o_j of Y, zero out of range: [BLOCK_M, BLOCK_N] float32."""
    o_e = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + o_i.to(tl.int64)[:, None] * stride_x + o_e[None, :]
    y_ptrs = y_ptr + o_j.to(tl.int64)[None, :] * stride_y + o_e[:, None]
    s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for e0 in range(0, e, BLOCK_E):
        m_e = o_e < e - e0
        b_x = tl.load(x_ptrs + e0, mask=m_i[:, None] & m_e[None, :], other=0.0)  # [BLOCK_M, BLOCK_E]
        b_y = tl.load(y_ptrs + e0, mask=m_j[None, :] & m_e[:, None], other=0.0)  # [BLOCK_E, BLOCK_N]
        s += dot(b_x, b_y)
    return s


@triton.jit
def split_softmax(b_a, ref, rest, scale, AXIS: tl.constexpr):
    """exp(scale · a - lse) of a tile whose rows (AXIS 1) or columns (AXIS 0) have the lse, split as `lines_of` does."""
    return tl.exp((b_a - tl.expand_dims(ref, AXIS)) * scale - tl.expand_dims(rest, AXIS))


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [-1/2, 1] as 2 atanh(e / (2 + e)): relative error below 1e-7 for any e."""
    s = e / (2.0 + e)
    z = s * s
    p = 1.0 / 15.0
    p = p * z + 1.0 / 13.0
    p = p * z + 1.0 / 11.0
    p = p * z + 1.0 / 9.0
    p = p * z + 1.0 / 7.0
    p = p * z + 1.0 / 5.0
    p = p * z + 1.0 / 3.0
    return 2.0 * s * (p * z + 1.0)


@triton.jit
def sigmoid_of_sign(z, e):
    """sigmoid(z) given e = exp(-|z|), without cancellation on either side."""
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


def processors(device: torch.device) -> int:
    """Multiprocessors; two in the interpreter, so that its tests cover groups of several row tiles."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def tile_of(major: int) -> dict[str, int]:
    """The plain losses' tile for a major compute capability."""
    return SMALL_TILE if major >= 10 else TILE


def grid_of(n: int, m: int, tile: dict[str, int], device: torch.device) -> tuple[int, int, int]:
    """Groups of row tiles, splits of the columns, columns per split: about one program per multiprocessor."""
    row_tiles, column_tiles = triton.cdiv(n, tile["BLOCK_M"]), triton.cdiv(m, tile["BLOCK_N"])
    there = processors(device)
    groups = min(row_tiles, there)
    tiles_per_split = triton.cdiv(column_tiles, max(there // groups, 1))
    return groups, triton.cdiv(column_tiles, tiles_per_split), tiles_per_split * tile["BLOCK_N"]


# Vectors


@triton.jit
def _pairs_kernel(
    x_ptr, y_ptr, target_ptr, pair_ptr,  # [N, E], [M, E], [N], [N]: the similarity of each row and its target
    n, m, e, stride_x, stride_y,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    m_i = o_i < n
    target = tl.load(target_ptr + o_i, mask=m_i, other=-1)  # [BLOCK]
    there = m_i & (target >= 0) & (target < m)
    b_sum = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        mask = there[:, None] & (o_e < e - e0)[None, :]
        b_x = tl.load(x_ptr + o_i[:, None] * stride_x + e0 + o_e[None, :], mask=mask, other=0.0)
        b_y = tl.load(y_ptr + target[:, None] * stride_y + e0 + o_e[None, :], mask=mask, other=0.0)
        b_sum += b_x.to(tl.float32) * b_y.to(tl.float32)  # [BLOCK, BLOCK_E]
    tl.store(pair_ptr + o_i, tl.sum(b_sum, 1), mask=m_i)


def similarity_of_pairs(x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """[N] float32: the similarity of each row and its target; 0 without one."""
    (n, e), m = x.shape, y.shape[0]
    pair = x.new_empty(n, dtype=torch.float32)
    if n > 0:
        grid = (triton.cdiv(n, PAIRS_BLOCK["BLOCK"]),)
        _pairs_kernel[grid](x, y, target, pair, n, m, e, x.stride(0), y.stride(0), **PAIRS_BLOCK, num_warps=4)
    return pair


@triton.jit
def _lines_kernel(
    lse_ptr, scale_ptr, coefficient_ptr, unit_ptr,  # [count] float64, [], [4, count] float64, []
    out_ptr,  # [2 or 6, count] float32
    count,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = o < count
    lse = tl.load(lse_ptr + o, mask=mask, other=0.0)
    scale = tl.load(scale_ptr).to(tl.float64)
    near = lse / tl.where(scale == 0, 1.0, scale)
    near = tl.where(scale != 0, tl.where(tl.abs(near) < 1e30, near, 0.0), 0.0)
    ref = near.to(tl.float32)
    rest = lse - scale * ref.to(tl.float64)
    # A row that sees nothing has lse = -inf, and weights 0.
    rest = tl.where(lse == float("-inf"), float("inf"), rest)
    out_ptr += o
    tl.store(out_ptr, ref, mask=mask)
    tl.store(out_ptr + count, rest.to(tl.float32), mask=mask)
    if coefficient_ptr is not None:
        unit = tl.load(unit_ptr).to(tl.float64)
        for line in tl.static_range(4):
            weight = tl.load(coefficient_ptr + line * count + o, mask=mask, other=0.0) * unit
            if line == 0:
                weight *= scale
            tl.store(out_ptr + (2 + line) * count, weight.to(tl.float32), mask=mask)


def lines_of(
    lse: Tensor | None, scale: Tensor, count: int, coefficients: Tensor | None = None, unit: Tensor | None = None
) -> Tensor:
    """Per-row (or per-column) inputs of a tile, float32: [2, count], or [6, count] with coefficients.

    Lines 0 and 1 are ref and rest with lse = scale · ref + rest. The softmax exponent, scale (a - ref) - rest, then
    loses no accuracy near the maximum, and the lse keeps twice float32's digits. Lines 2 to 5 are the coefficients [4,
    count] times `unit`, the lse's also times scale. Without an lse, rows see nothing.
    """
    out = torch.empty(2 if coefficients is None else 6, count, dtype=torch.float32, device=scale.device)
    if lse is None:
        out.zero_()[1] = torch.inf
    elif count > 0:
        _lines_kernel[(triton.cdiv(count, VECTOR_BLOCK),)](
            lse.contiguous(), scale, coefficients, unit, out, count, BLOCK=VECTOR_BLOCK, num_warps=4
        )
    return out


class KernelTeacher(NamedTuple):
    """A teacher in kernel form.

    x: [N, F], y: [M, F]: features. rows: [2, N], columns: [2, M]: `lines_of` its lse. pair: [N]: similarities of each
    row and its target.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    columns: Tensor | None
    pair: Tensor | None


def kernel_teacher(teacher: Teacher | None, logit_scale: Tensor, target: Tensor) -> KernelTeacher | None:
    """Kernel form of `teacher`; `target` is that of `kernel_pairs`."""
    if teacher is None:
        return None
    queries, keys, lse_q, lse_k = teacher
    x, y = rows_of(queries), rows_of(keys)
    of_rows, of_columns = (lines_of(lse, logit_scale, of.shape[0]) for lse, of in ((lse_q, x), (lse_k, y)))
    return KernelTeacher(x, y, of_rows, of_columns, similarity_of_pairs(x, y, target))


def kernel_guide(guide: Guide | None) -> KernelTeacher | None:
    """Kernel form of a guide, in the place of a teacher's: rows are the thresholds [N]; nothing of columns or pairs."""
    if guide is None:
        return None
    x, y = rows_of(guide.guide_queries), rows_of(guide.guide_keys)
    return KernelTeacher(x, y, guide.thresholds.contiguous(), None, None)


class Extras(NamedTuple):
    """Softmax kernel arguments that are read only for EXTRAS >= 1 (ids), 2 (the teacher) and 3 (the guide, whose
    features and thresholds take the places of the teacher's features and rows).

    pointers: row_id_ptr, column_id_ptr, teacher_x_ptr, teacher_y_ptr, teacher_row_ptr, teacher_column_ptr,
        teacher_pair_ptr.
    sizes: f, stride_teacher_x, stride_teacher_y.
    """

    pointers: tuple[Tensor | None, ...]
    sizes: tuple[int, int, int]


def extras_of(pairs: KernelPairs, teacher: KernelTeacher | None, extras: int) -> Extras:
    """None and 0 for arguments that are not read."""
    ids = (pairs.row_ids, pairs.column_ids) if extras > 0 else (None, None)
    if teacher is None:
        return Extras((*ids, None, None, None, None, None), (0, 0, 0))
    return Extras((*ids, *teacher), (teacher.x.shape[1], teacher.x.stride(0), teacher.y.stride(0)))
