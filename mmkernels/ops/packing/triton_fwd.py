"""Forward kernels of packing: row gather, segment pooling, patchify, M-RoPE positions.

gather        a program owns a tile of packed rows and features; reads are rows of the sources, contiguous in features
segment_pool  a program owns one segment and a block of features, and loops over the segment's rows, accumulating in
              float32; no atomics, so the result is bitwise reproducible
patchify      a program owns a tile of tokens and patch elements, and computes each element's pixel index
mrope         a program owns a block of tokens and finds each one's segment and span by binary search
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.packing.reference import token_grid
from mmkernels.ops.packing.types import PatchSize, Sources, Spans
from mmkernels.ops.triton_common import cast

# Elements of a tile: 32 per thread with four warps.
_TILE = 4096
_TOKENS = 256
_NO_ROW = tl.constexpr(2147483647)


@triton.jit
def _rows_of(source_ptr, b_index, begin, end, source_stride, o_e, m_e):
    """Rows b_index - begin of the source that holds rows [begin, end), zeros elsewhere: [BLOCK_T, BLOCK_E]."""
    m_t = (b_index >= begin) & (b_index < end)
    p_source = source_ptr + (b_index - begin)[:, None] * source_stride + o_e[None, :]
    return tl.load(p_source, mask=m_t[:, None] & m_e[None, :], other=0.0)


@triton.jit
def _gather_fwd_kernel(
    first_ptr,  # [R1, E]
    second_ptr,  # [R2, E], etc.; the first source again if there are fewer
    third_ptr,
    fourth_ptr,
    index_ptr,  # [T] int64, -1 for a zero row
    out_ptr,  # [T, E]
    tokens,
    width,
    second_begin,
    third_begin,
    fourth_begin,
    end,
    first_stride,
    second_stride,
    third_stride,
    fourth_stride,
    SOURCES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_t = o_t < tokens
    m_e = o_e < width
    b_index = tl.load(index_ptr + o_t, mask=m_t, other=-1)  # [BLOCK_T]
    b_rows = _rows_of(first_ptr, b_index, 0, second_begin, first_stride, o_e, m_e)  # [BLOCK_T, BLOCK_E]
    # Only one source holds the row; the other loads are masked off.
    if SOURCES > 1:
        b_more = _rows_of(second_ptr, b_index, second_begin, third_begin, second_stride, o_e, m_e)
        b_rows = tl.where((b_index >= second_begin)[:, None], b_more, b_rows)
    if SOURCES > 2:
        b_more = _rows_of(third_ptr, b_index, third_begin, fourth_begin, third_stride, o_e, m_e)
        b_rows = tl.where((b_index >= third_begin)[:, None], b_more, b_rows)
    if SOURCES > 3:
        b_more = _rows_of(fourth_ptr, b_index, fourth_begin, end, fourth_stride, o_e, m_e)
        b_rows = tl.where((b_index >= fourth_begin)[:, None], b_more, b_rows)
    tl.store(out_ptr + o_t[:, None] * width + o_e[None, :], b_rows, mask=m_t[:, None] & m_e[None, :])


@triton.jit
def _segment_pool_fwd_kernel(
    x_ptr,  # [T, E]
    cu_seqlens_ptr,  # [S+1] int32
    weights_ptr,  # [T] float32, for "weighted"
    out_ptr,  # [S, E]
    argmax_ptr,  # [S, E] int32, for "max"
    width,
    x_stride,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = o_e < width
    begin = tl.load(cu_seqlens_ptr + i_s)
    end = tl.load(cu_seqlens_ptr + i_s + 1)
    o_out = i_s * width + o_e
    if MODE == "max":
        b_best = tl.full([BLOCK_E], float("-inf"), tl.float32)
        b_arg = tl.full([BLOCK_E], -1, tl.int32)
        for start in range(begin, end, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T)
            m = (o_t < end)[:, None] & m_e[None, :]
            p_x = x_ptr + o_t.to(tl.int64)[:, None] * x_stride + o_e[None, :]
            b_x = tl.load(p_x, mask=m, other=float("-inf")).to(tl.float32)  # [BLOCK_T, BLOCK_E]
            # NaN beats every number; it is found separately from the maximum.
            b_is_nan = (b_x != b_x) & m
            b_has_nan = tl.max(b_is_nan.to(tl.int32), 0) > 0  # [BLOCK_E]
            b_max = tl.max(tl.where(b_is_nan, float("-inf"), b_x), 0)
            b_wins = tl.where(b_has_nan[None, :], b_is_nan, (b_x == b_max[None, :]) & m)
            b_row = tl.min(tl.where(b_wins, o_t[:, None], _NO_ROW), 0)
            b_max = tl.where(b_has_nan, float("nan"), b_max)
            better = (b_max > b_best) | (b_has_nan & (b_best == b_best)) | (b_arg < 0)
            b_best = tl.where(better, b_max, b_best)
            b_arg = tl.where(better, b_row, b_arg)
        b_best = tl.where(b_arg < 0, 0.0, b_best)
        tl.store(argmax_ptr + o_out, b_arg, mask=m_e)
        tl.store(out_ptr + o_out, cast(b_best, out_ptr.dtype.element_ty), mask=m_e)
    else:
        b_sum = tl.zeros([BLOCK_E], tl.float32)
        last = end
        if MODE == "first":
            last = tl.minimum(begin + 1, end)
        for start in range(begin, last, BLOCK_T):
            o_t = start + tl.arange(0, BLOCK_T)
            m = (o_t < last)[:, None] & m_e[None, :]
            p_x = x_ptr + o_t.to(tl.int64)[:, None] * x_stride + o_e[None, :]
            b_x = tl.load(p_x, mask=m, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_E]
            if MODE == "weighted":
                b_x = b_x * tl.load(weights_ptr + o_t, mask=o_t < last, other=0.0)[:, None]
            b_sum += tl.sum(b_x, 0)
        if MODE == "mean":
            b_sum = b_sum / tl.maximum(end - begin, 1).to(tl.float32)
        tl.store(out_ptr + o_out, cast(b_sum, out_ptr.dtype.element_ty), mask=m_e)


@triton.jit
def _patchify_fwd_kernel(
    x_ptr,  # pixels [P], image after image, or tokens [T, C TEMPORAL PATCH^2]
    grid_ptr,  # [N, 3] int64: t, h, w in patches
    starts_ptr,  # [N+1] int64: the first token of each image
    image_ptr,  # [T] int64: the image of each token
    out_ptr,  # tokens or pixels
    tokens,
    CHANNELS: tl.constexpr,
    PATCH: tl.constexpr,
    TEMPORAL: tl.constexpr,
    MERGE: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    ROW: tl.constexpr = CHANNELS * TEMPORAL * PATCH * PATCH
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_t = o_t < tokens
    b_image = tl.load(image_ptr + o_t, mask=m_t, other=0)  # [BLOCK_T]
    b_start = tl.load(starts_ptr + b_image, mask=m_t, other=0)
    b_h = tl.load(grid_ptr + 3 * b_image + 1, mask=m_t, other=MERGE)
    b_w = tl.load(grid_ptr + 3 * b_image + 2, mask=m_t, other=MERGE)
    # The token's position in its image, in patches: within its MERGE x MERGE block, block, time.
    b_in = (o_t - b_start) % (MERGE * MERGE)
    b_block = (o_t - b_start) // (MERGE * MERGE)
    b_blocks_w = b_w // MERGE
    b_x = b_block % b_blocks_w * MERGE + b_in % MERGE
    b_row = b_block // b_blocks_w
    b_y = b_row % (b_h // MERGE) * MERGE + b_in // MERGE
    b_t = b_row // (b_h // MERGE)
    # The element's position in its patch.
    o_x = o_e % PATCH
    o_y = o_e // PATCH % PATCH
    o_f = o_e // (PATCH * PATCH) % TEMPORAL
    o_c = o_e // (PATCH * PATCH * TEMPORAL)
    b_line = b_w * PATCH
    b_channel = b_line * b_h * PATCH
    b_base = b_start * ROW + b_t * TEMPORAL * CHANNELS * b_channel + b_y * PATCH * b_line + b_x * PATCH
    b_pixel = b_base[:, None] + (o_f * CHANNELS + o_c)[None, :] * b_channel[:, None]
    b_pixel += o_y[None, :] * b_line[:, None] + o_x[None, :]  # [BLOCK_T, BLOCK_E]
    o_token = o_t[:, None] * ROW + o_e[None, :]
    m = m_t[:, None] & (o_e < ROW)[None, :]
    if INVERSE:
        tl.store(out_ptr + b_pixel, tl.load(x_ptr + o_token, mask=m), mask=m)
    else:
        tl.store(out_ptr + o_token, tl.load(x_ptr + b_pixel, mask=m), mask=m)


@triton.jit
def _count_below(values_ptr, count, steps, b_x):
    """How many of the non-decreasing values are at most b_x: [BLOCK_T]."""
    b_low = b_x * 0
    b_high = b_low + count
    for _ in range(0, steps):
        b_middle = (b_low + b_high) // 2
        m_open = b_low < b_high
        m_right = m_open & (tl.load(values_ptr + b_middle, mask=m_open, other=0) <= b_x)
        b_low = tl.where(m_right, b_middle + 1, b_low)
        b_high = tl.where(m_right, b_high, b_middle)
    return b_low


@triton.jit
def _mrope_fwd_kernel(
    cu_seqlens_ptr,  # [S+1] int64
    starts_ptr,  # [N] int64
    extent_ptr,  # [N, 3] int64
    gained_ptr,  # [N+1] int64
    out_ptr,  # [3, T] int64
    tokens,
    boundaries,
    spans,
    boundary_steps,
    span_steps,
    BLOCK_T: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_segment = _count_below(cu_seqlens_ptr, boundaries, boundary_steps, o_t) - 1  # [BLOCK_T]
    b_begin = tl.load(cu_seqlens_ptr + b_segment, mask=m_t, other=0)
    b_before = tl.load(gained_ptr + _count_below(starts_ptr, spans, span_steps, b_begin - 1), mask=m_t, other=0)
    b_n = _count_below(starts_ptr, spans, span_steps, o_t)  # number of spans that begin at or before the token
    m_n = m_t & (b_n > 0)
    b_gained = tl.load(gained_ptr + b_n, mask=m_t, other=0)
    b_inside = o_t - tl.load(starts_ptr + b_n - 1, mask=m_n, other=0)
    b_t = tl.load(extent_ptr + 3 * b_n - 3, mask=m_n, other=0)
    b_h = tl.load(extent_ptr + 3 * b_n - 2, mask=m_n, other=1)
    b_w = tl.load(extent_ptr + 3 * b_n - 1, mask=m_n, other=1)
    m_media = m_n & (b_inside < b_t * b_h * b_w)
    b_first = tl.load(gained_ptr + b_n - 1, mask=m_n, other=0)
    b_base = o_t - b_begin - b_before + tl.where(m_media, b_first - b_inside, b_gained)
    p_out = out_ptr + o_t
    stride = o_t * 0 + tokens  # int64, whatever the type of `tokens`
    tl.store(p_out, b_base + tl.where(m_media, b_inside // (b_h * b_w), 0), mask=m_t)
    tl.store(p_out + stride, b_base + tl.where(m_media, b_inside // b_w % b_h, 0), mask=m_t)
    tl.store(p_out + 2 * stride, b_base + tl.where(m_media, b_inside % b_w, 0), mask=m_t)


def row_tile(width: int, most_features: int = 512) -> tuple[int, int]:
    """(rows, features) of a tile of about _TILE elements for rows of `width` features."""
    features = min(triton.next_power_of_2(width), most_features)
    return max(1, min(128, _TILE // features)), features


def with_columns(x: Tensor) -> Tensor:
    """x [R, E] with contiguous columns and any row stride; copied when its columns are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def gather(sources: Sources, index: Tensor) -> Tensor:
    """Sources [R_i, E], index [T] int64 -> [T, E]."""
    index = index.contiguous()
    given = [with_columns(source) for source in sources.given()]
    first, tokens, width = given[0], index.shape[0], given[0].shape[1]
    out = first.new_empty(tokens, width)
    if out.numel() == 0:
        return out
    block_t, block_e = row_tile(width)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(width, block_e))
    absent = len(sources) - len(given)
    every = given + given[:1] * absent
    ends = list(itertools.accumulate([source.shape[0] for source in given] + [0] * absent))
    strides = [source.stride(0) for source in every]
    _gather_fwd_kernel[grid](
        *every, index, out, tokens, width, *ends, *strides, SOURCES=len(given), BLOCK_T=block_t, BLOCK_E=block_e
    )
    return out


