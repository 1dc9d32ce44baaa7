"""Softmax-weighted negatives and streaming top-k: tile-engine epilogues that keep a few keys per row.

A program takes one row tile of X against the tiles of its share of Y and writes each row's result separately per share;
a few O(N) reductions merge the shares.

Top-k keeps K keys of a row in registers, unordered: as long as the best of a tile beats the smallest key kept, it
replaces that key. A key is 64 bits, the similarity (as an order-preserving integer) in the high half and the index in
the low half, so keys are unique and ties go to the lower index. More than K keys take several passes, each limited to
keys below the previous pass's smallest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.contrastive.triton_tile import (
    NUM_STAGES,
    NUM_WARPS,
    SMALL_TILE,
    depth_block,
    grid_of,
    kernel_pairs,
    log1p_of_unit,
    rows_of,
    similarity,
)
from mmkernels.ops.contrastive.types import Pairs

__all__ = ["sample_negatives", "topk_similar", "topk_tile"]

# Keys kept per pass: the smallest sufficient size, otherwise the largest.
KEPT = (16, 128)
NO_KEY = tl.constexpr(-(2**63))
LOW_BITS = tl.constexpr(0x7FFFFFFF)


# Softmax-weighted negatives


@triton.jit
def _mixed(x):
    """A 32-bit integer hash (uint32); every output bit depends on every input bit."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _exponential(bits):
    """-log(1 - u) for u = (bits + 1/2) / 2^32, accurate for small u too, which give the highest scores."""
    u = (bits.to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    rest = ((bits ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * (1.0 / 4294967296.0)
    return tl.where(u < 0.5, -log1p_of_unit(-tl.minimum(u, 0.5)), -tl.log(rest))


@triton.jit(do_not_specialize=["has_ids"])
def _sample_fwd_kernel(
    x_ptr, y_ptr, scale_ptr, seed_ptr,  # [N, E], [M, E], [], [2] int64
    target_ptr, row_id_ptr, column_id_ptr,  # [N], [N], [M]
    best_ptr, index_ptr,  # [splits, N] float32, int64: a row's highest score and its key, -1 for none
    n, m, e, stride_x, stride_y, split_size, has_ids,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    o_i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = o_i < n
    scale = tl.load(scale_ptr)
    by_row = _mixed(o_i.to(tl.uint32) ^ tl.load(seed_ptr).to(tl.uint32))  # [BLOCK_M]
    seed = tl.load(seed_ptr + 1).to(tl.uint32)
    target = tl.load(target_ptr + o_i, mask=m_i, other=-1).to(tl.int32)
    row_id = tl.load(row_id_ptr + o_i, mask=m_i & (has_ids != 0), other=0)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    index = tl.full((BLOCK_M,), -1, tl.int32)
    for j0 in range(part * split_size, tl.minimum((part + 1) * split_size, m), BLOCK_N):
        o_j = j0 + tl.arange(0, BLOCK_N)
        m_j = o_j < m
        column_id = tl.load(column_id_ptr + o_j, mask=m_j & (has_ids != 0), other=0)
        b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
        b_bits = _mixed(_mixed(o_j.to(tl.uint32)[None, :] ^ by_row[:, None]) ^ seed)
        b_score = b_s * scale - tl.log(_exponential(b_bits))  # [BLOCK_M, BLOCK_N]
        m_positive = (o_j[None, :] == target[:, None]) | ((row_id[:, None] == column_id[None, :]) & (has_ids != 0))
        b_score = tl.where(m_j[None, :] & ~m_positive, b_score, float("-inf"))
        of_tile = tl.max(b_score, 1)
        at = tl.min(tl.where(b_score == of_tile[:, None], o_j[None, :], LOW_BITS), 1)
        index = tl.where(of_tile > best, at, index)
        best = tl.maximum(best, of_tile)
    tl.store(best_ptr + part.to(tl.int64) * n + o_i, best, mask=m_i)
    tl.store(index_ptr + part.to(tl.int64) * n + o_i, index.to(tl.int64), mask=m_i)


def sample_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    seed: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[N] int64: a negative drawn with its softmax probability among the negatives; -1 if there is none."""
    x, y = rows_of(queries), rows_of(keys)
    (n, e), m = x.shape, y.shape[0]
    if n == 0 or m == 0:
        return torch.full((n,), -1, dtype=torch.int64, device=x.device)
    of_pairs = kernel_pairs(x, pairs._replace(same_id="ignore"))
    _, splits, split_size = grid_of(n, m, SMALL_TILE, x.device)
    best = x.new_empty(splits, n, dtype=torch.float32)
    index = x.new_empty(splits, n, dtype=torch.int64)
    _sample_fwd_kernel[(triton.cdiv(n, SMALL_TILE["BLOCK_M"]), splits)](
        x, y, logit_scale, seed, of_pairs.target, of_pairs.row_ids, of_pairs.column_ids, best, index, n, m, e,
        x.stride(0), y.stride(0), split_size, int(of_pairs.ignore), **SMALL_TILE, BLOCK_E=depth_block(x.dtype),
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip
    return torch.where(best == best.amax(0), index, m).amin(0)


# Top-k


def topk_tile(dtype: torch.dtype, kept: int) -> dict[str, int]:
    """Smaller for float32, whose three tf32 products need registers."""
    small = dtype == torch.float32 and kept == KEPT[-1]
    return {"BLOCK_M": 32 if small else 64, "BLOCK_N": 64, "BLOCK_E": depth_block(dtype)}


@triton.jit
def _topk_fwd_kernel(
    x_ptr, y_ptr,  # [N, E], [M, E]
    ceiling_ptr, key_ptr,  # [N], [N, splits, K] int64: the largest keys below the ceiling, unordered
    n, m, e, stride_x, stride_y, split_size,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    part, splits = tl.program_id(1), tl.num_programs(1)
    o_i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, K)
    m_i = o_i < n
    ceiling = tl.load(ceiling_ptr + o_i, mask=m_i, other=NO_KEY)  # [BLOCK_M]
    kept = tl.full((BLOCK_M, K), NO_KEY, tl.int64)
    least = tl.full((BLOCK_M,), NO_KEY, tl.int64)
    for j0 in range(part * split_size, tl.minimum((part + 1) * split_size, m), BLOCK_N):
        o_j = j0 + tl.arange(0, BLOCK_N)
        m_j = o_j < m
        b_s = similarity(x_ptr, y_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
        b_s = tl.where(b_s == b_s, b_s, float("-inf")) + 0.0  # no -0
        b_bits = b_s.to(tl.int32, bitcast=True)
        b_bits = b_bits ^ ((b_bits >> 31) & LOW_BITS)
        b_key = (b_bits.to(tl.int64) << 32) | (o_j ^ LOW_BITS).to(tl.int64)[None, :]  # [BLOCK_M, BLOCK_N]
        b_key = tl.where(m_j[None, :] & (b_key < ceiling[:, None]), b_key, NO_KEY)
        highest = tl.max(b_key, 1)
        while tl.max((highest > least).to(tl.int32), 0) != 0:
            slot = tl.min(tl.where(kept == least[:, None], o_k[None, :], K), 1)
            enters = (o_k[None, :] == slot[:, None]) & (highest > least)[:, None]
            kept = tl.where(enters, highest[:, None], kept)
            b_key = tl.where(b_key == highest[:, None], NO_KEY, b_key)
            least, highest = tl.min(kept, 1), tl.max(b_key, 1)
    o_key = (o_i.to(tl.int64) * splits + part)[:, None] * K + o_k[None, :]
    tl.store(key_ptr + o_key, kept, mask=m_i[:, None])


def topk_similar(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values [N, k], indices [N, k] int64: the most similar keys first, ties by lower index."""
    x, y = rows_of(queries), rows_of(keys)
    (n, e), m = x.shape, y.shape[0]
    if n == 0:
        return x.new_empty(0, k, dtype=torch.float32), x.new_empty(0, k, dtype=torch.int64)
    kept = next((size for size in KEPT if size >= k), KEPT[-1])
    tile = topk_tile(x.dtype, kept)
    _, splits, split_size = grid_of(n, m, tile, x.device)
    ceiling = torch.full((n,), 2**63 - 1, dtype=torch.int64, device=x.device)
    passes = []
    for done in range(0, k, kept):
        found = x.new_empty(n, splits, kept, dtype=torch.int64)
        _topk_fwd_kernel[(triton.cdiv(n, tile["BLOCK_M"]), splits)](
            x, y, ceiling, found, n, m, e, x.stride(0), y.stride(0), split_size, K=kept, **tile,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        passes.append(found.flatten(1).sort(dim=1, descending=True).values[:, : min(kept, k - done)])
        ceiling = passes[-1][:, -1].contiguous()
    best = torch.cat(passes, 1)
    bits = (best >> 32).int()
    values = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values, 0x7FFFFFFF - (best & 0x7FFFFFFF)
