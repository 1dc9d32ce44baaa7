"""Backward of additive attention in Triton: two kernels, no atomics.

dq    a program owns BLOCK_M queries of one head and loops over their keys; it sums dq and its queries' share of dw
dkdv  a program owns BLOCK_N keys of a key/value head and loops over the hull of their queries, for each query head

Each pair of tiles recomputes the scores and ds = p (dp - delta). Then, for one element of the head dim at a time, it
recomputes t = tanh(q + k + b), sums g = ds w (1 - t^2) over the other side, and adds it to the accumulator's column. dp
and dv are tensor-core products; the rest is float32.

In low precision delta = <do, out> carries the rounding error of out. The sum of ds over a query's keys reveals it,
because the exact sum is dlse. So the dq kernel also sums p (1 - t^2) and p t, subtracts the error's share at the end,
and writes the corrected delta for dkdv.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.additive.triton_fwd import Terms, scores, tanh_tile
from mmkernels.ops.attention.triton_fwd import (
    as_heads,
    hull,
    load_keys,
    load_queries,
    load_tile,
    of_head,
    store_tile,
    tiles,
    visible,
)
from mmkernels.ops.attention.types import MaskRows, Visible
from mmkernels.ops.triton_common import LOG2_E, block_dim, cast, dot, unit_rows

__all__ = ["additive_bwd"]


@triton.jit
def _tile_gradients(
    terms, v, b_do, lse_ptr, delta_ptr, rows, first_q, first_k, Tq, Tk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """p and ds of a tile: 2 x [BLOCK_M, BLOCK_N]."""
    o_m, o_n = first_q + tl.arange(0, BLOCK_M), first_k + tl.arange(0, BLOCK_N)
    b_s = scores(terms, o_m, o_n, Tq, Tk, D, BLOCK_M, BLOCK_N)
    queries, keys = load_queries(rows, first_q, Tq, Tk, BLOCK_M), load_keys(rows, first_k, Tk, BLOCK_N)
    m_visible = visible(queries, keys, rows, 1)
    b_lse = tl.load(lse_ptr + o_m, mask=o_m < Tq, other=0.0)
    b_delta = tl.load(delta_ptr + o_m, mask=o_m < Tq, other=0.0)
    b_p = tl.where(m_visible, tl.exp2((b_s - b_lse[:, None]) * LOG2_E), 0.0)
    b_v = load_tile(v, o_n, Tk, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    return b_p, b_p * (dot(b_do, tl.trans(b_v)) - b_delta[:, None])


@triton.jit
def _additive_dq_kernel(
    q, k, v, do, dq,  # Heads; dq in float32
    w_ptr, bias_ptr,  # [H, D]
    lse_ptr, delta_ptr,  # [H, Tq]
    dlse_ptr,  # [H, Tq]; None if delta is exact and already includes it
    dw_ptr,  # [tiles, H, D] partial sums
    rows, Tq, Tk, heads, group,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(1).to(tl.int64), tl.program_id(0)
    o_m, o_d = i_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    terms = Terms(of_head(q, i_h), of_head(k, i_h // group), w_ptr + i_h * D, bias_ptr + i_h * D)
    v = of_head(v, i_h // group)
    b_do = load_tile(of_head(do, i_h), o_m, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_pq, b_pw = b_dq, b_dw
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, end = hull(rows.lo, rows.hi, o_m, Tq, Tk)
    for start in range(begin, end, BLOCK_N):
        b_p, b_ds = _tile_gradients(
            terms, v, b_do, lse_ptr + i_h * Tq, delta_ptr + i_h * Tq, rows, i_m * BLOCK_M, start, Tq, Tk,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_DV,
        )  # fmt: skip
        for i_d in range(0, D):
            b_t = tanh_tile(terms, o_m, start + tl.arange(0, BLOCK_N), i_d, Tq, Tk)
            m_d = (o_d == i_d)[None, :]
            b_dq += tl.where(m_d, tl.sum(b_ds * (1.0 - b_t * b_t), 1)[:, None], 0.0)
            b_dw += tl.where(m_d, tl.sum(b_ds * b_t, 1)[:, None], 0.0)
            if dlse_ptr is not None:
                b_pq += tl.where(m_d, tl.sum(b_p * (1.0 - b_t * b_t), 1)[:, None], 0.0)
                b_pw += tl.where(m_d, tl.sum(b_p * b_t, 1)[:, None], 0.0)
        b_sum += tl.sum(b_ds, 1)
    if dlse_ptr is not None:
        m_m = o_m < Tq
        b_left = b_sum - tl.load(dlse_ptr + i_h * Tq + o_m, mask=m_m, other=0.0)
        b_dq -= b_left[:, None] * b_pq
        b_dw -= b_left[:, None] * b_pw
        p_delta = delta_ptr + i_h * Tq + o_m
        tl.store(p_delta, tl.load(p_delta, mask=m_m, other=0.0) + b_left, mask=m_m)
    m_d = o_d < D
    b_dq = b_dq * tl.load(terms.w_ptr + o_d, mask=m_d, other=0.0)[None, :]
    store_tile(of_head(dq, i_h), o_m, Tq, D, b_dq)
    tl.store(dw_ptr + (i_m.to(tl.int64) * heads + i_h) * D + o_d, tl.sum(b_dw, 0), mask=m_d)


@triton.jit
def _additive_dkdv_kernel(
    q, k, v, do, dk, dv,  # Heads
    w_ptr, bias_ptr,  # [H, D]
    lse_ptr, delta_ptr,  # [H, Tq]
    rows, Tq, Tk, group,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_n, i_hkv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n, o_d = i_n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k, v = of_head(k, i_hkv), of_head(v, i_hkv)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, end = hull(rows.first_q, rows.last_q, o_n, Tk, Tq)
    for i_group in range(0, group):
        i_h = i_hkv * group + i_group
        terms = Terms(of_head(q, i_h), k, w_ptr + i_h * D, bias_ptr + i_h * D)
        for start in range(begin, end, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_do = load_tile(of_head(do, i_h), o_m, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
            b_p, b_ds = _tile_gradients(
                terms, v, b_do, lse_ptr + i_h * Tq, delta_ptr + i_h * Tq, rows, start, i_n * BLOCK_N, Tq, Tk,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_DV,
            )  # fmt: skip
            b_dv += dot(tl.trans(cast(b_p, b_do.dtype)), b_do)
            for i_d in range(0, D):
                b_t = tanh_tile(terms, o_m, o_n, i_d, Tq, Tk)
                b_g = tl.sum(b_ds * (1.0 - b_t * b_t), 0) * tl.load(terms.w_ptr + i_d)  # [BLOCK_N]
                b_dk += tl.where((o_d == i_d)[None, :], b_g[:, None], 0.0)
    store_tile(of_head(dk, i_hkv), o_n, Tk, D, b_dk)
    store_tile(of_head(dv, i_hkv), o_n, Tk, DV, b_dv)


def dq_config(single: bool, widest: int) -> dict[str, int]:
    """Tiles and launch options without spills on sm_80, sm_90 and sm_100."""
    return tiles(16, 32, 4 if widest <= 64 else 8) if single else tiles(16, 64, 8)


def dkdv_config(single: bool, widest: int) -> dict[str, int]:
    """Tiles and launch options without spills on sm_80, sm_90 and sm_100."""
    if single:
        return tiles(16, 32, 4 if widest <= 64 else 8)
    return tiles(16, 32, 8) if widest <= 64 else tiles(32, 32, 4 if widest <= 128 else 8)


def additive_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Visible,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq in float32, dk and dv in the dtypes of k and v, dw."""
    do, q, k, v = (unit_rows(x) for x in (grad_out, q, k, v))
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    delta = (do.float() * out.float()).sum(-1).T.contiguous()  # [H, Tq]
    single, dlse = q.dtype == torch.float32, None
    if not single:
        dlse = torch.zeros_like(delta) if grad_lse is None else grad_lse.contiguous()
    elif grad_lse is not None:
        delta = delta - grad_lse
    config_dq, config_dkdv = dq_config(single, max(D, DV)), dkdv_config(single, max(D, DV))
    num_tiles = triton.cdiv(Tq, config_dq["BLOCK_M"])
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dw = torch.empty((num_tiles, H, D), dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    inputs, rows = tuple(as_heads(x) for x in (q, k, v, do)), MaskRows(*mask)
    stats = w, bias, lse, delta
    sizes = {"D": D, "DV": DV, "BLOCK_D": block_dim(D), "BLOCK_DV": block_dim(DV)}
    if Tq > 0:
        _additive_dq_kernel[(num_tiles, H)](
            *inputs, as_heads(dq), *stats, dlse, dw, rows, Tq, Tk, H, H // Hkv, **sizes, **config_dq
        )
    if Tk > 0:
        _additive_dkdv_kernel[(triton.cdiv(Tk, config_dkdv["BLOCK_N"]), Hkv)](
            *inputs, as_heads(dk), as_heads(dv), *stats, rows, Tq, Tk, H // Hkv, **sizes, **config_dkdv
        )
    return dq, dk, dv, dw.sum(0)
