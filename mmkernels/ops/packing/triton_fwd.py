"""Forward kernels of packing: gather of rows, pooling of segments.

gather        a program owns a tile of packed rows and features; reads are rows of the source, contiguous in features
segment_pool  a program owns one segment and a block of features, and walks the segment's rows in tiles, accumulating in
              float32; no atomics, so the result is bitwise reproducible
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from mmkernels.ops._tl import cast

if TYPE_CHECKING:
    from mmkernels.testing.aot import TritonCase

# Elements of a tile: 32 per thread with four warps.
_TILE = 4096
_NO_ROW = tl.constexpr(2147483647)


@triton.jit
def _gather_fwd_kernel(
    source_ptr,  # [R, E]
    index_ptr,  # [T] int64, -1 for a row of zeros
    out_ptr,  # [T, E]
    tokens,
    width,
    source_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_t = o_t < tokens
    m_e = o_e < width
    b_index = tl.load(index_ptr + o_t, mask=m_t, other=-1)  # [BLOCK_T]
    p_source = source_ptr + b_index[:, None] * source_stride + o_e[None, :]
    b_rows = tl.load(p_source, mask=(b_index >= 0)[:, None] & m_e[None, :], other=0.0)  # [BLOCK_T, BLOCK_E]
    tl.store(out_ptr + o_t[:, None] * width + o_e[None, :], b_rows, mask=m_t[:, None] & m_e[None, :])


@triton.jit
def _segment_pool_fwd_kernel(
    x_ptr,  # [T, E]
    cu_seqlens_ptr,  # [S+1] int32
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
            # A NaN wins over every number: it counts as a row of its own kind, found apart from the maximum.
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
            b_sum += tl.sum(tl.load(p_x, mask=m, other=0.0).to(tl.float32), 0)
        if MODE == "mean":
            b_sum = b_sum / tl.maximum(end - begin, 1).to(tl.float32)
        tl.store(out_ptr + o_out, cast(b_sum, out_ptr.dtype.element_ty), mask=m_e)


def row_tile(width: int, most_features: int = 512) -> tuple[int, int]:
    """(rows, features) of a tile of about _TILE elements for rows of `width` features."""
    features = min(triton.next_power_of_2(width), most_features)
    return max(1, min(128, _TILE // features)), features


def on_device(x: torch.Tensor) -> torch.cuda.device:
    """Makes x's GPU the current one for a launch; does nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(x.device if x.device.type == "cuda" else -1)


def with_columns(x: torch.Tensor) -> torch.Tensor:
    """x [R, E] with contiguous columns and any row stride; copied when its columns are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def gather(source: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """source [R, E], index [T] int64 -> [T, E]."""
    source, index = with_columns(source), index.contiguous()
    tokens, width = index.shape[0], source.shape[1]
    out = source.new_empty(tokens, width)
    if out.numel() == 0:
        return out
    block_t, block_e = row_tile(width)
    grid = (triton.cdiv(tokens, block_t), triton.cdiv(width, block_e))
    with on_device(source):
        _gather_fwd_kernel[grid](source, index, out, tokens, width, source.stride(0), BLOCK_T=block_t, BLOCK_E=block_e)
    return out


def segment_pool(x: torch.Tensor, cu_seqlens: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, E] -> (out [S, E], argmax [S, E] int32 for "max", else [0, E])."""
    x, cu_seqlens = with_columns(x), cu_seqlens.contiguous()
    segments, width = cu_seqlens.shape[0] - 1, x.shape[1]
    out = x.new_empty(segments, width)
    argmax = x.new_empty(segments if mode == "max" else 0, width, dtype=torch.int32)
    if out.numel() == 0:
        return out, argmax
    # Few features per program: segments are few, and their blocks of features must fill the device.
    block_t, block_e = row_tile(width, most_features=128)
    grid = (segments, triton.cdiv(width, block_e))
    with on_device(x):
        _segment_pool_fwd_kernel[grid](
            x, cu_seqlens, out, argmax, width, x.stride(0), MODE=mode, BLOCK_T=block_t, BLOCK_E=block_e
        )
    return out, argmax


def aot_cases() -> list[TritonCase]:
    """Every kernel as it is launched for rows of 1024 features; fp16 differs from bf16 in conversions only."""
    from mmkernels.testing.aot import TritonCase

    cases = []
    tile: dict[str, object]
    for dtype in ("bf16", "fp32"):
        tokens = {"tokens": "i32", "width": "i32:16", "source_stride": "i32:16"}
        pointers = {"source_ptr": f"*{dtype}", "index_ptr": "*i64", "out_ptr": f"*{dtype}"}
        block_t, block_e = row_tile(1024)
        tile = {"BLOCK_T": block_t, "BLOCK_E": block_e}
        cases.append(TritonCase(f"gather_fwd[{dtype}]", _gather_fwd_kernel, pointers | tokens, tile))
        pointers = {"x_ptr": f"*{dtype}", "cu_seqlens_ptr": "*i32", "out_ptr": f"*{dtype}", "argmax_ptr": "*i32"}
        sizes = {"width": "i32:16", "x_stride": "i32:16"}
        block_t, block_e = row_tile(1024, most_features=128)
        for mode in ("sum", "mean", "max", "first"):
            tile = {"MODE": mode, "BLOCK_T": block_t, "BLOCK_E": block_e}
            name = f"segment_pool_fwd[{dtype}-{mode}]"
            cases.append(TritonCase(name, _segment_pool_fwd_kernel, pointers | sizes, tile))
    return cases
