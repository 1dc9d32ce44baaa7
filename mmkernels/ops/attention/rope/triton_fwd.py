"""Forward of the prologue in Triton.

    h = (x - mu) / sqrt(mean (x - mu)^2 + eps)     n = h w + b     y_a = n_a cos - n_b sin     y_b = n_b cos + n_a sin

A program owns BLOCK_R rows (one token and head each) and holds them in up to three parts: the first and the second
elements of the rotated pairs, and the rest. Element j of the first part is column j * STEP; its partner is SHIFT
columns further: (1, HALF) for halves, (2, 1) for neighbours. Rows of one token share a table row through the L1 cache.
All arithmetic is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.triton_fwd import as_heads
from mmkernels.ops.triton_common import cast, unit_rows

__all__ = ["norm_rope_fwd"]

# Elements of a tile: 16 per thread with four warps.
_TILE = 2048
NORMS = {"": 0, "rms": 1, "layer": 2}


@triton.jit
def load_part(p_rows, m_r, o_c, m_c):
    """Columns o_c of rows that begin at p_rows, float32, zeros outside: [BLOCK_R, len(o_c)]."""
    return tl.load(p_rows[:, None] + o_c[None, :], mask=m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_part(p_rows, m_r, o_c, m_c, b_x):
    m = m_r[:, None] & m_c[None, :]
    tl.store(p_rows[:, None] + o_c[None, :], cast(b_x, p_rows.dtype.element_ty), mask=m)


@triton.jit
def centred(b_x, m_c, b_mean):
    return tl.where(m_c[None, :], b_x - b_mean[:, None], 0.0)


@triton.jit
def _affine(b_x, weight_ptr, bias_ptr, o_c, m_c):
    if weight_ptr is not None:
        b_x = b_x * tl.load(weight_ptr + o_c, mask=m_c, other=0.0)[None, :]
    if bias_ptr is not None:
        b_x = b_x + tl.load(bias_ptr + o_c, mask=m_c, other=0.0)[None, :]
    return b_x


@triton.jit
def load_angles(cos_ptr, sin_ptr, o_t, m_r, o_j, m_j, table_rows, HALF: tl.constexpr):
    """Table rows of the tokens o_t: 2 x [BLOCK_R, BLOCK_HALF]."""
    o_line = (o_t % table_rows)[:, None] * HALF + o_j[None, :]
    m = m_r[:, None] & m_j[None, :]
    return tl.load(cos_ptr + o_line, mask=m, other=0.0), tl.load(sin_ptr + o_line, mask=m, other=0.0)


@triton.jit
def _norm_rope_fwd_kernel(
    x,  # Heads
    cos_ptr, sin_ptr,  # [table_rows, HALF]
    weight_ptr, bias_ptr,  # [D], or None
    y_ptr,  # [T, H, D]
    rows, heads, table_rows, eps,
    D: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    o_t = o_r // heads
    p_x = x.ptr + o_t * x.stride_t + o_r % heads * x.stride_h
    p_y = y_ptr + o_r * D
    REST: tl.constexpr = D - 2 * HALF
    # Absent parts are one column wide and masked out; the compiler drops them.
    o_j = tl.arange(0, BLOCK_HALF)
    m_j = o_j < HALF
    o_a, o_b = o_j * STEP, o_j * STEP + SHIFT
    o_c = 2 * HALF + tl.arange(0, BLOCK_REST)
    m_c = o_c < D
    if HALF > 0:
        b_a = load_part(p_x, m_r, o_a, m_j)  # [BLOCK_R, BLOCK_HALF]
        b_b = load_part(p_x, m_r, o_b, m_j)
    if REST > 0:
        b_c = load_part(p_x, m_r, o_c, m_c)  # [BLOCK_R, BLOCK_REST]
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
    if NORM > 0:
        b_square = tl.zeros([BLOCK_R], tl.float32)
        if HALF > 0:
            b_square += tl.sum(b_a * b_a, 1) + tl.sum(b_b * b_b, 1)
        if REST > 0:
            b_square += tl.sum(b_c * b_c, 1)
        b_r = 1.0 / tl.sqrt_rn(b_square / D + eps)
        if HALF > 0:
            b_a = _affine(b_a * b_r[:, None], weight_ptr, bias_ptr, o_a, m_j)
            b_b = _affine(b_b * b_r[:, None], weight_ptr, bias_ptr, o_b, m_j)
        if REST > 0:
            b_c = _affine(b_c * b_r[:, None], weight_ptr, bias_ptr, o_c, m_c)
    if HALF > 0:
        b_cos, b_sin = load_angles(cos_ptr, sin_ptr, o_t, m_r, o_j, m_j, table_rows, HALF)
        store_part(p_y, m_r, o_a, m_j, b_a * b_cos - b_b * b_sin)
        store_part(p_y, m_r, o_b, m_j, b_b * b_cos + b_a * b_sin)
    if REST > 0:
        store_part(p_y, m_r, o_c, m_c, b_c)


def tile(head_dim: int, half: int, interleaved: bool) -> dict[str, int]:
    """How rows of this head dim are split into parts, and how many a tile holds."""
    rest = head_dim - 2 * half
    blocks = {"BLOCK_HALF": triton.next_power_of_2(max(half, 1)), "BLOCK_REST": triton.next_power_of_2(max(rest, 1))}
    width = 2 * blocks["BLOCK_HALF"] * (half > 0) + blocks["BLOCK_REST"] * (rest > 0)
    step, shift = (2, 1) if interleaved else (1, half)
    block_r = triton.next_power_of_2(max(_TILE // width, 1))
    return {"D": head_dim, "HALF": half, "STEP": step, "SHIFT": shift, "BLOCK_R": block_r, **blocks}


def norm_rope_fwd(
    x: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    norm: str,
    eps: float,
    interleaved: bool,
) -> Tensor:
    """y [T, H, D]."""
    x = unit_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return y
    (T, H, D), half = x.shape, cos.shape[1] if cos is not None else 0
    sizes = tile(D, half, interleaved)
    table_rows = cos.shape[0] if cos is not None else 1
    grid = (triton.cdiv(T * H, sizes["BLOCK_R"]),)
    _norm_rope_fwd_kernel[grid](
        as_heads(x), cos, sin, weight, bias, y, T * H, H, table_rows, eps, NORM=NORMS[norm], **sizes
    )
    return y
