"""Backward kernels of packing: scatter of rows (the gather's gradient) and pooling gradients.

scatter           a program owns a tile of output rows and features and adds the packed rows of each, one per row
                  at a time, in ascending order: no atomics, bitwise reproducible, float32 accumulation
scatter_chunks    runs first: a program sums a chunk of the packed rows, sorted by target, if all share one target; a
                  row with thousands of them (a frequent token) then takes a step per chunk, not per packed row
segment_pool_bwd  a program owns a tile of x's rows and features; each row looks up its segment's gradient
weighted_pool_bwd a program owns whole rows of x: it scales the segment's gradient and takes its product with the row
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.packing.reference import group_by_row, segment_of_row
from mmkernels.ops.packing.triton_fwd import row_tile, with_columns
from mmkernels.ops.triton_common import cast

# A tile takes as many steps as its row with the most packed rows, so tiles have few rows.
_SCATTER_ROWS = 4
# Packed rows per chunk, sorted by target; a chunk with a single target is summed at once.
_CHUNK = 32


@triton.jit
def _scatter_chunks_kernel(
    packed_ptr,  # [T, E]
    index_ptr,  # [T] int64
    order_ptr,  # [T] int64: packed rows grouped by target row
    sums_ptr,  # [T // CHUNK, E] float32: written where a chunk has one target
    width,
    packed_stride,
    CHUNK: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_c = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < width
    first = tl.load(index_ptr + tl.load(order_ptr + i_c * CHUNK))
    last = tl.load(index_ptr + tl.load(order_ptr + i_c * CHUNK + CHUNK - 1))
    if (first == last) & (first >= 0):
        b_from = tl.load(order_ptr + i_c * CHUNK + tl.arange(0, CHUNK))  # [CHUNK]
        p_packed = packed_ptr + b_from[:, None] * packed_stride + o_e[None, :]
        b_rows = tl.load(p_packed, mask=m_e[None, :], other=0.0).to(tl.float32)  # [CHUNK, BLOCK_E]
        tl.store(sums_ptr + i_c * width + o_e, tl.sum(b_rows, 0), mask=m_e)


@triton.jit
def _add_rows(b_sum, from_ptr, b_at, m_k, stride, o_e, m_e):
    """b_sum [BLOCK_R, BLOCK_E] + the rows b_at [BLOCK_R] where m_k."""
    p_rows = from_ptr + b_at[:, None] * stride + o_e[None, :]
    return b_sum + tl.load(p_rows, mask=m_k[:, None] & m_e[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scatter_fwd_kernel(
    packed_ptr,  # [T, E]
    order_ptr,  # [T] int64: packed rows grouped by target row
    starts_ptr,  # [R+1] int64 into order
    sums_ptr,  # [T // CHUNK, E] float32: of the chunks that have one target
    out_ptr,  # [R, E]
    rows,
    width,
    packed_stride,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_r = o_r < rows
    m_e = o_e < width
    b_first = tl.load(starts_ptr + o_r, mask=m_r, other=0)  # [BLOCK_R]
    b_end = tl.load(starts_ptr + o_r + 1, mask=m_r, other=0)
    # Single rows up to the first whole chunk, whole chunks, single rows after the last.
    b_chunk = (b_first + CHUNK - 1) // CHUNK
    b_chunks = tl.maximum(b_end // CHUNK - b_chunk, 0)
    b_head = tl.where(b_chunks > 0, b_chunk * CHUNK - b_first, b_end - b_first)
    b_after = b_first + b_head + b_chunks * CHUNK
    b_sum = tl.zeros([BLOCK_R, BLOCK_E], tl.float32)
    for k in range(0, tl.max(b_head, 0).to(tl.int32)):
        m_k = k < b_head
        b_from = tl.load(order_ptr + b_first + k, mask=m_k, other=0)
        b_sum = _add_rows(b_sum, packed_ptr, b_from, m_k, packed_stride, o_e, m_e)
    for k in range(0, tl.max(b_chunks, 0).to(tl.int32)):
        b_sum = _add_rows(b_sum, sums_ptr, b_chunk + k, k < b_chunks, width, o_e, m_e)
    for k in range(0, tl.max(b_end - b_after, 0).to(tl.int32)):
        m_k = k < b_end - b_after
        b_from = tl.load(order_ptr + b_after + k, mask=m_k, other=0)
        b_sum = _add_rows(b_sum, packed_ptr, b_from, m_k, packed_stride, o_e, m_e)
    p_out = out_ptr + o_r[:, None] * width + o_e[None, :]
    tl.store(p_out, cast(b_sum, out_ptr.dtype.element_ty), mask=m_r[:, None] & m_e[None, :])


@triton.jit
def _segment_pool_bwd_kernel(
    grad_out_ptr,  # [S, E]
    cu_seqlens_ptr,  # [S+1] int32
    segment_ptr,  # [T] int64: the segment of each row, S for none
    argmax_ptr,  # [S, E] int32, for "max"
    grad_x_ptr,  # [T, E]
    tokens,
    segments,
    width,
    grad_stride,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_t = o_t < tokens
    m_e = o_e < width
    b_segment = tl.load(segment_ptr + o_t, mask=m_t, other=segments)  # [BLOCK_T]
    m_in = b_segment < segments
    b_begin = tl.load(cu_seqlens_ptr + b_segment, mask=m_in, other=0)
    m_grad = m_in
    if MODE == "first":
        m_grad = m_in & (o_t == b_begin)
    p_grad = grad_out_ptr + b_segment[:, None] * grad_stride + o_e[None, :]
    b_grad = tl.load(p_grad, mask=m_grad[:, None] & m_e[None, :], other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_E]
    if MODE == "mean":
        b_end = tl.load(cu_seqlens_ptr + b_segment + 1, mask=m_in, other=1)
        b_grad = b_grad / (b_end - b_begin).to(tl.float32)[:, None]
    if MODE == "max":
        p_argmax = argmax_ptr + b_segment[:, None] * width + o_e[None, :]
        b_argmax = tl.load(p_argmax, mask=m_in[:, None] & m_e[None, :], other=-1)
        b_grad = tl.where(b_argmax == o_t[:, None], b_grad, 0.0)
    p_grad_x = grad_x_ptr + o_t[:, None] * width + o_e[None, :]
    tl.store(p_grad_x, cast(b_grad, grad_x_ptr.dtype.element_ty), mask=m_t[:, None] & m_e[None, :])


@triton.jit
def _weighted_pool_bwd_kernel(
    grad_out_ptr,  # [S, E]
    x_ptr,  # [T, E]
    weights_ptr,  # [T] float32
    segment_ptr,  # [T] int64: the segment of each row, S for none
    grad_x_ptr,  # [T, E]
    grad_weights_ptr,  # [T] float32
    tokens,
    segments,
    width,
    grad_stride,
    x_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_segment = tl.load(segment_ptr + o_t, mask=m_t, other=segments)  # [BLOCK_T]
    m_in = b_segment < segments
    b_weight = tl.load(weights_ptr + o_t, mask=m_in, other=0.0)
    b_dot = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, width, BLOCK_E):
        o_e = start + tl.arange(0, BLOCK_E)
        m = m_in[:, None] & (o_e < width)[None, :]
        p_grad = grad_out_ptr + b_segment[:, None] * grad_stride + o_e[None, :]
        b_grad = tl.load(p_grad, mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_E]
        b_x = tl.load(x_ptr + o_t[:, None] * x_stride + o_e[None, :], mask=m, other=0.0).to(tl.float32)
        b_dot += tl.sum(b_grad * b_x, 1)
        b_grad_x = tl.where(m_in[:, None], b_grad * b_weight[:, None], 0.0)
        p_grad_x = grad_x_ptr + o_t[:, None] * width + o_e[None, :]
        tl.store(p_grad_x, cast(b_grad_x, grad_x_ptr.dtype.element_ty), mask=m_t[:, None] & (o_e < width)[None, :])
    tl.store(grad_weights_ptr + o_t, b_dot, mask=m_t)


def scatter(packed: Tensor, index: Tensor, rows: int) -> Tensor:
    """packed [T, E], index [T] int64 -> [rows, E]."""
    packed = with_columns(packed)
    width = packed.shape[1]
    out = packed.new_empty(rows, width)
    if out.numel() == 0:
        return out
    index = index.contiguous()
    order, starts = group_by_row(index, rows)
    chunks, stride = index.shape[0] // _CHUNK, packed.stride(0)
    sums = packed.new_empty(chunks, width, dtype=torch.float32)
    block_e, chunk_e = row_tile(width)[1], row_tile(width, most_features=128)[1]
    if chunks > 0:
        grid = (chunks, triton.cdiv(width, chunk_e))
        _scatter_chunks_kernel[grid](packed, index, order, sums, width, stride, CHUNK=_CHUNK, BLOCK_E=chunk_e)
    grid = (triton.cdiv(rows, _SCATTER_ROWS), triton.cdiv(width, block_e))
    tile = {"CHUNK": _CHUNK, "BLOCK_R": _SCATTER_ROWS, "BLOCK_E": block_e}
    _scatter_fwd_kernel[grid](packed, order, starts, sums, out, rows, width, stride, **tile)
    return out


def segment_pool_bwd(grad_out: Tensor, cu_seqlens: Tensor, argmax: Tensor, rows: int, mode: str) -> Tensor:
    """grad_out [S, E] -> grad_x [rows, E]."""
    grad_out, cu_seqlens = with_columns(grad_out), cu_seqlens.contiguous()
    segments, width = grad_out.shape
    grad_x = grad_out.new_empty(rows, width)
    if grad_x.numel() == 0:
        return grad_x
    segment = segment_of_row(cu_seqlens, rows)
    block_t, block_e = row_tile(width)
    grid = (triton.cdiv(rows, block_t), triton.cdiv(width, block_e))
    _segment_pool_bwd_kernel[grid](
        grad_out,
        cu_seqlens,
        segment,
        argmax,
        grad_x,
        rows,
        segments,
        width,
        grad_out.stride(0),
        MODE=mode,
        BLOCK_T=block_t,
        BLOCK_E=block_e,
    )
    return grad_x


def weighted_pool_bwd(grad_out: Tensor, x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """grad_out [S, E] -> (grad_x [T, E], grad_weights [T])."""
    grad_out, x, weights = with_columns(grad_out), with_columns(x), weights.contiguous()
    rows, width = x.shape
    grad_x, grad_weights = x.new_empty(rows, width), weights.new_empty(rows)
    if grad_x.numel() == 0:
        return grad_x, grad_weights.zero_()
    segment = segment_of_row(cu_seqlens, rows)
    block_t, block_e = row_tile(width)
    _weighted_pool_bwd_kernel[(triton.cdiv(rows, block_t),)](
        grad_out,
        x,
        weights,
        segment,
        grad_x,
        grad_weights,
        rows,
        grad_out.shape[0],
        width,
        grad_out.stride(0),
        x.stride(0),
        BLOCK_T=block_t,
        BLOCK_E=block_e,
    )
    return grad_x, grad_weights