def segment_pool(x: Tensor, cu_seqlens: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    x, cu_seqlens = with_columns(x), cu_seqlens.contiguous()
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty(segments, width)
    argmax = x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)
    if out.numel() == 0:
        return out, argmax
    _pool(x, cu_seqlens, None, mode, out, argmax)
    return out, argmax


def weighted_pool(x: Tensor, weights: Tensor, cu_seqlens: Tensor) -> Tensor:
    """x [T, E], weights [T] float32 -> [S, E]."""
    x, cu_seqlens = with_columns(x), cu_seqlens.contiguous()
    out = x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1])
    if out.numel() > 0:
        _pool(x, cu_seqlens, weights.contiguous(), "weighted", out, cu_seqlens)
    return out


def _pool(
    x: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor | None,
    mode: str,
    out: Tensor,
    argmax: Tensor,
) -> None:
    """Launch; pointers that the mode does not read are dummies."""
    segments, width = out.shape
    # Few features per program: there are few segments, so feature blocks must fill the device.
    block_t, block_e = row_tile(width, most_features=128)
    grid = (segments, triton.cdiv(width, block_e))
    weights = x if weights is None else weights
    _segment_pool_fwd_kernel[grid](
        x, cu_seqlens, weights, out, argmax, width, x.stride(0), MODE=mode, BLOCK_T=block_t, BLOCK_E=block_e
    )


