"""The pairwise sigmoid loss and its gradient: epilogues of the tile engine.

With z = -1 for a positive pair, else +1, and u = z (scale · S + bias), the loss is softplus(u) and its derivative by
the logit z sigmoid(u). Each program writes three sums; no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.reference import own_pairs
from mmkernels.ops.contrastive.triton_gradients import HIGHEST_G, feature_gradients, gradient_tile
from mmkernels.ops.contrastive.triton_tile import (
    NUM_STAGES,
    NUM_WARPS,
    KernelPairs,
    depth_block,
    grid_of,
    kernel_pairs,
    log1p_of_unit,
    rows_of,
    sigmoid_of_sign,
    similarity,
    similarity_of_pairs,
    tile_of,
)
from mmkernels.ops.contrastive.types import Need, Pairs
from mmkernels.ops.triton_common import cast, generation

__all__ = ["siglip_bwd", "siglip_fwd", "sigmoid_bwd", "sigmoid_fwd", "sigmoid_tile"]


def sigmoid_tile(dtype: torch.dtype, major: int, ids: bool) -> dict[str, int]:
    return {"BLOCK_M": 64, "BLOCK_N": 32} if ids and dtype == torch.float32 else tile_of(major)


@triton.jit
def _logit_tile(
    x_ptr, y_ptr, scale_ptr, bias_ptr, target_ptr, pair_ptr, row_id_ptr, column_id_ptr,
    o_i, o_j, m_i, m_j, e, stride_x, stride_y,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """S, z and u: [BLOCK_M, BLOCK_N] each. Positives: equal ids, or the target with its precomputed similarity."""
    b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
    if IDS:
        row_id = tl.load(row_id_ptr + o_i, mask=m_i, other=0)  # [BLOCK_M]
        column_id = tl.load(column_id_ptr + o_j, mask=m_j, other=0)  # [BLOCK_N]
        m_positive = row_id[:, None] == column_id[None, :]
    else:
        target = tl.load(target_ptr + o_i, mask=m_i, other=-1).to(tl.int32)  # [BLOCK_M]
        pair = tl.load(pair_ptr + o_i, mask=m_i, other=0.0)
        m_positive = o_j[None, :] == target[:, None]
        b_s = tl.where(m_positive, pair[:, None], b_s)
    b_sign = tl.where(m_positive, -1.0, 1.0)
    return b_s, b_sign, b_sign * (b_s * tl.load(scale_ptr) + tl.load(bias_ptr))


@triton.jit
def _sigmoid_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr,  # [N, E], [M, E], [], []
    target_ptr, pair_ptr, row_id_ptr, column_id_ptr,  # [N], [N], [N], [M]
    sums_ptr,  # [row tiles, splits, 3]: loss, d loss / d scale, d loss / d bias
    n, m, e, stride_x, stride_y, split_size,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, part = tl.program_id(0), tl.program_id(1)
    o_i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = o_i < n
    loss = tl.zeros((BLOCK_M,), tl.float32)
    by_scale = tl.zeros((BLOCK_M,), tl.float32)
    by_bias = tl.zeros((BLOCK_M,), tl.float32)
    for j0 in range(part * split_size, tl.minimum((part + 1) * split_size, m), BLOCK_N):
        o_j = j0 + tl.arange(0, BLOCK_N)
        m_j = o_j < m
        b_s, b_sign, b_z = _logit_tile(
            x_ptr, y_ptr, scale_ptr, bias_ptr, target_ptr, pair_ptr, row_id_ptr, column_id_ptr,
            o_i, o_j, m_i, m_j, e, stride_x, stride_y, IDS, BLOCK_M, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        b_e = tl.exp(-tl.abs(b_z))
        m_ij = m_i[:, None] & m_j[None, :]
        loss += tl.sum(tl.where(m_ij, tl.maximum(b_z, 0.0) + log1p_of_unit(b_e), 0.0), 1)
        b_g = tl.where(m_ij, b_sign * sigmoid_of_sign(b_z, b_e), 0.0)
        by_scale += tl.sum(b_g * b_s, 1)
        by_bias += tl.sum(b_g, 1)
    sums_ptr += (tile * tl.num_programs(1) + part) * 3
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(by_scale, 0))
    tl.store(sums_ptr + 2, tl.sum(by_bias, 0))


@triton.jit
def _sigmoid_gradient_kernel(
    x_ptr, y_ptr, scale_ptr, bias_ptr,  # [N, E], [M, E], [], []
    target_ptr, pair_ptr, row_id_ptr, column_id_ptr,  # [N], [N], [N], [M]
    g_ptr,  # [rows, cols] of the superblock at (row0, column0): d loss / d logit, times `unit`
    row0, column0, rows, cols, e, stride_x, stride_y, stride_g, unit,
    IDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_r < rows, o_c < cols
    _, b_sign, b_z = _logit_tile(
        x_ptr, y_ptr, scale_ptr, bias_ptr, target_ptr, pair_ptr, row_id_ptr, column_id_ptr,
        row0 + o_r, column0 + o_c, m_i, m_j, e, stride_x, stride_y, IDS, BLOCK_M, BLOCK_N, BLOCK_E,
    )  # fmt: skip
    b_g = b_sign * sigmoid_of_sign(b_z, tl.exp(-tl.abs(b_z))) * unit
    o_g = o_r.to(tl.int64)[:, None] * stride_g + o_c[None, :]
    tl.store(g_ptr + o_g, cast(b_g, g_ptr.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


def _positives_of(x: Tensor, y: Tensor, pairs: KernelPairs) -> tuple[Tensor | None, ...]:
    """target_ptr, pair_ptr, row_id_ptr, column_id_ptr of the kernels: None for those not read."""
    if pairs.by_id:
        return None, None, pairs.row_ids, pairs.column_ids
    return pairs.target, similarity_of_pairs(x, y, pairs.target), None, None


def _sums(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: KernelPairs) -> Tensor:
    (n, e), m = x.shape, y.shape[0]
    if n == 0 or m == 0:
        return x.new_zeros(3, dtype=torch.float64)
    tile = sigmoid_tile(x.dtype, generation(x.device), pairs.by_id)
    row_tiles = triton.cdiv(n, tile["BLOCK_M"])
    _, splits, split_size = grid_of(n, m, tile, x.device)
    sums = x.new_empty(row_tiles, splits, 3, dtype=torch.float32)
    _sigmoid_fwd_kernel[(row_tiles, splits)](
        x, y, scale, bias, *_positives_of(x, y, pairs), sums, n, m, e, x.stride(0), y.stride(0), split_size,
        IDS=pairs.by_id, **tile, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        enable_fp_fusion=False,
    )  # fmt: skip
    return sums.sum((0, 1), dtype=torch.float64)


def sigmoid_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[3] float64: the sum of the losses of all pairs, and its derivatives by scale and bias."""
    x, y = rows_of(queries), rows_of(keys)
    return _sums(x, y, logit_scale, logit_bias, kernel_pairs(x, pairs))


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    x, y = rows_of(queries), rows_of(keys)
    sums = _sums(x, y, logit_scale, logit_bias, kernel_pairs(x, own_pairs(x)))
    loss, by_scale, by_bias = (sums / max(x.shape[0], 1)).float().unbind()
    return loss.clone(), by_scale.clone(), by_bias.clone()


def _sigmoid_gradients(
    factor: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: KernelPairs, need: Need
) -> tuple[Tensor, Tensor]:
    tile = gradient_tile(x.dtype, generation(x.device))
    unit = HIGHEST_G / 2 if x.dtype == torch.float16 else 1.0
    positives = _positives_of(x, y, pairs)

    def gradient(i: int, j: int, rows: int, cols: int, g: Tensor, grid: tuple[int, int]) -> None:
        _sigmoid_gradient_kernel[grid](
            x, y, scale, bias, *positives, g, i, j, rows, cols, x.shape[1], x.stride(0), y.stride(0), g.stride(0), unit,
            IDS=pairs.by_id, **tile, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip

    return feature_gradients(gradient, tile, (factor / unit).float(), x, y, need)


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
    x, y = rows_of(queries), rows_of(keys)
    factor = grad_sum.double() * logit_scale
    return _sigmoid_gradients(factor, x, y, logit_scale, logit_bias, kernel_pairs(x, pairs), need)


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    grad_sum = grad_loss.double() / max(queries.shape[0], 1)
    return sigmoid_bwd(grad_sum, queries, keys, logit_scale, logit_bias, own_pairs(queries), need)
