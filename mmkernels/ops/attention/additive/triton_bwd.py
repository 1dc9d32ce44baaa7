"""Backward of additive attention in Triton: two kernels, no atomics.

dq    a program owns BLOCK_M queries of one head and walks their keys; it sums dq and, for its queries, dw
dkdv  a program owns BLOCK_N keys of a key/value head and walks the hull of their queries, head of the group after head

For each pair of tiles the scores are computed again, then ds = p (dp - delta), then one element of the head dim after
the other: t = tanh(q + k + b) once more, g = ds w (1 - t^2) summed over the other side, and put into its column of the
accumulator. dp and dv are products on tensor cores; the rest is float32.

In low precision delta = <do, out> has the rounding of out. The sum of ds over a query's keys says how much: ds sums to
dlse. So dq also sums p (1 - t^2) and p t, takes its share of that difference off at the end, and leaves the delta that
dkdv reads without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.additive.triton_fwd import (
    AOT_LAUNCHES,
    aot_case,
    block_dim,
    hull,
    load_rows,
    on_device,
    scores,
    tanh_tile,
    unit_rows,
    visible,
)
from mmkernels.ops.attention.types import Visible
from mmkernels.ops.triton_common import LOG2_E, cast, dot

if TYPE_CHECKING:
    from mmkernels.testing.aot import TritonCase

__all__ = ["additive_bwd", "aot_cases"]


@triton.jit
def _tile_gradients(
    q_ptr, k_ptr, v_ptr, w_ptr, bias_ptr, b_do, lse_ptr, delta_ptr, lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr,
    bit_k_ptr, o_m, o_n, stride_qt, stride_kt, stride_vt, Tq, Tk,
    D: tl.constexpr, DV: tl.constexpr, PATTERN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """p and ds: 2 x [BLOCK_M, BLOCK_N]."""
    b_s = scores(q_ptr, k_ptr, w_ptr, bias_ptr, o_m, o_n, stride_qt, stride_kt, Tq, Tk, D, BLOCK_M, BLOCK_N)
    m = visible(lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, o_m, o_n, Tq, Tk, PATTERN)
    b_lse = tl.load(lse_ptr + o_m, mask=o_m < Tq, other=0.0)
    b_delta = tl.load(delta_ptr + o_m, mask=o_m < Tq, other=0.0)
    b_p = tl.where(m, tl.exp2((b_s - b_lse[:, None]) * LOG2_E), 0.0)
    b_v = load_rows(v_ptr, o_n, tl.arange(0, BLOCK_DV), stride_vt, Tk, DV)  # [BLOCK_N, BLOCK_DV]
    return b_p, b_p * (dot(b_do, tl.trans(b_v)) - b_delta[:, None])


@triton.jit
def _additive_dq_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr,
    lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr,
    dlse_ptr,  # [H, Tq]; None where delta is exact and has it already
    dq_ptr,  # [Tq, H, D] float32
    dw_ptr,  # [tiles, H, D] partial sums
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, Tq, Tk, heads, group,
    D: tl.constexpr, DV: tl.constexpr, PATTERN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h, i_m = tl.program_id(1).to(tl.int64), tl.program_id(0)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_ptr += i_h * stride_qh
    k_ptr += i_h // group * stride_kh
    v_ptr += i_h // group * stride_vh
    w_ptr += i_h * D
    bias_ptr += i_h * D
    b_do = load_rows(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV)  # [BLOCK_M, BLOCK_DV]
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_dw = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_pq, b_pw = b_dq, b_dw
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, end = hull(lo_ptr, hi_ptr, o_m, Tq, Tk)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_p, b_ds = _tile_gradients(
            q_ptr, k_ptr, v_ptr, w_ptr, bias_ptr, b_do, lse_ptr + i_h * Tq, delta_ptr + i_h * Tq, lo_ptr, hi_ptr,
            span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, o_m, o_n, stride_qt, stride_kt, stride_vt, Tq, Tk,
            D, DV, PATTERN, BLOCK_M, BLOCK_N, BLOCK_DV,
        )  # fmt: skip
        for i_d in range(0, D):
            b_t = tanh_tile(q_ptr, k_ptr, bias_ptr, o_m, o_n, i_d, stride_qt, stride_kt, Tq, Tk)
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
    b_dq = b_dq * tl.load(w_ptr + o_d, mask=m_d, other=0.0)[None, :]
    p_dq = dq_ptr + (o_m.to(tl.int64)[:, None] * heads + i_h) * D + o_d[None, :]
    tl.store(p_dq, b_dq, mask=(o_m < Tq)[:, None] & m_d[None, :])
    tl.store(dw_ptr + (i_m.to(tl.int64) * heads + i_h) * D + o_d, tl.sum(b_dw, 0), mask=m_d)


@triton.jit
def _additive_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, bias_ptr, do_ptr, lse_ptr, delta_ptr,
    lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, first_q_ptr, last_q_ptr,
    dk_ptr, dv_ptr,  # [Tk, Hkv, D], [Tk, Hkv, DV]
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, Tq, Tk, heads_kv, group,
    D: tl.constexpr, DV: tl.constexpr, PATTERN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_hkv = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += i_hkv * stride_kh
    v_ptr += i_hkv * stride_vh
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    begin, end = hull(first_q_ptr, last_q_ptr, o_n, Tk, Tq)
    for i_group in range(0, group):
        i_h = i_hkv * group + i_group
        for start in range(begin, end, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_do = load_rows(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV)  # [BLOCK_M, BLOCK_DV]
            b_p, b_ds = _tile_gradients(
                q_ptr + i_h * stride_qh, k_ptr, v_ptr, w_ptr + i_h * D, bias_ptr + i_h * D, b_do, lse_ptr + i_h * Tq,
                delta_ptr + i_h * Tq, lo_ptr, hi_ptr, span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, o_m, o_n,
                stride_qt, stride_kt, stride_vt, Tq, Tk, D, DV, PATTERN, BLOCK_M, BLOCK_N, BLOCK_DV,
            )  # fmt: skip
            b_dv += dot(tl.trans(cast(b_p, b_do.dtype)), b_do)
            for i_d in range(0, D):
                b_t = tanh_tile(
                    q_ptr + i_h * stride_qh, k_ptr, bias_ptr + i_h * D, o_m, o_n, i_d, stride_qt, stride_kt, Tq, Tk
                )  # fmt: skip
                b_g = tl.sum(b_ds * (1.0 - b_t * b_t), 0) * tl.load(w_ptr + i_h * D + i_d)  # [BLOCK_N]
                b_dk += tl.where((o_d == i_d)[None, :], b_g[:, None], 0.0)
    m_n = (o_n < Tk)[:, None]
    o_row = o_n.to(tl.int64)[:, None] * heads_kv + i_hkv
    tl.store(dk_ptr + o_row * D + o_d[None, :], cast(b_dk, dk_ptr.dtype.element_ty), mask=m_n & (o_d < D)[None, :])
    tl.store(dv_ptr + o_row * DV + o_dv[None, :], cast(b_dv, dv_ptr.dtype.element_ty), mask=m_n & (o_dv < DV)[None, :])


def _config(kernel: str, single: bool, widest: int) -> dict[str, int]:
    """Tiles and launch options without spills on sm_80, sm_90 and sm_100."""
    if kernel == "dq" and not single:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}
    if single:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 4 if widest <= 64 else 8, "num_stages": 1}
    if widest <= 64:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4 if widest <= 128 else 8, "num_stages": 1}


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
    dlse = None
    if q.dtype != torch.float32:
        dlse = torch.zeros_like(delta) if grad_lse is None else grad_lse.contiguous()
    elif grad_lse is not None:
        delta = delta - grad_lse
    config_dq, config_dkdv = (_config(of, q.dtype == torch.float32, max(D, DV)) for of in ("dq", "dkdv"))
    tiles = triton.cdiv(Tq, config_dq["BLOCK_M"])
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    dw = torch.empty((tiles, H, D), dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    pattern = (mask.span_q, mask.span_k, mask.allow_q, mask.bit_k)
    inputs = (q, k, v, w, bias, do, lse, delta, mask.lo, mask.hi, *pattern)
    strides = tuple(stride for x in (q, k, v, do) for stride in x.stride()[:2])
    sizes = {"D": D, "DV": DV, "PATTERN": mask.span_q is not None, "BLOCK_D": block_dim(D), "BLOCK_DV": block_dim(DV)}
    with on_device(q):
        if Tq > 0:
            _additive_dq_kernel[(tiles, H)](*inputs, dlse, dq, dw, *strides, Tq, Tk, H, H // Hkv, **sizes, **config_dq)
        if Tk > 0:
            _additive_dkdv_kernel[(triton.cdiv(Tk, config_dkdv["BLOCK_N"]), Hkv)](
                *inputs, mask.first_q, mask.last_q, dk, dv, *strides, Tq, Tk, Hkv, H // Hkv, **sizes, **config_dkdv
            )
    return dq, dk, dv, dw.sum(0)


def aot_cases() -> list[TritonCase]:
    """Every configuration that the launcher uses, with and without the mask's pattern."""
    kernels = {"dq": _additive_dq_kernel, "dkdv": _additive_dkdv_kernel}
    return [
        aot_case(what, kernel, launch, _config(what, launch[0] == "fp32", launch[1]))
        for launch in AOT_LAUNCHES
        for what, kernel in kernels.items()
    ]
