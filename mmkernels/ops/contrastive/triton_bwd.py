"""Backward of the contrastive losses: feature gradients.

With G = d loss / d logits up to a constant factor, dX = factor · G Y and dY = factor · Gᵀ X. Superblock by superblock,
small enough for its G to stay in L2, two kinds of kernel take turns:

    gradient     recomputes a tile of S = X Yᵀ and writes that tile of G in the features' type, the positives' p - 1
                 taken in float32 before it is rounded
    accumulate   a product with float32 sums: rows of dX += G Y, rows of dY += Gᵀ X; the last one of a row scales and
                 rounds to the features' type

Nothing is added atomically, so the bits do not depend on timing. Together with the forward: four products for InfoNCE.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._tl import cast, dot, generation

from .triton_fwd import NUM_STAGES, NUM_WARPS, TRITON_TYPES, depth_block, pairs, rows_of, sigmoid_of_sign, similarity

__all__ = ["aot_cases", "infonce_bwd", "siglip_bwd"]

TILE = {"BLOCK_M": 128, "BLOCK_N": 128}

# Rows and columns of the superblock of G: 32 MB in a 16-bit type.
SUPERBLOCK = 4096

# |G| <= 2 and its small entries matter: in float16 they would be subnormal, so G is stored times 2^14.
GRADIENT_UNIT = {torch.float32: 1.0, torch.bfloat16: 1.0, torch.float16: 2.0**14}


def _gradient_tile(dtype: torch.dtype, major: int) -> dict[str, int]:
    # Three tf32 products for each float32 one need the room; so does sm_100.
    return {"BLOCK_M": 128, "BLOCK_N": 64} if dtype == torch.float32 or major >= 10 else TILE


@triton.jit
def _infonce_gradient_kernel(
    x_ptr, y_ptr, pair_ptr, scale_ptr, lse_q_ptr, lse_k_ptr,  # [N, E], [M, E], [N], [], [N], [M]
    g_ptr,  # [rows, cols] of the superblock at (row0, column0)
    row0, column0, rows, cols, e, stride_x, stride_y, stride_g, unit,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_r < rows, o_c < cols
    o_i, o_j = row0 + o_r, column0 + o_c
    b_s = similarity(x_ptr, y_ptr, pair_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
    b_l = b_s * tl.load(scale_ptr)  # [BLOCK_M, BLOCK_N]
    # float64, subtracted in two float32 parts
    lse_q = tl.load(lse_q_ptr + o_i, mask=m_i, other=0.0)  # [BLOCK_M]
    lse_k = tl.load(lse_k_ptr + o_j, mask=m_j, other=0.0)  # [BLOCK_N]
    high_q, high_k = lse_q.to(tl.float32), lse_k.to(tl.float32)
    low_q, low_k = (lse_q - high_q.to(tl.float64)).to(tl.float32), (lse_k - high_k.to(tl.float64)).to(tl.float32)
    b_pair = tl.where(o_i[:, None] == o_j[None, :], 1.0, 0.0)  # [BLOCK_M, BLOCK_N]
    b_p = tl.exp((b_l - high_q[:, None]) - low_q[:, None]) - b_pair
    b_g = (b_p + (tl.exp((b_l - high_k[None, :]) - low_k[None, :]) - b_pair)) * unit
    o_g = o_r.to(tl.int64)[:, None] * stride_g + o_c[None, :]
    tl.store(g_ptr + o_g, cast(b_g, g_ptr.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


@triton.jit
def _siglip_gradient_kernel(
    x_ptr, y_ptr, pair_ptr, scale_ptr, bias_ptr,  # [N, E], [M, E], [N], [], []
    g_ptr,  # [rows, cols] of the superblock at (row0, column0)
    row0, column0, rows, cols, e, stride_x, stride_y, stride_g, unit,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_i, m_j = o_r < rows, o_c < cols
    o_i, o_j = row0 + o_r, column0 + o_c
    b_s = similarity(x_ptr, y_ptr, pair_ptr, o_i, o_j, m_i, m_j, e, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_E)
    b_sign = tl.where(o_i[:, None] == o_j[None, :], -1.0, 1.0)  # [BLOCK_M, BLOCK_N]
    b_z = b_sign * (b_s * tl.load(scale_ptr) + tl.load(bias_ptr))
    b_g = b_sign * sigmoid_of_sign(b_z, tl.exp(-tl.abs(b_z))) * unit
    o_g = o_r.to(tl.int64)[:, None] * stride_g + o_c[None, :]
    tl.store(g_ptr + o_g, cast(b_g, g_ptr.dtype.element_ty), mask=m_i[:, None] & m_j[None, :])


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
    """out = factor * (running + a @ b) when last, else running += a @ b (without what was there when first)."""
    (rows, depth), e = a.shape, b.shape[1]
    grid = triton.cdiv(e, TILE["BLOCK_N"]), triton.cdiv(rows, TILE["BLOCK_M"])
    _accumulate_kernel[grid](
        a, b, running, out, factor, rows, depth, e, a.stride(0), a.stride(1), b.stride(0), out.stride(0),
        int(first), int(last), **TILE, BLOCK_K=depth_block(b.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def _feature_gradients(
    kernel: Any, statistics: tuple[Tensor, ...], factor: Tensor, queries: Tensor, keys: Tensor, need: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Runs over the superblocks of G; `kernel` makes one from X, Y and the statistics."""
    x, y = rows_of(queries), rows_of(keys)
    (n, e), m = x.shape, y.shape[0]
    need_x, need_y = need
    dx, dy = x.new_empty(n if need_x else 0, e), y.new_empty(m if need_y else 0, e)
    if n == 0 or e == 0:
        return dx, dy
    size, tile = SUPERBLOCK, _gradient_tile(x.dtype, generation(x.device))
    unit = GRADIENT_UNIT[x.dtype]
    factor = factor / unit
    pair = pairs(x, y)
    g = x.new_empty(min(n, size), min(m, size))
    x_running = x.new_empty(min(n, size) if need_x else 0, e, dtype=torch.float32)
    y_running = x.new_empty(m if need_y and n > size else 0, e, dtype=torch.float32)
    for i in range(0, n, size):
        rows = min(size, n - i)
        for j in range(0, m, size):
            cols = min(size, m - j)
            grid = triton.cdiv(cols, tile["BLOCK_N"]), triton.cdiv(rows, tile["BLOCK_M"])
            kernel[grid](
                x, y, pair, *statistics, g, i, j, rows, cols, e, x.stride(0), y.stride(0), g.stride(0), unit,
                **tile, BLOCK_E=depth_block(x.dtype), num_warps=NUM_WARPS, num_stages=NUM_STAGES,
                enable_fp_fusion=False,
            )  # fmt: skip
            b_g = g[:rows, :cols]
            if need_x:
                _accumulate(b_g, y[j : j + cols], x_running, dx[i : i + rows], factor, j == 0, j + cols == m)
            if need_y:
                running = y_running[j : j + cols]
                _accumulate(b_g.T, x[i : i + rows], running, dy[j : j + cols], factor, i == 0, i + rows == n)
    return dx, dy