def patchify(x: Tensor, grid_thw: Tensor, size: PatchSize, inverse: bool) -> Tensor:
    """Pixels [P] -> tokens [T, C temporal patch^2], or back."""
    x, row = x.contiguous(), size.row
    out = x.new_empty(x.numel()) if inverse else x.new_empty(x.numel() // row, row)
    if out.numel() == 0:
        return out
    grid_thw, starts = token_grid(grid_thw)
    tokens = x.numel() // row
    image = torch.searchsorted(starts, torch.arange(tokens, device=x.device), right=True) - 1
    block_t, block_e = row_tile(row)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(row, block_e))
    sizes = {"CHANNELS": size.channels, "PATCH": size.patch, "TEMPORAL": size.temporal, "MERGE": size.merge}
    tile = {"BLOCK_T": block_t, "BLOCK_E": block_e}
    _patchify_fwd_kernel[grid](x, grid_thw, starts, image, out, tokens, INVERSE=inverse, **sizes, **tile)
    return out


def patchify_images(images: list[Tensor], grid_thw: Tensor, size: PatchSize) -> Tensor:
    """Images -> tokens [T, C temporal patch^2]."""
    pixels = torch.cat([image.flatten() for image in images])
    return patchify(pixels, grid_thw, size, False)


def mrope(cu_seqlens: Tensor, spans: Spans, total: int) -> Tensor:
    """cu_seqlens [S+1] int64 -> [3, T] int64."""
    assert spans.time_step is None
    out = cu_seqlens.new_empty(3, total)
    if total > 0:
        inputs = [tensor.contiguous() for tensor in (cu_seqlens, spans.starts, spans.extent, spans.gained)]
        counts = (cu_seqlens.shape[0], spans.starts.shape[0])
        steps = [count.bit_length() for count in counts]
        _mrope_fwd_kernel[(triton.cdiv(total, _TOKENS),)](*inputs, out, total, *counts, *steps, BLOCK_T=_TOKENS)
    return out
