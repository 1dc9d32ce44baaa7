"""Backward in Triton: three kernels, no atomics, so the same input gives the same bits.

With p_ij = exp(s_ij - lse_i), dp_ij = <do_i, v_j>, delta_i = <do_i, out_i> - dlse_i and ds_ij = p_ij (dp_ij - delta_i):

    delta     a program owns BLOCK_M queries of a head
    dk, dv    a program owns BLOCK_N keys of a key/value head and walks the hull of the queries that see them, for each
              query head of the group in turn:  dv_j = sum_i p_ij do_i,  dk_j = scale sum_i ds_ij q_i
    dq        a program owns BLOCK_M queries of a head and walks their keys as the forward does:
              dq_i = scale sum_j ds_ij k_j

Scores are computed again in both, seven products against the least possible five. Sums are float32 and cast once.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl

from mmkernels.ops._tl import cast, dot

from .triton_fwd import (
    AOT_LAUNCHES,
    INT32_MAX,
    aot_case,
    block_dim,
    exponential,
    in_log2,
    key_ranges,
    load_intervals,
    load_tile,
    store_tile,
    unit_rows,
)

__all__ = ["aot_cases", "attention_bwd"]

DELTA_BLOCK_M = 32


@triton.jit
def _attention_delta_kernel(
    do_ptr, out_ptr, dlse_ptr, delta_ptr, stride_dot, stride_doh, stride_ot, stride_oh, Tq,
    DV: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_dv = tl.arange(0, BLOCK_DV)
    b_do = load_tile(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    b_out = load_tile(out_ptr + i_h * stride_oh, o_m, o_dv, stride_ot, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BLOCK_M]
    if HAS_DLSE:
        b_delta -= tl.load(dlse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
    tl.store(delta_ptr + i_h * Tq + o_m, b_delta, mask=o_m < Tq)


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, first_q_ptr, last_q_ptr, dk_ptr, dv_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    Tq, Tk, group, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_hkv = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_first = tl.maximum(tl.load(first_q_ptr + o_n, mask=o_n < Tk, other=0), 0)
    b_last = tl.minimum(tl.load(last_q_ptr + o_n, mask=o_n < Tk, other=0), Tq)
    begin = tl.min(tl.where(b_first < b_last, b_first, INT32_MAX), 0)
    end = tl.max(tl.where(b_first < b_last, b_last, 0), 0)

    b_k = load_tile(k_ptr + i_hkv * stride_kh, o_n, o_d, stride_kt, Tk, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_v = load_tile(v_ptr + i_hkv * stride_vh, o_n, o_dv, stride_vt, Tk, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_group in range(0, group):
        i_h = i_hkv * group + i_group
        for start in range(begin, end, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            b_lo, b_hi = load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk)
            b_q = load_tile(q_ptr + i_h * stride_qh, o_m, o_d, stride_qt, Tq, D, BLOCK_D, True)
            b_do = load_tile(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV, BLOCK_DV, True)
            b_lse = in_log2(tl.load(lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0), b_k.dtype)
            b_delta = tl.load(delta_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
            b_s = dot(b_k, tl.trans(b_q)) * in_log2(scale, b_k.dtype)  # [BLOCK_N, BLOCK_M]
            m_visible = (b_lo[None, :] <= o_n[:, None]) & (o_n[:, None] < b_hi[None, :])
            b_p = tl.where(m_visible, exponential(b_s - b_lse[None, :], b_k.dtype), 0.0)  # [BLOCK_N, BLOCK_M]
            b_dv += dot(cast(b_p, b_do.dtype), b_do)
            b_dp = dot(b_v, tl.trans(b_do))  # [BLOCK_N, BLOCK_M]
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk += dot(cast(b_ds, b_q.dtype), b_q)
    store_tile(dk_ptr + i_hkv * stride_dkh, o_n, o_d, stride_dkt, Tk, D, b_dk * scale)
    store_tile(dv_ptr + i_hkv * stride_dvh, o_n, o_dv, stride_dvt, Tk, DV, b_dv)


@triton.jit
def _walk_keys(
    b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, begin, end, factor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """b_dq + ds k over the keys [begin, end)."""
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_k = load_tile(k_ptr, o_n, o_d, stride_kt, end, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
        b_v = load_tile(v_ptr, o_n, o_dv, stride_vt, end, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
        b_s = dot(b_q, tl.trans(b_k)) * factor  # [BLOCK_M, BLOCK_N]
        b_p = exponential(b_s - b_lse[:, None], b_q.dtype)
        if MASKED:
            m_visible = (b_lo[:, None] <= o_n[None, :]) & (o_n[None, :] < b_hi[:, None])
            b_p = tl.where(m_visible, b_p, 0.0)
        b_ds = b_p * (dot(b_do, tl.trans(b_v)) - b_delta[:, None])  # [BLOCK_M, BLOCK_N]
        b_dq += dot(cast(b_ds, b_k.dtype), b_k)
    return b_dq


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, dq_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dqt, stride_dqh,
    Tq, Tk, group, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += i_h // group * stride_kh
    v_ptr += i_h // group * stride_vh
    b_lo, b_hi = load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk)
    begin, full_begin, full_end, end = key_ranges(b_lo, b_hi, o_m < Tq, BLOCK_N)
    b_q = load_tile(q_ptr + i_h * stride_qh, o_m, o_d, stride_qt, Tq, D, BLOCK_D, True)
    b_do = load_tile(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV, BLOCK_DV, True)
    b_lse = in_log2(tl.load(lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0), b_q.dtype)
    b_delta = tl.load(delta_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = in_log2(scale, b_q.dtype)
    b_dq = _walk_keys(
        b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, begin, full_begin,
        factor, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    b_dq = _walk_keys(
        b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, full_begin, full_end,
        factor, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False,
    )  # fmt: skip
    b_dq = _walk_keys(
        b_dq, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, full_end, end,
        factor, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True,
    )  # fmt: skip
    store_tile(dq_ptr + i_h * stride_dqh, o_m, o_d, stride_dqt, Tq, D, b_dq * scale)


def _dkdv_config(single: bool, head_dim: int) -> dict[str, int]:
    """Tiles and launch options that compile without spills for sm_80, sm_90 and sm_100."""
    if single:
        if head_dim <= 64:
            return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
        return {"BLOCK_M": 16, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if head_dim <= 64:
        return {"BLOCK_M": 32, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
    if head_dim <= 128:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def _dq_config(single: bool, head_dim: int) -> dict[str, int]:
    """Tiles and launch options that compile without spills for sm_80, sm_90 and sm_100."""
    if single:
        if head_dim <= 64:
            return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    if head_dim <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def attention_bwd(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    first_q: torch.Tensor,
    last_q: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous."""
    do, q, k, v, out = (unit_rows(x) for x in (grad_out, q, k, v, out))
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    single, widest = q.dtype == torch.float32, max(D, DV)
    sizes = {"D": D, "DV": DV, "BLOCK_D": block_dim(D), "BLOCK_DV": block_dim(DV)}
    inputs = (q, k, v, do, lse, delta, lo, hi)
    strides = tuple(stride for x in (q, k, v, do) for stride in x.stride()[:2])
    scalars = (Tq, Tk, H // Hkv, scale)
    if Tq > 0:
        dlse = grad_lse.contiguous() if grad_lse is not None else None
        _attention_delta_kernel[(triton.cdiv(Tq, DELTA_BLOCK_M), H)](
            do, out, dlse, delta, *do.stride()[:2], *out.stride()[:2], Tq,
            DV=DV, HAS_DLSE=dlse is not None, BLOCK_M=DELTA_BLOCK_M, BLOCK_DV=sizes["BLOCK_DV"],
        )  # fmt: skip
        config = _dq_config(single, widest)
        grid = (triton.cdiv(Tq, config["BLOCK_M"]), H)
        _attention_dq_kernel[grid](*inputs, dq, *strides, *dq.stride()[:2], *scalars, **sizes, **config)
    if Tk > 0:
        config = _dkdv_config(single, widest)
        grid = (triton.cdiv(Tk, config["BLOCK_N"]), Hkv)
        _attention_dkdv_kernel[grid](
            *inputs, first_q, last_q, dk, dv, *strides, *dk.stride()[:2], *dv.stride()[:2], *scalars, **sizes, **config
        )
    return dq, dk, dv


def aot_cases() -> list[Any]:
    """Every configuration that the launcher uses."""
    from mmkernels.testing.aot import TRITON_ARCHS

    cases = []
    for arch, (kind, head_dim) in itertools.product(TRITON_ARCHS, AOT_LAUNCHES):
        block, single = block_dim(head_dim), kind == "fp32"
        sizes = {"D": head_dim, "DV": head_dim, "BLOCK_D": block, "BLOCK_DV": block}
        dkdv, dq = _dkdv_config(single, head_dim), _dq_config(single, head_dim)
        delta = {"DV": head_dim, "BLOCK_DV": block, "HAS_DLSE": True}
        rows = {"BLOCK_M": DELTA_BLOCK_M}
        cases.append(aot_case("delta", _attention_delta_kernel, kind, head_dim, rows, arch, **delta))
        cases.append(aot_case("dkdv", _attention_dkdv_kernel, kind, head_dim, dkdv, arch, **sizes))
        cases.append(aot_case("dq", _attention_dq_kernel, kind, head_dim, dq, arch, **sizes))
    return cases
