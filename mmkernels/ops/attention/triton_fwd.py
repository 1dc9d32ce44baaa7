"""Forward in Triton, and helpers shared with the backward.

A program owns BLOCK_M queries of one head and loops over the keys that any of them sees, BLOCK_N at a time, with the
online softmax (running maximum m and sum l). Keys that every row of the tile sees need no mask, so the loop has three
parts: partial, full, partial. Tiles outside the rows' hull are never visited. A mask with a pattern has a tile map
instead, which marks each key tile as skipped, masked or full.

Accumulators are float32; probabilities are rounded to the input's dtype for the second product. Scores of 16-bit inputs
are in units of log2, which saves a product before each exp2. Float32 scores are natural: rounding them at 1.44 times
their size would dominate the error of the result.

Related arguments are grouped in NamedTuples, on the host and in the kernels: `MaskRows`, `Heads`, `Extras`. A field
that is None is None at compile time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.reference import largest
from mmkernels.ops.attention.triton_scores import bias_of, distance_of, exponential, in_log2, score_tile, slope_of
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.triton_common import LN_2, block_dim, cast, dot, generation, larger, largest_of, unit_rows

__all__ = ["attention_fwd"]

INT32_MAX = tl.constexpr(2**31 - 1)

# States and sizes of the tile map (tiles.py).
SKIP, FULL = tl.constexpr(0), tl.constexpr(2)
TILE_Q, TILE_K = tl.constexpr(128), tl.constexpr(64)


class Heads(NamedTuple):
    """A tensor [T, H, D] with unit stride along D."""

    ptr: Any
    stride_t: Any
    stride_h: Any


class Head(NamedTuple):
    """One head of `Heads`: [T, D]."""

    ptr: Any
    stride_t: Any


class Extras(NamedTuple):
    """`Options` as the kernels read them; None for options not given."""

    scale: Any
    pair_bias: Any  # [H, classes_q, classes_k]
    classes_q: Any
    classes_k: Any
    sink: Any  # [H]
    seed: Any  # [1]
    keep_below: Any  # dropout keeps 31-bit words below this
    keep_factor: Any
    softcap: Any
    scale_in_cap: Any  # scale / softcap
    slopes: Any  # [H]


class Queries(NamedTuple):
    """A tile's queries and their mask rows: [BLOCK_M] each, except `first`, the index of the first query."""

    first: Any
    index: Any
    lo: Any
    hi: Any
    span: Any
    allow: Any
    kind: Any  # class
    at: Any  # the key at the same position


class Keys(NamedTuple):
    """A tile's keys: [BLOCK_N] each."""

    index: Any
    span: Any
    bit: Any
    kind: Any  # class


@triton.jit
def of_head(x, i_h):
    return Head(x.ptr + i_h * x.stride_h, x.stride_t)


