"""Backward in Triton: three kernels, no atomics, bitwise reproducible.

With p_ij = exp(s_ij - lse_i), dp_ij = <do_i, v_j>, delta_i = <do_i, out_i> - dlse_i and ds_ij = p_ij (dp_ij - delta_i):

    delta     a program owns BLOCK_M queries of a head
    dk, dv    a program owns BLOCK_N keys of a key/value head and loops over the hull of their queries, for each
              query head of the group in turn:  dv_j = sum_i p_ij do_i,  dk_j = scale sum_i ds_ij q_i
    dq        a program owns BLOCK_M queries of a head and loops over their keys as the forward does:
              dq_i = scale sum_j ds_ij k_j;  for a pair bias it adds up ds over the keys of each class, by products
              with a one-hot matrix

Both recompute the scores: seven products instead of the minimum of five. Sums are float32 and cast once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.reference import bias_gradient, sink_gradient, slope_gradient
from mmkernels.ops.attention.triton_fwd import (
    FULL,
    SKIP,
    as_extras,
    as_heads,
    hull,
    keep_tile,
    key_ranges,
    load_ints,
    load_keys,
    load_queries,
    load_tile,
    of_head,
    register_pressure,
    store_tile,
    tile_state,
    tiles,
    visible,
)
from mmkernels.ops.attention.triton_scores import bias_of, distance_of, exponential, in_log2, score_tile, slope_of
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.triton_common import block_dim, cast, dot, generation, unit_rows

__all__ = ["attention_bwd"]

DELTA_BLOCK_M = 32


@triton.jit
def _attention_delta_kernel(
    do, out,  # Heads
    dlse_ptr,  # [H, Tq], or None
    delta_ptr,  # [H, Tq]
    Tq,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    b_do = load_tile(of_head(do, i_h), o_m, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    b_out = load_tile(of_head(out, i_h), o_m, Tq, DV, BLOCK_DV, True)  # [BLOCK_M, BLOCK_DV]
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)  # [BLOCK_M]
    if dlse_ptr is not None:
        b_delta -= tl.load(dlse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
    tl.store(delta_ptr + i_h * Tq + o_m, b_delta, mask=o_m < Tq)


@triton.jit
def _gather_queries(
    b_dk, b_dv, b_k, b_v, keys, q, do, lse_ptr, delta_ptr, rows, extras, i_h, start, Tq, Tk,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """dk and dv with the queries [start, start + BLOCK_M) of a head added."""
    o_m = start + tl.arange(0, BLOCK_M)
    b_q = load_tile(of_head(q, i_h), o_m, Tq, D, BLOCK_D, True)
    b_do = load_tile(of_head(do, i_h), o_m, Tq, DV, BLOCK_DV, True)
    b_lse = in_log2(tl.load(lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0), b_k.dtype)
    b_s, b_slope = score_tile(extras, dot(b_k, tl.trans(b_q)), b_k.dtype)  # [BLOCK_N, BLOCK_M]
    # Load these only now: the rows of the largest tiles fill the registers.
    if extras.pair_bias is not None:
        b_s += bias_of(extras, i_h, load_ints(rows.class_q, o_m, Tq)[None, :], keys.kind[:, None], b_k.dtype)
    if extras.slopes is not None:
        b_at = load_ints(rows.at_q, o_m, Tq)
        b_s -= slope_of(extras, i_h, b_k.dtype) * distance_of(b_at[None, :], keys.index[:, None])
    queries = load_queries(rows, start, Tq, Tk, BLOCK_M)
    m_visible = visible(queries, keys, rows, 0)
    b_p = tl.where(m_visible, exponential(b_s - b_lse[None, :], b_k.dtype), 0.0)  # [BLOCK_N, BLOCK_M]
    b_dp = dot(b_v, tl.trans(b_do))  # [BLOCK_N, BLOCK_M]
    if extras.seed is not None:
        m_keep = keep_tile(extras, i_h, queries, keys, BLOCK_M, BLOCK_N)
        b_z = tl.where(m_keep, extras.keep_factor, 0.0)
        b_dv += dot(cast(b_p * b_z, b_do.dtype), b_do)
        b_dp = b_dp * b_z
    else:
        b_dv += dot(cast(b_p, b_do.dtype), b_do)
    b_delta = tl.load(delta_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
    b_ds = b_p * (b_dp - b_delta[None, :])
    if extras.softcap is not None:
        b_ds = b_ds * b_slope
    b_dk += dot(cast(b_ds, b_q.dtype), b_q)
    return b_dk, b_dv


@triton.jit
def _attention_dkdv_kernel(
    q, k, v, do, dk, dv,  # Heads
    lse_ptr, delta_ptr,  # [H, Tq]
    rows, extras, Tq, Tk, group,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    first_k, i_hkv = tl.program_id(0) * BLOCK_N, tl.program_id(1).to(tl.int64)
    keys = load_keys(rows, first_k, Tk, BLOCK_N)
    o_n = keys.index
    begin, end = hull(rows.first_q, rows.last_q, o_n, Tk, Tq)
    if (rows.tiles is not None) or (extras.seed is not None):  # align to map tiles, and to groups of four queries
        begin = begin // BLOCK_M * BLOCK_M

    b_k = load_tile(of_head(k, i_hkv), o_n, Tk, D, BLOCK_D, True)  # [BLOCK_N, BLOCK_D]
    b_v = load_tile(of_head(v, i_hkv), o_n, Tk, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for i_g in range(group):
        i_h = i_hkv * group + i_g
        for start in range(begin, end, BLOCK_M):
            state = FULL
            if rows.tiles is not None:
                state = tile_state(rows, start, first_k, Tk)
            if state != SKIP:
                b_dk, b_dv = _gather_queries(
                    b_dk, b_dv, b_k, b_v, keys, q, do, lse_ptr, delta_ptr, rows, extras, i_h, start, Tq, Tk,
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
    store_tile(of_head(dk, i_hkv), o_n, Tk, D, b_dk * extras.scale)
    store_tile(of_head(dv, i_hkv), o_n, Tk, DV, b_dv)


@triton.jit
def _gather_keys(
    b_dq, b_sums, b_mass, b_dot, b_far, b_reach, b_q, b_do, b_lse, b_delta, queries, k, v, rows, extras, i_h,
    start, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr, BY_CLASS: tl.constexpr, BY_DISTANCE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """b_dq + ds k over the keys [start, start + BLOCK_N).

    BY_CLASS also sums of ds and, for 16-bit inputs, of p over the keys of each class; BY_DISTANCE of both times
    distance; with either of p dp over all.
    """
    keys = load_keys(rows, start, end, BLOCK_N)
    b_k = load_tile(k, keys.index, end, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    b_v = load_tile(v, keys.index, end, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
    b_s, b_slope = score_tile(extras, dot(b_q, tl.trans(b_k)), b_q.dtype)  # [BLOCK_M, BLOCK_N]
    if extras.pair_bias is not None:
        b_s += bias_of(extras, i_h, queries.kind[:, None], keys.kind[None, :], b_q.dtype)
    if extras.slopes is not None:
        b_s -= slope_of(extras, i_h, b_q.dtype) * distance_of(queries.at[:, None], keys.index[None, :])
    b_p = exponential(b_s - b_lse[:, None], b_q.dtype)
    if MASKED:
        b_p = tl.where(visible(queries, keys, rows, 1), b_p, 0.0)
    b_dp = dot(b_do, tl.trans(b_v))  # [BLOCK_M, BLOCK_N]
    if extras.seed is not None:
        m_keep = keep_tile(extras, i_h, queries, keys, BLOCK_M, BLOCK_N)
        b_dp = tl.where(tl.trans(m_keep), b_dp * extras.keep_factor, 0.0)
    b_exact = b_p * (b_dp - b_delta[:, None])  # [BLOCK_M, BLOCK_N]
    b_ds = cast(b_exact, b_k.dtype)
    if extras.softcap is not None:
        b_dq += dot(cast(b_exact * b_slope, b_k.dtype), b_k)
    else:
        b_dq += dot(b_ds, b_k)
    if BY_CLASS:
        b_one = keys.kind[:, None] == tl.arange(0, BLOCK_C)[None, :]  # [BLOCK_N, BLOCK_C]
        b_one = cast(tl.where(b_one, 1.0, 0.0), b_ds.dtype)
        b_sums += dot(b_ds, b_one)
        if b_ds.dtype != tl.float32:  # the 16-bit rounding error: thousands of terms cancel in these sums
            b_sums += dot(cast(b_exact - b_ds.to(tl.float32), b_ds.dtype), b_one)
            b_mass += dot(cast(b_p, b_ds.dtype), b_one)
    if BY_DISTANCE:
        b_distance = distance_of(queries.at[:, None], keys.index[None, :])
        b_far += tl.sum(b_exact * b_distance, 1)
        if b_ds.dtype != tl.float32:
            b_reach += tl.sum(b_p * b_distance, 1)
    if (BY_CLASS or BY_DISTANCE) and b_ds.dtype != tl.float32:
        b_dot += tl.sum(b_p * b_dp, 1)
    return b_dq, b_sums, b_mass, b_dot, b_far, b_reach


@triton.jit
def _attention_dq_kernel(
    q, k, v, do, dq,  # Heads
    lse_ptr, delta_ptr,  # [H, Tq]
    row_sums_ptr,  # [H, classes_k, Tq]: sums of ds over the keys of a class; None if not wanted
    distance_sums_ptr,  # [H, Tq]: sums of ds times distance; None if not wanted
    dlse_ptr,  # [H, Tq], or None
    rows, extras, Tq, Tk, group,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, v = of_head(k, i_h // group), of_head(v, i_h // group)
    queries = load_queries(rows, i_m * BLOCK_M, Tq, Tk, BLOCK_M)
    bounds = key_ranges(queries, Tq, BLOCK_N)
    o_m = queries.index
    b_q = load_tile(of_head(q, i_h), o_m, Tq, D, BLOCK_D, True)
    b_do = load_tile(of_head(do, i_h), o_m, Tq, DV, BLOCK_DV, True)
    b_lse = in_log2(tl.load(lse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0), b_q.dtype)
    b_delta = tl.load(delta_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_sums = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_mass = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    b_dot = tl.zeros([BLOCK_M], tl.float32)
    b_far, b_reach = b_dot, b_dot
    BY_CLASS: tl.constexpr = row_sums_ptr is not None
    BY_DISTANCE: tl.constexpr = distance_sums_ptr is not None
    if rows.tiles is not None:
        for start in range(bounds[0] // BLOCK_N * BLOCK_N, bounds[3], BLOCK_N):
            state = tile_state(rows, queries.first, start, Tk)
            if state == FULL:
                b_dq, b_sums, b_mass, b_dot, b_far, b_reach = _gather_keys(
                    b_dq, b_sums, b_mass, b_dot, b_far, b_reach, b_q, b_do, b_lse, b_delta, queries, k, v, rows, extras,
                    i_h,
                    start, bounds[3], D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_C, BY_CLASS,
                    BY_DISTANCE, False,
                )  # fmt: skip
            elif state != SKIP:
                b_dq, b_sums, b_mass, b_dot, b_far, b_reach = _gather_keys(
                    b_dq, b_sums, b_mass, b_dot, b_far, b_reach, b_q, b_do, b_lse, b_delta, queries, k, v, rows, extras,
                    i_h,
                    start, bounds[3], D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_C, BY_CLASS,
                    BY_DISTANCE, True,
                )  # fmt: skip
    else:
        for part in tl.static_range(3):  # partial, full, partial
            for start in range(bounds[part], bounds[part + 1], BLOCK_N):
                b_dq, b_sums, b_mass, b_dot, b_far, b_reach = _gather_keys(
                    b_dq, b_sums, b_mass, b_dot, b_far, b_reach, b_q, b_do, b_lse, b_delta, queries, k, v, rows, extras,
                    i_h,
                    start, bounds[part + 1], D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, BLOCK_C, BY_CLASS,
                    BY_DISTANCE, part != 1,
                )  # fmt: skip
    store_tile(of_head(dq, i_h), o_m, Tq, D, b_dq * extras.scale)
    # delta carries the rounding error of a 16-bit out, which is the same for every key of a row and would add up in
    # these sums. Use the sum of p dp instead.
    b_error = tl.zeros([BLOCK_M], tl.float32)
    if (BY_CLASS or BY_DISTANCE) and b_q.dtype != tl.float32:
        b_exact = b_dot
        if dlse_ptr is not None:
            b_exact -= tl.load(dlse_ptr + i_h * Tq + o_m, mask=o_m < Tq, other=0.0)
        b_error = b_delta - b_exact
    if BY_DISTANCE:
        tl.store(distance_sums_ptr + i_h * Tq + o_m, b_far + b_error * b_reach, mask=o_m < Tq)
    if BY_CLASS:
        o_c = tl.arange(0, BLOCK_C)
        row_sums_ptr += i_h * extras.classes_k * Tq
        if b_q.dtype != tl.float32:
            b_sums += b_error[:, None] * b_mass
        m_sums = (o_m < Tq)[:, None] & (o_c < extras.classes_k)[None, :]
        tl.store(row_sums_ptr + o_c[None, :].to(tl.int64) * Tq + o_m[:, None], b_sums, mask=m_sums)


def dkdv_config(pressure: int, single: bool, head_dim: int, major: int) -> dict[str, int]:
    """As `fwd_config`, without spills on sm_80, sm_90 and sm_100."""
    if pressure:
        if single:
            return tiles(16, 32 if pressure == 1 else 16, 4) if head_dim <= 64 else tiles(16, 16, 8)
        if head_dim <= 128:
            if major >= 9:
                return tiles(32, 64 if pressure == 1 else 32, 8)
            return tiles(16, 64, 4) if head_dim <= 64 else tiles(16, 64 if pressure == 1 else 32, 8)
        if major >= 9 and pressure == 2:
            return tiles(32, 16, 8)
        return tiles(32, 32, 8) if major != 9 else tiles(16, 32, 8)
    if single:
        return tiles(32, 32, 4) if head_dim <= 64 else tiles(16, 16, 4)
    if head_dim <= 64:
        return tiles(32, 128, 8, 2)
    return tiles(32, 64, 8, 2) if head_dim <= 128 else tiles(32, 32, 8)


def dq_config(pressure: int, single: bool, head_dim: int, major: int) -> dict[str, int]:
    """As `fwd_config`, without spills on sm_80, sm_90 and sm_100."""
    if pressure:
        if single:
            return tiles(16, 32, 4) if head_dim <= 64 else tiles(16, 16, 8)
        if head_dim <= 128:
            if pressure == 2:
                return tiles(64 if major >= 10 else 32, 16, 8)
            return tiles(64, 32 if major >= 10 else 16, 8)
        return tiles(16, 16 if major >= 10 else 32, 4)
    if single:
        return tiles(32, 32, 4) if head_dim <= 64 else tiles(16 if major >= 10 else 32, 16, 8)
    if head_dim <= 64:
        return tiles(64, 64, 4, 2)
    return tiles(64, 64, 8, 2) if head_dim <= 128 else tiles(32, 32, 8)


def sums_of_launches(row_sums: Any, distance_sums: Any, single: bool, head_dim: int) -> list[tuple[Any, Any]]:
    """The sums of each launch for dq: one launch, or two where both kinds of sums would not fit the registers."""
    if single and head_dim > 64 and row_sums is not None and distance_sums is not None:
        return [(row_sums, None), (None, distance_sums)]
    return [(row_sums, distance_sums)]


def class_block(pair_bias: Tensor | None) -> int:
    """Columns of the one-hot matrix of key classes; tl.dot needs at least 16."""
    return 16 if pair_bias is None else block_dim(pair_bias.shape[2])


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
    """dq, dk, dv, dbias, dsink and dslopes, contiguous; the last three empty without a bias, sink or slopes."""
    do, q, k, v, out = (unit_rows(x) for x in (grad_out, q, k, v, out))
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta, row_sums = torch.empty_like(lse), None
    dbias, dsink, dslopes = (lse.new_empty(0) for _ in range(3))
    distance_sums = None if options.slopes is None else torch.zeros_like(lse)
    if options.pair_bias is not None:
        row_sums = lse.new_empty((H, options.pair_bias.shape[2], Tq))
    case = register_pressure(rows, options), q.dtype == torch.float32, max(D, DV), generation(q.device)
    sizes = {"D": D, "DV": DV, "BLOCK_D": block_dim(D), "BLOCK_DV": block_dim(DV)}
    inputs = tuple(as_heads(x) for x in (q, k, v, do))
    scalars = rows, as_extras(options), Tq, Tk, H // Hkv
    if Tq > 0:
        dlse = grad_lse.contiguous() if grad_lse is not None else None
        _attention_delta_kernel[(triton.cdiv(Tq, DELTA_BLOCK_M), H)](
            as_heads(do), as_heads(out), dlse, delta, Tq, DV=DV, BLOCK_M=DELTA_BLOCK_M, BLOCK_DV=sizes["BLOCK_DV"]
        )
        config = dq_config(*case)
        for sums in sums_of_launches(row_sums, distance_sums, *case[1:3]):
            _attention_dq_kernel[(triton.cdiv(Tq, config["BLOCK_M"]), H)](
                *inputs, as_heads(dq), lse, delta, *sums, dlse, *scalars,
                BLOCK_C=class_block(options.pair_bias), **sizes, **config,
            )  # fmt: skip
    if Tk > 0:
        config = dkdv_config(*case)
        _attention_dkdv_kernel[(triton.cdiv(Tk, config["BLOCK_N"]), Hkv)](
            *inputs, as_heads(dk), as_heads(dv), lse, delta, *scalars, **sizes, **config
        )
    if row_sums is not None:
        dbias = bias_gradient(row_sums, rows, options)
    if options.sink is not None:
        dsink = sink_gradient(delta, lse, options.sink)
    if distance_sums is not None:
        dslopes = slope_gradient(distance_sums)
    return dq, dk, dv, dbias, dsink, dslopes
