"""Backward in Triton: three kernels, no atomics, so the same input gives the same bits.

With p_ij = exp(s_ij - lse_i), dp_ij = <do_i, v_j>, delta_i = <do_i, out_i> - dlse_i and ds_ij = p_ij (dp_ij - delta_i):

    delta     a program owns BLOCK_M queries of a head
    dk, dv    a program owns BLOCK_N keys of a key/value head and walks the hull of the queries that see them, for each
              query head of the group in turn:  dv_j = sum_i p_ij do_i,  dk_j = scale sum_i ds_ij q_i
    dq        a program owns BLOCK_M queries of a head and walks their keys as the forward does:
              dq_i = scale sum_j ds_ij k_j;  for a pair bias it adds up ds over the keys of each class, by products
              with a one-hot matrix

Scores are computed again in both, seven products against the least possible five. Sums are float32 and cast once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.reference import bias_gradient, sink_gradient
from mmkernels.ops.attention.triton_extras import (
    FULL,
    SKIP,
    arguments,
    bias_of,
    class_block,
    flags,
    is_rich,
    keep_tile,
    load_ints,
    tile_state,
    visible,
)
from mmkernels.ops.attention.triton_fwd import (
    ALL_FLAGS,
    INT32_MAX,
    aot_case,
    aot_launches,
    block_dim,
    exponential,
    in_log2,
    key_ranges,
    load_intervals,
    load_tile,
    store_tile,
    tiles,
    unit_rows,
)
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.triton_common import cast, dot, generation

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
def _gather_queries(
    b_dk, b_dv, b_k, b_v, q_ptr, do_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr, span_q_ptr, allow_q_ptr, class_q_ptr,
    stride_qt, stride_dot, o_n, b_span_k, b_bit, b_class_k, start, bias_ptr, seed_ptr, classes_q, classes_k, keep_below,
    keep_factor, i_h, Tq, Tk, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PATTERN: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dk and dv with the queries [start, start + BLOCK_M) of a head added."""
    o_m, o_d, o_dv = start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_lo, b_hi = load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk)
    b_q = load_tile(q_ptr, o_m, o_d, stride_qt, Tq, D, BLOCK_D, True)
    b_do = load_tile(do_ptr, o_m, o_dv, stride_dot, Tq, DV, BLOCK_DV, True)
    b_lse = in_log2(tl.load(lse_ptr + o_m, mask=o_m < Tq, other=0.0), b_k.dtype)
    b_delta = tl.load(delta_ptr + o_m, mask=o_m < Tq, other=0.0)
    b_s = dot(b_k, tl.trans(b_q)) * in_log2(scale, b_k.dtype)  # [BLOCK_N, BLOCK_M]
    if BIAS:
        b_class = load_ints(class_q_ptr, o_m, Tq, True)
        b_bias = bias_of(bias_ptr, b_class[None, :], b_class_k[:, None], classes_q, classes_k)
        b_s += in_log2(b_bias, b_k.dtype)
    b_span, b_allow = load_ints(span_q_ptr, o_m, Tq, PATTERN), load_ints(allow_q_ptr, o_m, Tq, PATTERN)
    m_visible = visible(
        b_lo[None, :], b_hi[None, :], b_span[None, :], b_allow[None, :], o_n[:, None], b_span_k[:, None],
        b_bit[:, None], PATTERN,
    )  # fmt: skip
    b_p = tl.where(m_visible, exponential(b_s - b_lse[None, :], b_k.dtype), 0.0)  # [BLOCK_N, BLOCK_M]
    b_dp = dot(b_v, tl.trans(b_do))  # [BLOCK_N, BLOCK_M]
    if DROPOUT:
        b_z = tl.where(keep_tile(seed_ptr, i_h, o_n, start, keep_below, BLOCK_M, BLOCK_N), keep_factor, 0.0)
        b_dv += dot(cast(b_p * b_z, b_do.dtype), b_do)
        b_dp = b_dp * b_z
    else:
        b_dv += dot(cast(b_p, b_do.dtype), b_do)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk += dot(cast(b_ds, b_q.dtype), b_q)
    return b_dk, b_dv


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr,
    span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, tiles_ptr, class_q_ptr, class_k_ptr, bias_ptr, sink_ptr, seed_ptr,
    num_words, classes_q, classes_k, keep_below, keep_factor,
    first_q_ptr, last_q_ptr, dk_ptr, dv_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    Tq, Tk, group, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PATTERN: tl.constexpr, BIAS: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    i_n, i_hkv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    b_first = tl.maximum(tl.load(first_q_ptr + o_n, mask=o_n < Tk, other=0), 0)
    b_last = tl.minimum(tl.load(last_q_ptr + o_n, mask=o_n < Tk, other=0), Tq)
    begin = tl.min(tl.where(b_first < b_last, b_first, INT32_MAX), 0)
    end = tl.max(tl.where(b_first < b_last, b_last, 0), 0)
    if PATTERN or DROPOUT:  # tiles of the map, and groups of four queries
        begin = begin // BLOCK_M * BLOCK_M
    b_span_k, b_bit = load_ints(span_k_ptr, o_n, Tk, PATTERN), load_ints(bit_k_ptr, o_n, Tk, PATTERN)
    b_class_k = load_ints(class_k_ptr, o_n, Tk, BIAS)

    b_k = load_tile(k_ptr + i_hkv * stride_kh, o_n, o_d, stride_kt, Tk, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_v = load_tile(v_ptr + i_hkv * stride_vh, o_n, o_dv, stride_vt, Tk, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_g in range(group):
        i_h = i_hkv * group + i_g
        head_bias_ptr = bias_ptr
        if BIAS:
            head_bias_ptr = bias_ptr + i_h * classes_q * classes_k
        for start in range(begin, end, BLOCK_M):
            if PATTERN:
                if tile_state(tiles_ptr, num_words, start, i_n * BLOCK_N) != SKIP:
                    b_dk, b_dv = _gather_queries(
                        b_dk, b_dv, b_k, b_v, q_ptr + i_h * stride_qh, do_ptr + i_h * stride_doh, lse_ptr + i_h * Tq,
                        delta_ptr + i_h * Tq, lo_ptr, hi_ptr, span_q_ptr, allow_q_ptr, class_q_ptr, stride_qt,
                        stride_dot, o_n, b_span_k, b_bit, b_class_k, start, head_bias_ptr, seed_ptr, classes_q,
                        classes_k, keep_below, keep_factor, i_h, Tq, Tk, scale, D, DV, BLOCK_M, BLOCK_N, BLOCK_D,
                        BLOCK_DV, PATTERN, BIAS, DROPOUT,
                    )  # fmt: skip
            else:
                b_dk, b_dv = _gather_queries(
                    b_dk, b_dv, b_k, b_v, q_ptr + i_h * stride_qh, do_ptr + i_h * stride_doh, lse_ptr + i_h * Tq,
                    delta_ptr + i_h * Tq, lo_ptr, hi_ptr, span_q_ptr, allow_q_ptr, class_q_ptr, stride_qt, stride_dot,
                    o_n, b_span_k, b_bit, b_class_k, start, head_bias_ptr, seed_ptr, classes_q, classes_k, keep_below,
                    keep_factor, i_h, Tq, Tk, scale, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PATTERN, BIAS,
                    DROPOUT,
                )  # fmt: skip
    store_tile(dk_ptr + i_hkv * stride_dkh, o_n, o_d, stride_dkt, Tk, D, b_dk * scale)
    store_tile(dv_ptr + i_hkv * stride_dvh, o_n, o_dv, stride_dvt, Tk, DV, b_dv)


@triton.jit
def _gather_keys(
    b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi,
    b_span, b_allow, b_class,
    start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k, keep_below,
    keep_factor, i_h, i_m,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr, MASKED: tl.constexpr, PATTERN: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """b_dq + ds k over the keys [start, start + BLOCK_N).

    With a bias also sums of ds and, for 16-bit inputs, of p over the keys of each class, and of p dp over all.
    """
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(k_ptr, o_n, tl.arange(0, BLOCK_D), stride_kt, end, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    b_v = load_tile(v_ptr, o_n, tl.arange(0, BLOCK_DV), stride_vt, end, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
    b_s = dot(b_q, tl.trans(b_k)) * factor  # [BLOCK_M, BLOCK_N]
    if BIAS:
        b_class_k = load_ints(class_k_ptr, o_n, end, True)
        b_bias = bias_of(bias_ptr, b_class[:, None], b_class_k[None, :], classes_q, classes_k)
        b_s += in_log2(b_bias, b_q.dtype)
    b_p = exponential(b_s - b_lse[:, None], b_q.dtype)
    if MASKED:
        b_span_k, b_bit = load_ints(span_k_ptr, o_n, end, PATTERN), load_ints(bit_k_ptr, o_n, end, PATTERN)
        m_visible = visible(
            b_lo[:, None], b_hi[:, None], b_span[:, None], b_allow[:, None], o_n[None, :], b_span_k[None, :],
            b_bit[None, :], PATTERN,
        )  # fmt: skip
        b_p = tl.where(m_visible, b_p, 0.0)
    b_dp = dot(b_do, tl.trans(b_v))  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        m_keep = keep_tile(seed_ptr, i_h, o_n, i_m * BLOCK_M, keep_below, BLOCK_M, BLOCK_N)
        b_dp = tl.where(tl.trans(m_keep), b_dp * keep_factor, 0.0)
    b_exact = b_p * (b_dp - b_delta[:, None])  # [BLOCK_M, BLOCK_N]
    b_ds = cast(b_exact, b_k.dtype)
    b_dq += dot(b_ds, b_k)
    if BIAS:
        b_one = b_class_k[:, None] == tl.arange(0, BLOCK_C)[None, :]  # [BLOCK_N, BLOCK_C]
        b_one = cast(tl.where(b_one, 1.0, 0.0), b_ds.dtype)
        b_sums += dot(b_ds, b_one)
        if b_ds.dtype != tl.float32:  # what rounding to 16 bits has cut off: thousands of terms cancel in these sums
            b_sums += dot(cast(b_exact - b_ds.to(tl.float32), b_ds.dtype), b_one)
            b_mass += dot(cast(b_p, b_ds.dtype), b_one)
            b_dot += tl.sum(b_p * b_dp, 1)
    return b_dq, b_sums, b_mass, b_dot


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, lo_ptr, hi_ptr,
    span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, tiles_ptr, class_q_ptr, class_k_ptr, bias_ptr, sink_ptr, seed_ptr,
    num_words, classes_q, classes_k, keep_below, keep_factor,
    dq_ptr, row_sums_ptr, grad_lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dot, stride_doh, stride_dqt, stride_dqh,
    Tq, Tk, group, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr,
    PATTERN: tl.constexpr, BIAS: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k_ptr += i_h // group * stride_kh
    v_ptr += i_h // group * stride_vh
    if BIAS:
        bias_ptr += i_h * classes_q * classes_k
    b_lo, b_hi = load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk)
    b_span, b_allow = load_ints(span_q_ptr, o_m, Tq, PATTERN), load_ints(allow_q_ptr, o_m, Tq, PATTERN)
    b_class = load_ints(class_q_ptr, o_m, Tq, BIAS)
    begin, full_begin, full_end, end = key_ranges(b_lo, b_hi, o_m < Tq, BLOCK_N)
    b_q = load_tile(q_ptr + i_h * stride_qh, o_m, o_d, stride_qt, Tq, D, BLOCK_D, True)
    b_do = load_tile(do_ptr + i_h * stride_doh, o_m, o_dv, stride_dot, Tq, DV, BLOCK_DV, True)
    b_lse = in_log2(tl.load(lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0), b_q.dtype)
    b_delta = tl.load(delta_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_mass = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_dot = tl.zeros([BLOCK_M], tl.float32)
    factor = in_log2(scale, b_q.dtype)
    if PATTERN:
        for start in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            state = tile_state(tiles_ptr, num_words, i_m * BLOCK_M, start)
            if state == FULL:
                b_dq, b_sums, b_mass, b_dot = _gather_keys(
                    b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt,
                    b_lo, b_hi, b_span, b_allow, b_class, start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr,
                    bias_ptr, seed_ptr,
                    classes_q, classes_k, keep_below, keep_factor, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                    BLOCK_C, False, True, BIAS, DROPOUT,
                )  # fmt: skip
            elif state != SKIP:
                b_dq, b_sums, b_mass, b_dot = _gather_keys(
                    b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt,
                    b_lo, b_hi, b_span, b_allow, b_class, start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr,
                    bias_ptr, seed_ptr,
                    classes_q, classes_k, keep_below, keep_factor, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                    BLOCK_C, True, True, BIAS, DROPOUT,
                )  # fmt: skip
    else:
        for start in range(begin, full_begin, BLOCK_N):
            b_dq, b_sums, b_mass, b_dot = _gather_keys(
                b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt,
                b_lo, b_hi, b_span, b_allow, b_class, start, full_begin, factor, span_k_ptr, bit_k_ptr, class_k_ptr,
                bias_ptr, seed_ptr,
                classes_q, classes_k, keep_below, keep_factor, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                BLOCK_C, True, False, BIAS, DROPOUT,
            )  # fmt: skip
        for start in range(full_begin, full_end, BLOCK_N):
            b_dq, b_sums, b_mass, b_dot = _gather_keys(
                b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt,
                b_lo, b_hi, b_span, b_allow, b_class, start, full_end, factor, span_k_ptr, bit_k_ptr, class_k_ptr,
                bias_ptr, seed_ptr,
                classes_q, classes_k, keep_below, keep_factor, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                BLOCK_C, False, False, BIAS, DROPOUT,
            )  # fmt: skip
        for start in range(full_end, end, BLOCK_N):
            b_dq, b_sums, b_mass, b_dot = _gather_keys(
                b_dq, b_sums, b_mass, b_dot, b_q, b_do, b_lse, b_delta, k_ptr, v_ptr, stride_kt, stride_vt,
                b_lo, b_hi, b_span, b_allow, b_class, start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr,
                bias_ptr, seed_ptr,
                classes_q, classes_k, keep_below, keep_factor, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                BLOCK_C, True, False, BIAS, DROPOUT,
            )  # fmt: skip
    store_tile(dq_ptr + i_h * stride_dqh, o_m, o_d, stride_dqt, Tq, D, b_dq * scale)
    if BIAS:
        o_c = tl.arange(0, BLOCK_C)
        row_sums_ptr += i_h * classes_k * Tq
        # delta has the rounding of a 16-bit out, the same for every key of a row: it would add up in these sums, so the
        # sum of p dp takes its place here.
        if b_q.dtype != tl.float32:
            b_exact = b_dot
            if HAS_DLSE:
                b_exact -= tl.load(grad_lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
            b_sums += (b_delta - b_exact)[:, None] * b_mass
        m_sums = (o_m < Tq)[:, None] & (o_c < classes_k)[None, :]
        tl.store(row_sums_ptr + o_c[None, :].to(tl.int64) * Tq + o_m[:, None], b_sums, mask=m_sums)


def _dkdv_config(single: bool, head_dim: int, major: int) -> dict[str, int]:
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


def _dq_config(single: bool, head_dim: int, major: int) -> dict[str, int]:
    """Tiles and launch options that compile without spills for sm_80, sm_90 and sm_100."""
    if single:
        if head_dim <= 64:
            return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
        return tiles(16 if major >= 10 else 32, 16, 8)
    if head_dim <= 64:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    if head_dim <= 128:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}


def _rich_dkdv_config(single: bool, head_dim: int, major: int) -> dict[str, int]:
    """The same with registers left for a pattern, a bias and dropout; tiles lie inside those of the tile map."""
    if single:
        return tiles(16, 32, 4) if head_dim <= 64 else tiles(16, 16, 8)
    if head_dim <= 128:
        if major >= 9:
            return tiles(32, 64, 8)
        return tiles(16, 64, 4) if head_dim <= 64 else tiles(16, 64, 8)
    return tiles(32, 32, 8) if major != 9 else tiles(16, 32, 8)


def _rich_dq_config(single: bool, head_dim: int, major: int) -> dict[str, int]:
    """The same with registers left for a pattern, a bias and dropout; tiles lie inside those of the tile map."""
    if single:
        return tiles(16, 32, 4) if head_dim <= 64 else tiles(16, 16, 8)
    if head_dim <= 128:
        return tiles(64, 32 if major >= 10 else 16, 8)
    return tiles(16, 16 if major >= 10 else 32, 4)


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: MaskRows,
    options: Options,
) -> tuple[Tensor, ...]:
    """dq, dk, dv, dbias and dsink, contiguous; the last two empty where there is none."""
    do, q, k, v, out = (unit_rows(x) for x in (grad_out, q, k, v, out))
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta, dbias, dsink, row_sums = torch.empty_like(lse), lse.new_empty(0), lse.new_empty(0), None
    if options.pair_bias is not None:
        row_sums = lse.new_empty((H, options.pair_bias.shape[2], Tq))
    single, widest, rich = q.dtype == torch.float32, max(D, DV), is_rich(rows, options)
    major = generation(q.device)
    sizes = {"D": D, "DV": DV, "BLOCK_D": block_dim(D), "BLOCK_DV": block_dim(DV), **flags(rows, options)}
    inputs = (q, k, v, do, lse, delta, rows.lo, rows.hi, *arguments(rows, options))
    strides = tuple(stride for x in (q, k, v, do) for stride in x.stride()[:2])
    scalars = (Tq, Tk, H // Hkv, options.scale)
    if Tq > 0:
        dlse = grad_lse.contiguous() if grad_lse is not None else None
        _attention_delta_kernel[(triton.cdiv(Tq, DELTA_BLOCK_M), H)](
            do, out, dlse, delta, *do.stride()[:2], *out.stride()[:2], Tq,
            DV=DV, HAS_DLSE=dlse is not None, BLOCK_M=DELTA_BLOCK_M, BLOCK_DV=sizes["BLOCK_DV"],
        )  # fmt: skip
        config = (_rich_dq_config if rich else _dq_config)(single, widest, major)
        _attention_dq_kernel[(triton.cdiv(Tq, config["BLOCK_M"]), H)](
            *inputs, dq, row_sums, dlse, *strides, *dq.stride()[:2], *scalars,
            BLOCK_C=class_block(options.pair_bias), HAS_DLSE=dlse is not None, **sizes, **config,
        )  # fmt: skip
    if Tk > 0:
        config = (_rich_dkdv_config if rich else _dkdv_config)(single, widest, major)
        _attention_dkdv_kernel[(triton.cdiv(Tk, config["BLOCK_N"]), Hkv)](
            *inputs, rows.first_q, rows.last_q, dk, dv, *strides, *dk.stride()[:2], *dv.stride()[:2], *scalars,
            **sizes, **config,
        )  # fmt: skip
    if row_sums is not None:
        dbias = bias_gradient(row_sums, rows, options)
    if options.sink is not None:
        dsink = sink_gradient(delta, lse, options.sink)
    return dq, dk, dv, dbias, dsink


def aot_cases() -> list[Any]:
    """Every configuration that the launcher uses."""
    cases = []
    for arch, kind, head_dim, rich in aot_launches():
        block, single = block_dim(head_dim), kind == "fp32"
        sizes: dict[str, Any] = {"D": head_dim, "DV": head_dim, "BLOCK_D": block, "BLOCK_DV": block}
        sizes |= dict.fromkeys(ALL_FLAGS, rich)
        dkdv = (_rich_dkdv_config if rich else _dkdv_config)(single, head_dim, arch // 10)
        dq = (_rich_dq_config if rich else _dq_config)(single, head_dim, arch // 10)
        if not rich:
            delta: dict[str, Any] = {"DV": head_dim, "BLOCK_DV": block, "HAS_DLSE": True}
            rows = {"BLOCK_M": DELTA_BLOCK_M}
            cases.append(aot_case("delta", _attention_delta_kernel, kind, head_dim, rows, arch, **delta))
        cases.append(aot_case("dkdv", _attention_dkdv_kernel, kind, head_dim, dkdv, arch, **sizes))
        classes: dict[str, Any] = {"BLOCK_C": 16 * (1 + rich), "HAS_DLSE": rich}
        cases.append(aot_case("dq", _attention_dq_kernel, kind, head_dim, dq, arch, **classes, **sizes))
    return cases