def infonce_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    factor = grad_loss * logit_scale / (2 * max(queries.shape[0], 1))
    statistics = logit_scale, lse_q.contiguous(), lse_k.contiguous()
    need = need_queries, need_keys
    return _feature_gradients(_infonce_gradient_kernel, statistics, factor, queries, keys, need)


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    factor = grad_loss * logit_scale / max(queries.shape[0], 1)
    need = need_queries, need_keys
    return _feature_gradients(_siglip_gradient_kernel, (logit_scale, logit_bias), factor, queries, keys, need)


def aot_cases() -> list:
    """Every configuration the launchers above use."""
    from mmkernels.testing.aot import TritonCase

    sizes = dict.fromkeys(("row0", "column0", "e", "stride_x", "stride_y", "stride_g"), "i32:16")
    sizes |= {"rows": "i32", "cols": "i32", "unit": "fp32"}
    cases = []
    for dtype, name in TRITON_TYPES.items():
        features = {
            "x_ptr": f"*{name}",
            "y_ptr": f"*{name}",
            "pair_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "g_ptr": f"*{name}",
        }
        launch: dict[str, Any] = {"num_warps": NUM_WARPS, "num_stages": NUM_STAGES, "tensor_cores": True}
        lse = {"lse_q_ptr": "*fp64", "lse_k_ptr": "*fp64"}
        for major, archs in ((9, (80, 90)), (10, (100,))):
            tile = _gradient_tile(dtype, major)
            constexprs = {**tile, "BLOCK_E": depth_block(dtype)}
            label = f"gradient_bwd[{name},{tile['BLOCK_M']}x{tile['BLOCK_N']},sm_{archs[0]}]"
            for what, kernel, more in (
                ("infonce", _infonce_gradient_kernel, lse),
                ("siglip", _siglip_gradient_kernel, {"bias_ptr": "*fp32"}),
            ):
                signature = features | more | sizes
                exact = {"archs": archs, "options": {"enable_fp_fusion": False}, **launch}
                cases.append(TritonCase(f"{what}_{label}", kernel, signature, constexprs, **exact))
        operands = {"a_ptr": f"*{name}", "b_ptr": f"*{name}", "sum_ptr": "*fp32", "out_ptr": f"*{name}"}
        operands |= {"factor_ptr": "*fp32", "rows": "i32", "depth": "i32", "e": "i32:16"}
        operands |= {"stride_b": "i32:16", "stride_out": "i32:16", "first": "i32", "last": "i32"}
        constexprs = {**TILE, "BLOCK_K": depth_block(dtype)}
        # G as it lies, and transposed. Triton makes a stride of 1 a constant of the kernel.
        for what, long, unit in (("dx", "stride_a_row", "stride_a_depth"), ("dy", "stride_a_depth", "stride_a_row")):
            signature = operands | {long: "i32:16"}
            cases.append(
                TritonCase(
                    f"accumulate_{what}_bwd[{name}]", _accumulate_kernel, signature, constexprs | {unit: 1}, **launch
                )
            )
    return cases
