"""Forward of the contrastive losses.

A program takes row tiles of X (BLOCK_M queries) one after the other, each against the tiles of its share of Y:

    S = X Yᵀ        [BLOCK_M, BLOCK_N] in registers, float32, over chunks of E; logits = scale · S

InfoNCE: from the same tile come the online softmax statistics of its rows, which stay in registers until the row tile
is done, and of its columns, which the program merges into its own slice of a [groups, 3, M] buffer: the maximum m,
sum e^(l-m), and sum e^(l-m) · (S - the pair's S), whose quotient by the second is the derivative by the scale (the
pair's is taken off first, so that nothing cancels when the pair has nearly all of the mass). Programs share no slice,
so there are no atomics and the bits do not depend on timing; a small kernel merges the slices. Kernels run without FP
fusion: a logit is rounded once, the same way in forward and backward, so that differences from it are exact. An lse
goes to the backward as float64. The pairs' similarities, the largest in a row that has been learnt, come from a
kernel of their own that adds in many short sums; they replace the diagonal of S in forward and backward alike.

SigLIP: each program leaves three sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._tl import dot, generation

__all__ = ["aot_cases", "infonce_fwd", "siglip_fwd"]

# The epilogues hold three or four tiles of float32 at once: 32 elements of each in each of 256 threads. On sm_100 they
# do not fit into the registers at that size.
TILE = {"BLOCK_M": 128, "BLOCK_N": 64}
SMALL_TILE = {"BLOCK_M": 64, "BLOCK_N": 64}
NUM_WARPS, NUM_STAGES = 8, 3
MERGE_BLOCK = 128
PAIRS_BLOCK = {"BLOCK": 16, "BLOCK_E": 128}


def depth_block(dtype: torch.dtype) -> int:
    """BLOCK_E: 128 bytes of a row."""
    return 32 if dtype == torch.float32 else 64


@triton.jit
def _pairs_kernel(
    x_ptr, y_ptr, pair_ptr,  # [N, E], [N, E], [N]: the similarity of each pair
    n, e, stride_x, stride_y,
    BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E)
    m_i = o_i < n
    b_sum = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    for e0 in range(0, e, BLOCK_E):
        mask = m_i[:, None] & (o_e < e - e0)[None, :]
        b_x = tl.load(x_ptr + o_i[:, None] * stride_x + e0 + o_e[None, :], mask=mask, other=0.0)
        b_y = tl.load(y_ptr + o_i[:, None] * stride_y + e0 + o_e[None, :], mask=mask, other=0.0)
        b_sum += b_x.to(tl.float32) * b_y.to(tl.float32)  # [BLOCK, BLOCK_E]
    tl.store(pair_ptr + o_i, tl.sum(b_sum, 1), mask=m_i)


@triton.jit
def similarity(
    x_ptr, y_ptr, pair_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows o_i of X times rows o_j of Y, zero where either does not exist: [BLOCK_M, BLOCK_N] float32.

    A pair's entry is the one of `_pairs_kernel`.
    """
    o_e = tl.arange(0, BLOCK_E)
    x_ptrs = x_ptr + o_i.to(tl.int64)[:, None] * stride_x + o_e[None, :]
    y_ptrs = y_ptr + o_j.to(tl.int64)[None, :] * stride_y + o_e[:, None]
    s = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for e0 in range(0, e, BLOCK_E):
        m_e = o_e < e - e0
        b_x = tl.load(x_ptrs + e0, mask=m_i[:, None] & m_e[None, :], other=0.0)  # [BLOCK_M, BLOCK_E]
        b_y = tl.load(y_ptrs + e0, mask=m_j[None, :] & m_e[:, None], other=0.0)  # [BLOCK_E, BLOCK_N]
        s += dot(b_x, b_y)
    pair = tl.load(pair_ptr + o_i, mask=m_i, other=0.0)  # [BLOCK_M]
    return tl.where((o_i[:, None] == o_j[None, :]) & m_i[:, None], pair[:, None], s)


@triton.jit
def log1p_of_unit(e):
    """log(1 + e) for e in [0, 1] as 2 atanh(e / (2 + e)): relative error below 1e-7 however small e is."""
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


