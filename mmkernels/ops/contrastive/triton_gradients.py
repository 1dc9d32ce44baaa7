"""The second half of the tile engine: feature gradients G Y and Gᵀ X, computing G from S one superblock at a time.

With G = d / d similarity up to a constant factor, dX = factor · G Y and dY = factor · Gᵀ X. For each superblock, small
enough for its G to stay in L2, two kernels alternate:

    gradient     recomputes a tile of S = X Yᵀ and writes that tile of G in the features' dtype: an epilogue
    accumulate   a product with float32 sums: rows of dX += G Y, rows of dY += Gᵀ X; the last one of a row scales and
                 rounds to the features' dtype

No atomics, so results are reproducible.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.triton_tile import NUM_STAGES, NUM_WARPS, depth_block
from mmkernels.ops.contrastive.types import Need
from mmkernels.ops.triton_common import cast, dot

__all__ = ["HIGHEST_G", "SUPERBLOCK", "feature_gradients", "gradient_tile"]

TILE = {"BLOCK_M": 128, "BLOCK_N": 128}

# Rows and columns of a superblock of G: 32 MB in a 16-bit dtype.
SUPERBLOCK = 4096

# Small entries of G matter but would be subnormal in float16. So float16 G is stored times a power of two that scales
# its largest entry to about this.
HIGHEST_G = 2.0**15


def gradient_tile(dtype: torch.dtype, major: int) -> dict[str, int]:
    """The tile of G of the plain losses on a compute capability."""
    # Float32 (three tf32 products) and sm_100 need a smaller tile for registers.
    return {"BLOCK_M": 128, "BLOCK_N": 64} if dtype == torch.float32 or major >= 10 else TILE


@triton.jit(do_not_specialize=["first", "last"])
def _accumulate_kernel(
    a_ptr, b_ptr, sum_ptr, out_ptr, factor_ptr,  # [rows, depth], [depth, E], [rows, E], [rows, E], []
    rows, depth, e, stride_a_row, stride_a_depth, stride_b, stride_out, first, last,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    o_i = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_e = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_i, m_e = o_i < rows, o_e < e
    a_ptrs = a_ptr + o_i.to(tl.int64)[:, None] * stride_a_row + o_k.to(tl.int64)[None, :] * stride_a_depth
    b_ptrs = b_ptr + o_k.to(tl.int64)[:, None] * stride_b + o_e[None, :]
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        m_k = o_k < depth - k0
        b_a = tl.load(a_ptrs, mask=m_i[:, None] & m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_b = tl.load(b_ptrs, mask=m_k[:, None] & m_e[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_sum += dot(b_a, b_b)
        a_ptrs += BLOCK_K * stride_a_depth
        b_ptrs += BLOCK_K * stride_b
    mask = m_i[:, None] & m_e[None, :]
    o_sum = o_i.to(tl.int64)[:, None] * e + o_e[None, :]
    if first == 0:
        b_sum += tl.load(sum_ptr + o_sum, mask=mask, other=0.0)
    if last != 0:
        o_out = o_i.to(tl.int64)[:, None] * stride_out + o_e[None, :]
        tl.store(out_ptr + o_out, cast(b_sum * tl.load(factor_ptr), out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(sum_ptr + o_sum, b_sum, mask=mask)


def _accumulate(a: Tensor, b: Tensor, running: Tensor, out: Tensor, factor: Tensor, first: bool, last: bool) -> None:
    """If last: out = factor * (running + a @ b), else running += a @ b; if first, running counts as 0."""
    (rows, depth), e = a.shape, b.shape[1]
    grid = triton.cdiv(e, TILE["BLOCK_N"]), triton.cdiv(rows, TILE["BLOCK_M"])
    _accumulate_kernel[grid](
        a, b, running, out, factor, rows, depth, e, a.stride(0), a.stride(1), b.stride(0), out.stride(0),
        int(first), int(last), **TILE, BLOCK_K=depth_block(b.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


# Launches the kernel for G of a superblock: (row0, column0, rows, cols, g, grid).
Gradient = Callable[[int, int, int, int, Tensor, tuple[int, int]], None]


def feature_gradients(
    gradient: Gradient, tile: dict[str, int], factor: Tensor, x: Tensor, y: Tensor, need: Need
) -> tuple[Tensor, Tensor]:
    """Loop over the superblocks of G, which `gradient` computes in tiles of `tile`."""
    (n, e), m = x.shape, y.shape[0]
    need_x, need_y = need
    dx, dy = x.new_empty(n if need_x else 0, e), y.new_empty(m if need_y else 0, e)
    if n == 0 or m == 0 or e == 0:
        return dx.zero_(), dy.zero_()
    size = SUPERBLOCK
    g = x.new_empty(min(n, size), min(m, size))
    x_running = x.new_empty(min(n, size) if need_x and m > size else 0, e, dtype=torch.float32)
    y_running = x.new_empty(m if need_y and n > size else 0, e, dtype=torch.float32)
    for i in range(0, n, size):
        rows = min(size, n - i)
        for j in range(0, m, size):
            cols = min(size, m - j)
            gradient(i, j, rows, cols, g, (triton.cdiv(cols, tile["BLOCK_N"]), triton.cdiv(rows, tile["BLOCK_M"])))
            b_g = g[:rows, :cols]
            if need_x:
                _accumulate(b_g, y[j : j + cols], x_running, dx[i : i + rows], factor, j == 0, j + cols == m)
            if need_y:
                running = y_running[j : j + cols]
                _accumulate(b_g.T, x[i : i + rows], running, dy[j : j + cols], factor, i == 0, i + rows == n)
    return dx, dy
