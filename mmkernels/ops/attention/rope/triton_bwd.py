"""Backward of the prologue in Triton.

With g the gradient of y under the inverse rotation, u = g w, and h, r recomputed from x:

    dx = r (u - [mean u] - h mean(u h))      dw = sum_rows g h      db = sum_rows g

A program owns TILES consecutive tiles of rows (as in the forward, in up to three parts) and accumulates g h and g of
its rows in float32 registers. It writes one line of partial sums; the lines are added in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.rope.triton_fwd import (
    NORMS,
    centred,
    load_angles,
    load_part,
    store_part,
    tile,
)
from mmkernels.ops.attention.triton_fwd import as_heads
from mmkernels.ops.triton_common import unit_rows

__all__ = ["norm_rope_bwd"]

# Tiles per program: its line of partial sums is a thirtieth of what it reads.
_TILES = 32


@triton.jit
def _weighted(b_g, weight_ptr, o_c, m_c):
    if weight_ptr is not None:
        b_g = b_g * tl.load(weight_ptr + o_c, mask=m_c, other=0.0)[None, :]
    return b_g


@triton.jit
def _write_sums(dweight_ptr, dbias_ptr, o_line, o_c, m_c, b_dw, b_db, NORM: tl.constexpr):
    tl.store(dweight_ptr + o_line + o_c, tl.sum(b_dw, 0), mask=m_c)
    if NORM == 2:
        tl.store(dbias_ptr + o_line + o_c, tl.sum(b_db, 0), mask=m_c)


@triton.jit
def _norm_rope_bwd_kernel(
    grad_out, x,  # Heads
    cos_ptr, sin_ptr,  # [table_rows, HALF]
    weight_ptr,  # [D], or None
    dx_ptr,  # [T, H, D]
    dweight_ptr, dbias_ptr,  # [programs, D] partial sums
    rows, heads, table_rows, eps, tiles,
    D: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    REST: tl.constexpr = D - 2 * HALF
    o_j = tl.arange(0, BLOCK_HALF)
    m_j = o_j < HALF
    o_a, o_b = o_j * STEP, o_j * STEP + SHIFT
    o_c = 2 * HALF + tl.arange(0, BLOCK_REST)
    m_c = o_c < D
    b_dwa = tl.zeros([BLOCK_R, BLOCK_HALF], tl.float32)
    b_dwb, b_dba, b_dbb = b_dwa, b_dwa, b_dwa
    b_dwc = tl.zeros([BLOCK_R, BLOCK_REST], tl.float32)
    b_dbc = b_dwc
    for i in range(tiles):
        o_r = (i_p * tiles + i) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        o_t, o_h = o_r // heads, o_r % heads
        p_g = grad_out.ptr + o_t * grad_out.stride_t + o_h * grad_out.stride_h
        p_x = x.ptr + o_t * x.stride_t + o_h * x.stride_h
        p_dx = dx_ptr + o_r * D
        if HALF > 0:
            b_ya, b_yb = load_part(p_g, m_r, o_a, m_j), load_part(p_g, m_r, o_b, m_j)  # [BLOCK_R, BLOCK_HALF]
            b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_t, m_r, o_j, m_j, table_rows, HALF)
            b_ga, b_gb = b_ya * b_cos + b_yb * b_sin, b_yb * b_cos - b_ya * b_sin
        if REST > 0:
            b_gc = load_part(p_g, m_r, o_c, m_c)  # [BLOCK_R, BLOCK_REST]
        if NORM > 0:
            if HALF > 0:
                b_a, b_b = load_part(p_x, m_r, o_a, m_j), load_part(p_x, m_r, o_b, m_j)
            if REST > 0:
                b_c = load_part(p_x, m_r, o_c, m_c)
            if NORM == 2:
                b_sum = tl.zeros([BLOCK_R], tl.float32)
                if HALF > 0:
                    b_sum += tl.sum(b_a, 1) + tl.sum(b_b, 1)
                if REST > 0:
                    b_sum += tl.sum(b_c, 1)
                b_mean = b_sum / D
                if HALF > 0:
                    b_a, b_b = centred(b_a, m_j, b_mean), centred(b_b, m_j, b_mean)
                if REST > 0:
                    b_c = centred(b_c, m_c, b_mean)
            b_square = tl.zeros([BLOCK_R], tl.float32)
            b_u, b_uh = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
            if HALF > 0:
                b_square += tl.sum(b_a * b_a, 1) + tl.sum(b_b * b_b, 1)
            if REST > 0:
                b_square += tl.sum(b_c * b_c, 1)
            b_r = 1.0 / tl.sqrt_rn(b_square / D + eps)
            if HALF > 0:
                b_a, b_b = b_a * b_r[:, None], b_b * b_r[:, None]
                b_dwa += b_ga * b_a
                b_dwb += b_gb * b_b
                if NORM == 2:
                    b_dba += b_ga
                    b_dbb += b_gb
                b_ga = _weighted(b_ga, weight_ptr, o_a, m_j)
                b_gb = _weighted(b_gb, weight_ptr, o_b, m_j)
                b_u += tl.sum(b_ga, 1) + tl.sum(b_gb, 1)
                b_uh += tl.sum(b_ga * b_a, 1) + tl.sum(b_gb * b_b, 1)
            if REST > 0:
                b_c = b_c * b_r[:, None]
                b_dwc += b_gc * b_c
                if NORM == 2:
                    b_dbc += b_gc
                b_gc = _weighted(b_gc, weight_ptr, o_c, m_c)
                b_u += tl.sum(b_gc, 1)
                b_uh += tl.sum(b_gc * b_c, 1)
            b_u = b_u / D if NORM == 2 else b_u * 0.0
            b_uh = b_uh / D
            if HALF > 0:
                b_ga = b_r[:, None] * (b_ga - b_u[:, None] - b_a * b_uh[:, None])
                b_gb = b_r[:, None] * (b_gb - b_u[:, None] - b_b * b_uh[:, None])
            if REST > 0:
                b_gc = b_r[:, None] * (b_gc - b_u[:, None] - b_c * b_uh[:, None])
        if HALF > 0:
            store_part(p_dx, m_r, o_a, m_j, b_ga)
            store_part(p_dx, m_r, o_b, m_j, b_gb)
        if REST > 0:
            store_part(p_dx, m_r, o_c, m_c, b_gc)
    if NORM > 0:
        if HALF > 0:
            _write_sums(dweight_ptr, dbias_ptr, i_p * D, o_a, m_j, b_dwa, b_dba, NORM)
            _write_sums(dweight_ptr, dbias_ptr, i_p * D, o_b, m_j, b_dwb, b_dbb, NORM)
        if REST > 0:
            _write_sums(dweight_ptr, dbias_ptr, i_p * D, o_c, m_c, b_dwc, b_dbc, NORM)


def norm_rope_bwd(
    grad_out: Tensor,
    x: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, H, D]; dweight [D], empty without a norm, dbias [D], empty unless "layer"."""
    grad_out = unit_rows(grad_out)
    x = unit_rows(x) if x is not None else grad_out  # not read without a norm
    (T, H, D), half = grad_out.shape, cos.shape[1] if cos is not None else 0
    sizes = tile(D, half, interleaved)
    programs = triton.cdiv(T * H, sizes["BLOCK_R"] * _TILES)
    dx = torch.empty(grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
    dweights = torch.empty((programs, D if norm else 0), dtype=torch.float32, device=grad_out.device)
    dbiases = dweights.new_empty((programs, D if norm == "layer" else 0))
    if dx.numel() > 0:
        table_rows = cos.shape[0] if cos is not None else 1
        _norm_rope_bwd_kernel[(programs,)](
            as_heads(grad_out), as_heads(x), cos, sin, weight, dx, dweights, dbiases, T * H, H, table_rows, eps, _TILES,
            NORM=NORMS[norm], **sizes,
        )  # fmt: skip
    return dx, dweights.sum(0), dbiases.sum(0)