# InfoNCE


@triton.jit
def _infonce_fwd_kernel(
    x_ptr, y_ptr, pair_ptr, scale_ptr,  # [N, E], [M, E], [N], []
    row_ptr, column_ptr,  # [splits, 3, N], [groups, 3, M]
    n, m, e, stride_x, stride_y, split_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    group, split = tl.program_id(0), tl.program_id(1)
    scale = tl.load(scale_ptr)
    row_ptr += split.to(tl.int64) * 3 * n
    column_ptr += group.to(tl.int64) * 3 * m
    row_tiles = tl.cdiv(n, BLOCK_M)
    for tile in range(group, row_tiles, tl.num_programs(0)):
        # What this program's other threads wrote to its column slice must have arrived.
        tl.debug_barrier()
        o_i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        m_i = o_i < n
        row_pair = tl.load(pair_ptr + o_i, mask=m_i, other=0.0)  # [BLOCK_M]
        row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        row_dot = tl.zeros((BLOCK_M,), tl.float32)
        for j0 in range(split * split_size, tl.minimum((split + 1) * split_size, m), BLOCK_N):
            o_j = j0 + tl.arange(0, BLOCK_N)
            m_j = o_j < m
            b_s = similarity(
                x_ptr, y_ptr, pair_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E
            )
            b_l = tl.where(m_i[:, None] & m_j[None, :], b_s * scale, float("-inf"))  # [BLOCK_M, BLOCK_N]

            new_max = tl.maximum(row_max, tl.max(b_l, 1))
            before = tl.exp(row_max - new_max)
            b_p = tl.exp(b_l - new_max[:, None])  # [BLOCK_M, BLOCK_N]
            row_sum = row_sum * before + tl.sum(b_p, 1)
            row_dot = row_dot * before + tl.sum(b_p * (b_s - row_pair[:, None]), 1)
            row_max = new_max

            m_old = m_j & (tile != group)
            old_max = tl.load(column_ptr + o_j, mask=m_old, other=float("-inf"))  # [BLOCK_N]
            old_sum = tl.load(column_ptr + m + o_j, mask=m_old, other=0.0)
            old_dot = tl.load(column_ptr + 2 * m + o_j, mask=m_old, other=0.0)
            column_pair = tl.load(pair_ptr + o_j, mask=m_j, other=0.0)
            column_max = tl.maximum(old_max, tl.max(b_l, 0))
            before = tl.exp(old_max - column_max)
            b_p = tl.exp(b_l - column_max[None, :])
            tl.store(column_ptr + o_j, column_max, mask=m_j)
            tl.store(column_ptr + m + o_j, old_sum * before + tl.sum(b_p, 0), mask=m_j)
            tl.store(
                column_ptr + 2 * m + o_j, old_dot * before + tl.sum(b_p * (b_s - column_pair[None, :]), 0), mask=m_j
            )
        tl.store(row_ptr + o_i, row_max, mask=m_i)
        tl.store(row_ptr + n + o_i, row_sum, mask=m_i)
        tl.store(row_ptr + 2 * n + o_i, row_dot, mask=m_i)


@triton.jit
def _infonce_merge_kernel(
    part_ptr, pair_ptr, scale_ptr,  # [parts, 3, N], [N], []
    lse_ptr, loss_ptr, slope_ptr,  # [N] each: lse (float64), loss, d loss / d scale of a row
    n, parts,
    BLOCK: tl.constexpr,
):  # fmt: skip
    o_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    expected = tl.zeros((BLOCK,), tl.float32)
    ptr = part_ptr + o_i
    for _ in range(parts):
        b_max = tl.load(ptr, mask=m_i, other=0.0)  # [BLOCK]
        new_max = tl.maximum(highest, b_max)
        before, weight = tl.exp(highest - new_max), tl.exp(b_max - new_max)
        total = total * before + tl.load(ptr + n, mask=m_i, other=1.0) * weight
        expected = expected * before + tl.load(ptr + 2 * n, mask=m_i, other=0.0) * weight
        highest = new_max
        ptr += 3 * n
    logit = tl.load(pair_ptr + o_i, mask=m_i, other=0.0) * tl.load(scale_ptr)
    log_total = tl.log(total)
    tl.store(lse_ptr + o_i, highest.to(tl.float64) + log_total.to(tl.float64), mask=m_i)
    tl.store(loss_ptr + o_i, (highest - logit) + log_total, mask=m_i)
    tl.store(slope_ptr + o_i, expected / total, mask=m_i)


def rows_of(features: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; other layouts are copied."""
    return features if features.stride(-1) == 1 or features.shape[-1] <= 1 else features.contiguous()


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """[N] float32: the similarity of each pair."""
    n, e = x.shape
    pair = x.new_empty(n, dtype=torch.float32)
    grid = (triton.cdiv(n, PAIRS_BLOCK["BLOCK"]),)
    _pairs_kernel[grid](x, y, pair, n, e, x.stride(0), y.stride(0), **PAIRS_BLOCK, num_warps=4)
    return pair


def _processors(device: torch.device) -> int:
    # Two in the interpreter, so that its tests meet groups of several row tiles.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _tile(major: int) -> dict[str, int]:
    return SMALL_TILE if major >= 10 else TILE


def _grid(n: int, m: int, tile: dict[str, int], device: torch.device) -> tuple[int, int, int]:
    """Groups of row tiles, splits of the columns, columns per split: about one program for each multiprocessor."""
    row_tiles, column_tiles = triton.cdiv(n, tile["BLOCK_M"]), triton.cdiv(m, tile["BLOCK_N"])
    processors = _processors(device)
    groups = min(row_tiles, processors)
    tiles_per_split = triton.cdiv(column_tiles, max(processors // groups, 1))
    return groups, triton.cdiv(column_tiles, tiles_per_split), tiles_per_split * tile["BLOCK_N"]


def infonce_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], lse_q [N] and lse_k [N] in float64, d loss / d logit_scale []."""
    x, y = rows_of(queries), rows_of(keys)
    (n, e), m = x.shape, y.shape[0]
    lse = x.new_empty(2, n, dtype=torch.float64)
    if n == 0:
        zero = x.new_zeros((), dtype=torch.float32)
        return zero, lse[0].clone(), lse[1].clone(), zero.clone()
    pair = pairs(x, y)
    tile = _tile(generation(x.device))
    groups, splits, split_size = _grid(n, m, tile, x.device)
    of_rows = x.new_empty(splits, 3, n, dtype=torch.float32)
    of_columns = x.new_empty(groups, 3, m, dtype=torch.float32)
    _infonce_fwd_kernel[(groups, splits)](
        x, y, pair, logit_scale, of_rows, of_columns, n, m, e, x.stride(0), y.stride(0), split_size,
        **tile, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=False,
    )  # fmt: skip
    loss, slope = x.new_empty(2, n, dtype=torch.float32), x.new_empty(2, n, dtype=torch.float32)
    for direction, parts in enumerate((of_rows, of_columns)):
        _infonce_merge_kernel[(triton.cdiv(n, MERGE_BLOCK),)](
            parts, pair, logit_scale, lse[direction], loss[direction], slope[direction], n, parts.shape[0],
            BLOCK=MERGE_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    mean_loss, mean_slope = (total.sum(dtype=torch.float64).div(2 * n).float() for total in (loss, slope))
    return mean_loss, lse[0].clone(), lse[1].clone(), mean_slope


# SigLIP


@triton.jit
def _siglip_fwd_kernel(
    x_ptr, y_ptr, pair_ptr, scale_ptr, bias_ptr,  # [N, E], [M, E], [N], [], []
    sums_ptr,  # [row tiles, splits, 3]: loss, d loss / d scale, d loss / d bias, times N
    n, m, e, stride_x, stride_y, split_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    scale, bias = tl.load(scale_ptr), tl.load(bias_ptr)
    o_i = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_i = o_i < n
    loss = tl.zeros((BLOCK_M,), tl.float32)
    by_scale = tl.zeros((BLOCK_M,), tl.float32)
    by_bias = tl.zeros((BLOCK_M,), tl.float32)
    for j0 in range(split * split_size, tl.minimum((split + 1) * split_size, m), BLOCK_N):
        o_j = j0 + tl.arange(0, BLOCK_N)
        m_j = o_j < m
        b_s = similarity(x_ptr, y_ptr, pair_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
        b_sign = tl.where(o_i[:, None] == o_j[None, :], -1.0, 1.0)  # [BLOCK_M, BLOCK_N]
        b_z = b_sign * (b_s * scale + bias)
        b_e = tl.exp(-tl.abs(b_z))
        m_ij = m_i[:, None] & m_j[None, :]
        loss += tl.sum(tl.where(m_ij, tl.maximum(b_z, 0.0) + log1p_of_unit(b_e), 0.0), 1)
        b_g = tl.where(m_ij, b_sign * sigmoid_of_sign(b_z, b_e), 0.0)
        by_scale += tl.sum(b_g * b_s, 1)
        by_bias += tl.sum(b_g, 1)
    sums_ptr += (tile * tl.num_programs(1) + split) * 3
    tl.store(sums_ptr, tl.sum(loss, 0))
    tl.store(sums_ptr + 1, tl.sum(by_scale, 0))
    tl.store(sums_ptr + 2, tl.sum(by_bias, 0))


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    x, y = rows_of(queries), rows_of(keys)
    (n, e), m = x.shape, y.shape[0]
    tile = _tile(generation(x.device))
    row_tiles = triton.cdiv(n, tile["BLOCK_M"])
    _, splits, split_size = _grid(max(n, 1), max(m, 1), tile, x.device)
    sums = x.new_empty(row_tiles, splits, 3, dtype=torch.float32)
    if n > 0:
        _siglip_fwd_kernel[(row_tiles, splits)](
            x, y, pairs(x, y), logit_scale, logit_bias, sums, n, m, e, x.stride(0), y.stride(0), split_size,
            **tile, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES, enable_fp_fusion=False,
        )  # fmt: skip
    loss, by_scale, by_bias = sums.sum((0, 1), dtype=torch.float64).div(max(n, 1)).float().unbind()
    return loss.clone(), by_scale.clone(), by_bias.clone()


# Compiled ahead of time


TRITON_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def aot_cases() -> list:
    """Every configuration the launchers above use."""
    from mmkernels.testing.aot import TritonCase

    sizes = dict.fromkeys(("n", "m"), "i32") | dict.fromkeys(("e", "stride_x", "stride_y", "split_size"), "i32:16")
    cases = []
    for dtype, name in TRITON_TYPES.items():
        features = {"x_ptr": f"*{name}", "y_ptr": f"*{name}", "pair_ptr": "*fp32", "scale_ptr": "*fp32"}
        launch: dict[str, Any] = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, "tensor_cores": True}
        for tile, archs in ((TILE, (80, 90)), (SMALL_TILE, (100,))):
            constexprs = {**tile, "BLOCK_E": depth_block(dtype)}
            label = f"[{name},{tile['BLOCK_M']}x{tile['BLOCK_N']}]"
            for what, kernel, more in (
                ("infonce", _infonce_fwd_kernel, {"row_ptr": "*fp32", "column_ptr": "*fp32"}),
                ("siglip", _siglip_fwd_kernel, {"bias_ptr": "*fp32", "sums_ptr": "*fp32"}),
            ):
                signature = features | more | sizes
                exact = {"archs": archs, "options": {"enable_fp_fusion": False}, **launch}
                cases.append(TritonCase(f"{what}_fwd{label}", kernel, signature, constexprs, **exact))
        signature = {"x_ptr": f"*{name}", "y_ptr": f"*{name}", "pair_ptr": "*fp32", "n": "i32"}
        signature |= dict.fromkeys(("e", "stride_x", "stride_y"), "i32:16")
        cases.append(TritonCase(f"pairs[{name}]", _pairs_kernel, signature, PAIRS_BLOCK))
    pointers = ("part_ptr", "pair_ptr", "scale_ptr", "loss_ptr", "slope_ptr")
    signature = dict.fromkeys(pointers, "*fp32") | {"lse_ptr": "*fp64", "n": "i32", "parts": "i32"}
    return [*cases, TritonCase("infonce_merge", _infonce_merge_kernel, signature, {"BLOCK": MERGE_BLOCK})]
