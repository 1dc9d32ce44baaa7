"""The similarity of each row and its target, bit for bit as the softmax kernels compute a guide's: its thresholds.

A program multiplies BLOCK_M rows by their gathered targets, BLOCK_N at a time, in tiles of the shape of the forward's,
and keeps the diagonal: N·BLOCK_M rather than N·M products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.triton_fwd import softmax_tile
from mmkernels.ops.contrastive.triton_tile import GUIDE, NUM_STAGES, NUM_WARPS, rows_of, similarity
from mmkernels.ops.triton_common import generation

__all__ = ["of_targets"]


@triton.jit
def _targets_fwd_kernel(
    x_ptr, y_ptr, target_ptr, out_ptr,  # [N, E], [M, E], [N] int64, [N] float32
    n, m, e, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    i0 = tl.program_id(0) * BLOCK_M
    o_r = tl.arange(0, BLOCK_M)
    o_i = i0 + o_r
    m_i = o_i < n
    out = tl.zeros((BLOCK_M,), tl.float32)
    for c0 in range(0, BLOCK_M, BLOCK_N):
        o_c = c0 + tl.arange(0, BLOCK_N)
        m_c = (o_c < BLOCK_M) & (i0 + o_c < n)
        o_j = tl.load(target_ptr + i0 + o_c, mask=m_c, other=-1)  # [BLOCK_N]
        m_j = m_c & (o_j >= 0) & (o_j < m)
        b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
        out += tl.sum(tl.where(o_r[:, None] == o_c[None, :], b_s, 0.0), 1)
    tl.store(out_ptr + o_i, out, mask=m_i)


def of_targets(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """[N] float32: the similarity of each query and its target."""
    x, y, target = rows_of(queries), rows_of(keys), targets.contiguous()
    (n, e), m = x.shape, y.shape[0]
    out = x.new_empty(n, dtype=torch.float32)
    if n > 0:
        tile = softmax_tile(x.dtype, generation(x.device), GUIDE)
        _targets_fwd_kernel[(triton.cdiv(n, tile["BLOCK_M"]),)](
            x, y, target, out, n, m, e, x.stride(0), y.stride(0), **tile, num_warps=NUM_WARPS, num_stages=NUM_STAGES
        )
    return out