@triton.jit
def load_tile(x, o_t, T, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_T: tl.constexpr):
    """Rows o_t of a Head, zeros outside: [len(o_t), BLOCK_D]."""
    o_d = tl.arange(0, BLOCK_D)
    pointers = x.ptr + o_t.to(tl.int64)[:, None] * x.stride_t + o_d[None, :]
    if CHECK_T:
        if D == BLOCK_D:
            return tl.load(pointers, mask=(o_t < T)[:, None], other=0.0)
        return tl.load(pointers, mask=(o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_tile(x, o_t, T, D: tl.constexpr, b_x):
    o_d = tl.arange(0, b_x.shape[1])
    pointers = x.ptr + o_t.to(tl.int64)[:, None] * x.stride_t + o_d[None, :]
    tl.store(pointers, cast(b_x, x.ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def load_ints(ptr, o, T):
    """int32 entries o of a vector of length T, zeros past its end; an unused 0 if ptr is None."""
    if ptr is not None:
        return tl.load(ptr + o, mask=o < T, other=0)
    else:
        return 0


@triton.jit
def load_queries(rows, first, Tq, Tk, BLOCK_M: tl.constexpr):
    """BLOCK_M queries starting at `first`. Intervals are clamped to [0, Tk); rows past the end see nothing."""
    o_m = first + tl.arange(0, BLOCK_M)
    b_lo = tl.maximum(tl.load(rows.lo + o_m, mask=o_m < Tq, other=0), 0)
    b_hi = tl.minimum(tl.load(rows.hi + o_m, mask=o_m < Tq, other=0), Tk)
    b_span, b_allow = load_ints(rows.span_q, o_m, Tq), load_ints(rows.allow_q, o_m, Tq)
    b_kind, b_at = load_ints(rows.class_q, o_m, Tq), load_ints(rows.at_q, o_m, Tq)
    return Queries(first, o_m, b_lo, b_hi, b_span, b_allow, b_kind, b_at)


@triton.jit
def load_keys(rows, first, end, BLOCK_N: tl.constexpr):
    """BLOCK_N keys starting at `first`; zeros past the end."""
    o_n = first + tl.arange(0, BLOCK_N)
    b_span, b_bit = load_ints(rows.span_k, o_n, end), load_ints(rows.bit_k, o_n, end)
    return Keys(o_n, b_span, b_bit, load_ints(rows.class_k, o_n, end))


@triton.jit
def visible(queries, keys, rows, KEYS: tl.constexpr):
    """Which queries see which keys; keys lie along axis KEYS of the tile."""
    o_n = tl.expand_dims(keys.index, 1 - KEYS)
    m_visible = (tl.expand_dims(queries.lo, KEYS) <= o_n) & (o_n < tl.expand_dims(queries.hi, KEYS))
    if rows.span_q is not None:
        m_span = tl.expand_dims(queries.span, KEYS) == tl.expand_dims(keys.span, 1 - KEYS)
        m_allow = (tl.expand_dims(queries.allow, KEYS) & tl.expand_dims(keys.bit, 1 - KEYS)) != 0
        m_visible = m_visible & (m_span | m_allow)
    return m_visible


@triton.jit
def tile_state(rows, query, key, Tk):
    """State of the tile that holds this query and key; sixteen states per word."""
    i_key = key // TILE_K
    word = tl.load(rows.tiles + query // TILE_Q * tl.cdiv(Tk, TILE_K * 16) + i_key // 16)
    return (word >> (i_key % 16 * 2)) & 3


@triton.jit
def hull(first_ptr, last_ptr, o, T, limit):
    """Bounds of the union of the intervals of rows o, inside [0, limit]."""
    b_first = tl.maximum(tl.load(first_ptr + o, mask=o < T, other=0), 0)
    b_last = tl.minimum(tl.load(last_ptr + o, mask=o < T, other=0), limit)
    begin = tl.min(tl.where(b_first < b_last, b_first, INT32_MAX), 0)
    return begin, tl.max(tl.where(b_first < b_last, b_last, 0), 0)


@triton.jit
def key_ranges(queries, Tq, BLOCK_N: tl.constexpr):
    """Bounds of the loop over keys: begin <= full_begin <= full_end <= end.

    [begin, end) is the hull of the rows' intervals. Every row sees all of [full_begin, full_end), which is tile-aligned
    relative to begin.
    """
    m_row = queries.index < Tq
    m_seen = m_row & (queries.lo < queries.hi)
    begin = tl.min(tl.where(m_seen, queries.lo, INT32_MAX), 0)
    end = tl.max(tl.where(m_seen, queries.hi, 0), 0)
    begin = tl.minimum(begin, end)
    all_from = tl.max(tl.where(m_row, queries.lo, 0), 0)
    all_to = tl.minimum(tl.min(tl.where(m_row, queries.hi, end), 0), end)  # end: 0 if no row sees a key
    full_begin = tl.minimum(begin + tl.cdiv(tl.maximum(all_from - begin, 0), BLOCK_N) * BLOCK_N, end)
    full_end = full_begin + tl.maximum(all_to - full_begin, 0) // BLOCK_N * BLOCK_N
    return begin, full_begin, full_end, end


@triton.jit
def keep_tile(extras, i_h, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pairs of a tile that dropout keeps, [BLOCK_N, BLOCK_M]; its first query is a multiple of 4.

    Philox gives four words at a counter (key, query // 4, head, 0), one for each of four queries.
    """
    zero = tl.zeros([BLOCK_N, BLOCK_M // 4], tl.int32)
    o_group = queries.first // 4 + tl.arange(0, BLOCK_M // 4)
    b_key = (zero + keys.index[:, None]).to(tl.uint32)
    b_group = (zero + o_group[None, :]).to(tl.uint32)
    b_head = (zero + i_h.to(tl.int32)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(extras.seed), b_key, b_group, b_head, zero.to(tl.uint32))
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_N, BLOCK_M / 4, 2, 2], in the order 0, 1, 2, 3
    return (tl.reshape(b_words, [BLOCK_N, BLOCK_M]) >> 1).to(tl.int32) < extras.keep_below


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_top, b_q, queries, k, v, rows, extras, i_h, start, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, WITH_MAX: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, start + BLOCK_N), those before `end` if MASKED."""
    keys = load_keys(rows, start, end, BLOCK_N)
    b_k = load_tile(k, keys.index, end, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    b_products = dot(b_q, tl.trans(b_k))  # [BLOCK_M, BLOCK_N]
    if WITH_MAX:
        b_seen = b_products * extras.scale
        if MASKED:
            b_seen = tl.where(visible(queries, keys, rows, 1), b_seen, float("-inf"))
        b_top = larger(b_top, largest_of(b_seen, 1))
    b_s, _ = score_tile(extras, b_products, b_q.dtype)  # [BLOCK_M, BLOCK_N]
    if extras.pair_bias is not None:
        b_s += bias_of(extras, i_h, queries.kind[:, None], keys.kind[None, :], b_q.dtype)
    if extras.slopes is not None:
        b_s -= slope_of(extras, i_h, b_q.dtype) * distance_of(queries.at[:, None], keys.index[None, :])
    if MASKED:
        b_s = tl.where(visible(queries, keys, rows, 1), b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # A row that has seen no key yet keeps m = -inf; subtracting 0 instead keeps its exponents at -inf.
    b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = exponential(b_s - b_shift[:, None], b_q.dtype)  # [BLOCK_M, BLOCK_N]
    b_alpha = exponential(b_m - b_shift, b_q.dtype)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    if extras.seed is not None:
        m_keep = keep_tile(extras, i_h, queries, keys, BLOCK_M, BLOCK_N)
        b_p = tl.where(tl.trans(m_keep), b_p, 0.0)
    b_v = load_tile(v, keys.index, end, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
    b_acc = b_acc * b_alpha[:, None] + dot(cast(b_p, b_v.dtype), b_v)
    return b_acc, b_m_new, b_l, b_top


@triton.jit
def _attention_fwd_kernel(
    q, k, v, out,  # Heads
    lse_ptr,  # [H, Tq]
    row_max_ptr,  # [H, Tq]: largest scaled product of a row; None if not wanted
    rows, extras, Tq, Tk, group,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k, v = of_head(k, i_h // group), of_head(v, i_h // group)
    queries = load_queries(rows, i_m * BLOCK_M, Tq, Tk, BLOCK_M)
    bounds = key_ranges(queries, Tq, BLOCK_N)
    o_m = queries.index
    b_q = load_tile(of_head(q, i_h), o_m, Tq, D, BLOCK_D, True)

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    WITH_MAX: tl.constexpr = row_max_ptr is not None
    b_top = b_m
    if rows.tiles is not None:
        for start in range(bounds[0] // BLOCK_N * BLOCK_N, bounds[3], BLOCK_N):
            state = tile_state(rows, queries.first, start, Tk)
            if state == FULL:
                b_acc, b_m, b_l, b_top = _attend(
                    b_acc, b_m, b_l, b_top, b_q, queries, k, v, rows, extras, i_h, start, bounds[3],
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, WITH_MAX,
                )  # fmt: skip
            elif state != SKIP:
                b_acc, b_m, b_l, b_top = _attend(
                    b_acc, b_m, b_l, b_top, b_q, queries, k, v, rows, extras, i_h, start, bounds[3],
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, WITH_MAX,
                )  # fmt: skip
    else:
        for part in tl.static_range(3):  # partial, full, partial
            for start in range(bounds[part], bounds[part + 1], BLOCK_N):
                b_acc, b_m, b_l, b_top = _attend(
                    b_acc, b_m, b_l, b_top, b_q, queries, k, v, rows, extras, i_h, start, bounds[part + 1],
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, part != 1, WITH_MAX,
                )  # fmt: skip

    m_empty = b_l == 0.0
    if extras.sink is not None:
        b_sink = in_log2(tl.load(extras.sink + i_h), b_q.dtype)
        b_m_new = tl.maximum(b_m, b_sink)
        b_alpha = exponential(b_m - b_m_new, b_q.dtype)
        b_acc = b_acc * b_alpha[:, None]
        b_l = b_l * b_alpha + exponential(b_sink - b_m_new, b_q.dtype)
        b_m = b_m_new
    b_out = b_acc / tl.where(m_empty, 1.0, b_l)[:, None]
    if extras.seed is not None:
        b_out = b_out * extras.keep_factor
    b_highest = b_m if b_q.dtype == tl.float32 else b_m * LN_2
    b_lse = tl.where(m_empty, float("-inf"), b_highest + tl.log2(tl.where(m_empty, 1.0, b_l)) * LN_2)
    store_tile(of_head(out, i_h), o_m, Tq, DV, b_out)
    tl.store(lse_ptr + i_h * Tq + o_m, b_lse, mask=o_m < Tq)
    if WITH_MAX:
        tl.store(row_max_ptr + i_h * Tq + o_m, b_top, mask=o_m < Tq)


def tiles(block_m: int, block_n: int, num_warps: int, num_stages: int = 1) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def fwd_config(pressure: int, single: bool, head_dim: int, major: int) -> dict[str, int]:
    """Tiles and launch options without spills on compute capability `major` (a float32 product is three of tf32).

    `pressure`: register_pressure of the call; where it is not 0, tiles lie inside tiles of the tile map.
    """
    if pressure:
        if single:
            return tiles(32, 32, 8) if head_dim <= 64 else tiles(16, 16, 8 if pressure == 2 and major >= 10 else 4)
        few = pressure == 2 and major == 8
        if head_dim <= 64:
            return tiles(64, 32, 8) if few else tiles(64, 64, 8, 2)
        return tiles(64, 32, 8) if head_dim <= 128 and not few else tiles(32, 32, 8)
    if single:
        return tiles(64, 32, 4) if head_dim <= 64 else tiles(32, 32, 8, 2)
    if head_dim <= 64:
        return tiles(128, 64, 4, 2 if major == 8 else 3)
    if head_dim <= 128:
        return tiles(128, 32 if major == 8 else 64, 8, 3)
    return tiles(64, 32, 8, 1 if major >= 10 else 2)


def as_heads(x: Tensor) -> Heads:
    return Heads(x, x.stride(0), x.stride(1))


def as_extras(options: Options) -> Extras:
    bias, seed, kept = options.pair_bias, options.seed, 1 - options.dropout_p
    classes_q, classes_k = (None, None) if bias is None else bias.shape[1:]
    keep_below, keep_factor = (None, None) if seed is None else (round(kept * 2**31), 1 / kept)
    cap, scale = options.softcap, options.scale
    in_cap = None if cap is None else scale / cap
    of_dropout = seed, keep_below, keep_factor
    return Extras(scale, bias, classes_q, classes_k, options.sink, *of_dropout, cap, in_cap, options.slopes)


def register_pressure(rows: MaskRows, options: Options) -> int:
    """How many registers a call needs beside its tiles, which must leave them: 0 without options (a sink needs none), 1
    with a pattern, a bias or dropout, 2 with a soft cap or distances."""
    if options.softcap is not None or options.slopes is not None:
        return 2
    return int(rows.tiles is not None or options.pair_bias is not None or options.seed is not None)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """out [Tq, H, Dv], lse [H, Tq] and max_logit [H], empty if not wanted."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    out = torch.empty((Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, Tq), dtype=torch.float32, device=q.device)
    row_max = torch.empty_like(lse) if options.with_max else None
    if Tq == 0:
        return out, lse, largest(row_max, lse)
    config = fwd_config(register_pressure(rows, options), q.dtype == torch.float32, max(D, DV), generation(q.device))
    _attention_fwd_kernel[(triton.cdiv(Tq, config["BLOCK_M"]), H)](
        as_heads(q), as_heads(k), as_heads(v), as_heads(out), lse, row_max, rows, as_extras(options), Tq, Tk, H // Hkv,
        D=D, DV=DV, BLOCK_D=block_dim(D), BLOCK_DV=block_dim(DV), **config,
    )  # fmt: skip
    return out, lse, largest(row_max, lse)
