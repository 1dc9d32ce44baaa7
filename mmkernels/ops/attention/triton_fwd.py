"""Forward in Triton.

A program owns one tile of BLOCK_M queries of one head and walks the keys that any of them sees, BLOCK_N at a time, with
the online softmax (running maximum m and sum l). Keys that every row of the tile sees need no mask, so the walk has
three parts: partial, full, partial. Tiles outside the rows' hull are never visited. A mask with a pattern has a tile
map instead, which says of each tile of keys whether to skip it, to mask it or to take it whole.

Accumulators are float32; probabilities are rounded to the input's dtype for the second product. Scores of 16-bit inputs
are in units of log2, which saves a product before each exp2. In float32 they are natural: a score that is rounded at
1.44 times its size would be the largest error of the result.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.triton_extras import (
    FULL,
    POINTERS,
    SKIP,
    arguments,
    bias_of,
    flags,
    is_rich,
    keep_tile,
    load_ints,
    tile_state,
    visible,
)
from mmkernels.ops.attention.types import MaskRows, Options
from mmkernels.ops.triton_common import LN_2, LOG2_E, cast, dot, generation

__all__ = ["aot_cases", "attention_fwd"]

INT32_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def load_tile(base_ptr, o_t, o_d, stride_t, T, D: tl.constexpr, BLOCK_D: tl.constexpr, CHECK_T: tl.constexpr):
    """Rows o_t of a [T, D] matrix with unit stride along D; zeros outside: [len(o_t), BLOCK_D]."""
    pointers = base_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    if CHECK_T:
        if D == BLOCK_D:
            return tl.load(pointers, mask=(o_t < T)[:, None], other=0.0)
        return tl.load(pointers, mask=(o_t < T)[:, None] & (o_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def store_tile(base_ptr, o_t, o_d, stride_t, T, D: tl.constexpr, b_x):
    pointers = base_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    tl.store(pointers, cast(b_x, base_ptr.dtype.element_ty), mask=(o_t < T)[:, None] & (o_d < D)[None, :])


@triton.jit
def load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk):
    """Key intervals of the rows o_m, clamped to [0, Tk); rows past the end see nothing: 2 x [BLOCK_M]."""
    b_lo = tl.load(lo_ptr + o_m, mask=o_m < Tq, other=0)
    b_hi = tl.load(hi_ptr + o_m, mask=o_m < Tq, other=0)
    return tl.maximum(b_lo, 0), tl.minimum(b_hi, Tk)


@triton.jit
def key_ranges(b_lo, b_hi, m_row, BLOCK_N: tl.constexpr):
    """Bounds of the walk over keys: begin <= full_begin <= full_end <= end.

    [begin, end) is the hull of the rows' intervals; every row sees all of [full_begin, full_end), which is a whole
    number of tiles, a whole number of tiles after begin.
    """
    m_seen = m_row & (b_lo < b_hi)
    begin = tl.min(tl.where(m_seen, b_lo, INT32_MAX), 0)
    end = tl.max(tl.where(m_seen, b_hi, 0), 0)
    begin = tl.minimum(begin, end)
    all_from = tl.max(tl.where(m_row, b_lo, 0), 0)
    all_to = tl.min(tl.where(m_row, b_hi, end), 0)
    full_begin = tl.minimum(begin + tl.cdiv(tl.maximum(all_from - begin, 0), BLOCK_N) * BLOCK_N, end)
    full_end = full_begin + tl.maximum(all_to - full_begin, 0) // BLOCK_N * BLOCK_N
    return begin, full_begin, full_end, end


@triton.jit
def in_log2(x, dtype: tl.constexpr):
    """A factor of scores, or a natural logarithm, in the units that scores have for inputs of a type."""
    return x if dtype == tl.float32 else x * LOG2_E


@triton.jit
def exponential(x, dtype: tl.constexpr):
    """e to a difference of scores in those units."""
    return tl.exp2(x * LOG2_E) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class, start, end, factor,
    span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k, keep_below, i_h, i_m,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, MASKED: tl.constexpr, PATTERN: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, start + BLOCK_N), those before `end` if MASKED."""
    o_n = start + tl.arange(0, BLOCK_N)
    b_k = load_tile(k_ptr, o_n, tl.arange(0, BLOCK_D), stride_kt, end, D, BLOCK_D, MASKED)  # [BLOCK_N, BLOCK_D]
    b_s = dot(b_q, tl.trans(b_k)) * factor  # [BLOCK_M, BLOCK_N]
    if BIAS:
        b_class_k = load_ints(class_k_ptr, o_n, end, True)
        b_bias = bias_of(bias_ptr, b_class[:, None], b_class_k[None, :], classes_q, classes_k)
        b_s += in_log2(b_bias, b_q.dtype)
    if MASKED:
        b_span_k, b_bit = load_ints(span_k_ptr, o_n, end, PATTERN), load_ints(bit_k_ptr, o_n, end, PATTERN)
        m_visible = visible(
            b_lo[:, None], b_hi[:, None], b_span[:, None], b_allow[:, None], o_n[None, :], b_span_k[None, :],
            b_bit[None, :], PATTERN,
        )  # fmt: skip
        b_s = tl.where(m_visible, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, 1))
    # A row that has seen nothing yet keeps m = -inf; subtracting 0 instead leaves its exponents at -inf.
    b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    b_p = exponential(b_s - b_shift[:, None], b_q.dtype)  # [BLOCK_M, BLOCK_N]
    b_alpha = exponential(b_m - b_shift, b_q.dtype)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    if DROPOUT:
        m_keep = keep_tile(seed_ptr, i_h, o_n, i_m * BLOCK_M, keep_below, BLOCK_M, BLOCK_N)
        b_p = tl.where(tl.trans(m_keep), b_p, 0.0)
    b_v = load_tile(v_ptr, o_n, tl.arange(0, BLOCK_DV), stride_vt, end, DV, BLOCK_DV, MASKED)  # [BLOCK_N, BLOCK_DV]
    b_acc = b_acc * b_alpha[:, None] + dot(cast(b_p, b_v.dtype), b_v)
    return b_acc, b_m_new, b_l


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, lo_ptr, hi_ptr,
    span_q_ptr, span_k_ptr, allow_q_ptr, bit_k_ptr, tiles_ptr, class_q_ptr, class_k_ptr, bias_ptr, sink_ptr, seed_ptr,
    num_words, classes_q, classes_k, keep_below, keep_factor,
    out_ptr, lse_ptr,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    Tq, Tk, group, scale,
    D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PATTERN: tl.constexpr, BIAS: tl.constexpr, SINK: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    i_m, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ptr += i_h // group * stride_kh
    v_ptr += i_h // group * stride_vh
    if BIAS:
        bias_ptr += i_h * classes_q * classes_k
    b_lo, b_hi = load_intervals(lo_ptr, hi_ptr, o_m, Tq, Tk)
    b_span, b_allow = load_ints(span_q_ptr, o_m, Tq, PATTERN), load_ints(allow_q_ptr, o_m, Tq, PATTERN)
    b_class = load_ints(class_q_ptr, o_m, Tq, BIAS)
    begin, full_begin, full_end, end = key_ranges(b_lo, b_hi, o_m < Tq, BLOCK_N)
    b_q = load_tile(q_ptr + i_h * stride_qh, o_m, tl.arange(0, BLOCK_D), stride_qt, Tq, D, BLOCK_D, True)

    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_l = tl.zeros([BLOCK_M], tl.float32)
    factor = in_log2(scale, b_q.dtype)
    if PATTERN:
        for start in range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N):
            state = tile_state(tiles_ptr, num_words, i_m * BLOCK_M, start)
            if state == FULL:
                b_acc, b_m, b_l = _attend(
                    b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class,
                    start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k,
                    keep_below, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, True, BIAS, DROPOUT,
                )  # fmt: skip
            elif state != SKIP:
                b_acc, b_m, b_l = _attend(
                    b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class,
                    start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k,
                    keep_below, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, BIAS, DROPOUT,
                )  # fmt: skip
    else:
        for start in range(begin, full_begin, BLOCK_N):
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class,
                start, full_begin, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k,
                keep_below, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, BIAS, DROPOUT,
            )  # fmt: skip
        for start in range(full_begin, full_end, BLOCK_N):
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class,
                start, full_end, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k,
                keep_below, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, BIAS, DROPOUT,
            )  # fmt: skip
        for start in range(full_end, end, BLOCK_N):
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q, k_ptr, v_ptr, stride_kt, stride_vt, b_lo, b_hi, b_span, b_allow, b_class,
                start, end, factor, span_k_ptr, bit_k_ptr, class_k_ptr, bias_ptr, seed_ptr, classes_q, classes_k,
                keep_below, i_h, i_m, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, BIAS, DROPOUT,
            )  # fmt: skip

    m_empty = b_l == 0.0
    if SINK:
        b_sink = in_log2(tl.load(sink_ptr + i_h), b_q.dtype)
        b_m_new = tl.maximum(b_m, b_sink)
        b_alpha = exponential(b_m - b_m_new, b_q.dtype)
        b_acc = b_acc * b_alpha[:, None]
        b_l = b_l * b_alpha + exponential(b_sink - b_m_new, b_q.dtype)
        b_m = b_m_new
    b_out = b_acc / tl.where(m_empty, 1.0, b_l)[:, None]
    if DROPOUT:
        b_out = b_out * keep_factor
    b_highest = b_m if b_q.dtype == tl.float32 else b_m * LN_2
    b_lse = tl.where(m_empty, float("-inf"), b_highest + tl.log2(tl.where(m_empty, 1.0, b_l)) * LN_2)
    store_tile(out_ptr + i_h * stride_oh, o_m, tl.arange(0, BLOCK_DV), stride_ot, Tq, DV, b_out)
    tl.store(lse_ptr + i_h * Tq + o_m, b_lse, mask=o_m < Tq)


def block_dim(head_dim: int) -> int:
    """Head dims are padded to a power of two, tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def _config(single: bool, head_dim: int, major: int) -> dict[str, int]:
    """Tiles and launch options without spills on compute capability `major` (a float32 product is three of tf32)."""
    if single:
        if head_dim <= 64:
            return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if head_dim <= 64:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if major == 8 else 3}
    if head_dim <= 128:
        return {"BLOCK_M": 128, "BLOCK_N": 32 if major == 8 else 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1 if major >= 10 else 2}


def tiles(block_m: int, block_n: int, num_warps: int, num_stages: int = 1) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages}


def _rich_config(single: bool, head_dim: int, major: int) -> dict[str, int]:
    """The same with registers left for a pattern, a bias and dropout; tiles lie inside those of the tile map."""
    if single:
        return tiles(32, 32, 8) if head_dim <= 64 else tiles(16, 16, 4)
    if head_dim <= 64:
        return tiles(64, 64, 8, 2)
    return tiles(64, 32, 8) if head_dim <= 128 else tiles(32, 32, 8)


def unit_rows(x: Tensor) -> Tensor:
    """The kernels want the last dimension contiguous; the others may have any stride."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, rows: MaskRows, options: Options) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    out = torch.empty((Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, Tq), dtype=torch.float32, device=q.device)
    if Tq == 0:
        return out, lse
    choose = _rich_config if is_rich(rows, options) else _config
    config = choose(q.dtype == torch.float32, max(D, DV), generation(q.device))
    grid = (triton.cdiv(Tq, config["BLOCK_M"]), H)
    _attention_fwd_kernel[grid](
        q, k, v, rows.lo, rows.hi, *arguments(rows, options), out, lse,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), out.stride(0), out.stride(1),
        Tq, Tk, H // Hkv, options.scale,
        D=D, DV=DV, BLOCK_D=block_dim(D), BLOCK_DV=block_dim(DV), **flags(rows, options), **config,
    )  # fmt: skip
    return out, lse


# Launches that the ahead-of-time gate compiles: one head dim per tile size, and one that is padded; with every option
# at once, one per tile size.
AOT_LAUNCHES = (("bf16", 64), ("bf16", 80), ("bf16", 128), ("bf16", 256), ("fp16", 128), ("fp32", 64), ("fp32", 128))
AOT_RICH_LAUNCHES = (("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 128))
ALL_FLAGS = ("PATTERN", "BIAS", "SINK", "DROPOUT")
_FLOAT32 = ("lse_ptr", "delta_ptr", "dlse_ptr", "bias_ptr", "sink_ptr", "row_sums_ptr", "grad_lse_ptr")
_INT32 = ("lo_ptr", "hi_ptr", "first_q_ptr", "last_q_ptr", *(x for x in POINTERS if x not in (*_FLOAT32, "seed_ptr")))


def aot_case(
    what: str, kernel: Any, kind: str, head_dim: int, config: dict[str, int], arch: int, **constexprs: Any
) -> Any:
    """A TritonCase; types follow from the arguments' names. With PATTERN, every option; without, none."""
    from mmkernels.testing.aot import TritonCase

    def type_of(name: str) -> str:
        if name.endswith("_ptr"):
            known = {"seed_ptr": "*i64"} | dict.fromkeys(_INT32, "*i32") | dict.fromkeys(_FLOAT32, "*fp32")
            return known.get(name, f"*{kind}")
        return "i32:16" if name.startswith("stride_") else "fp32" if name in ("scale", "keep_factor") else "i32"

    constexprs |= {name: value for name, value in config.items() if name.startswith("BLOCK")}
    rich = constexprs.get("PATTERN", False)
    if not rich:
        constexprs |= {name: None for name in (*POINTERS, "row_sums_ptr", "grad_lse_ptr") if name in kernel.arg_names}
    launch: dict[str, Any] = {name: value for name, value in config.items() if name.startswith("num_")}
    names = [name for name in kernel.arg_names if name not in constexprs]
    label = f"attention_{what}[{kind},D={head_dim}{',all options' if rich else ''},sm_{arch}]"
    signature = {name: type_of(name) for name in names}
    return TritonCase(label, kernel, signature, constexprs, tensor_cores=what != "delta", archs=(arch,), **launch)


def aot_launches() -> list[tuple[int, str, int, bool]]:
    """(architecture, dtype, head dim, every option at once or none)."""
    from mmkernels.testing.aot import TRITON_ARCHS

    launches = [(*launch, False) for launch in AOT_LAUNCHES] + [(*launch, True) for launch in AOT_RICH_LAUNCHES]
    return [(arch, *launch) for arch, launch in itertools.product(TRITON_ARCHS, launches)]


def aot_cases() -> list[Any]:
    """Every configuration that the launcher uses."""
    cases = []
    for arch, kind, head_dim, rich in aot_launches():
        sizes = {"D": head_dim, "DV": head_dim, "BLOCK_D": block_dim(head_dim), "BLOCK_DV": block_dim(head_dim)}
        config = (_rich_config if rich else _config)(kind == "fp32", head_dim, arch // 10)
        options = dict.fromkeys(ALL_FLAGS, rich)
        cases.append(aot_case("fwd", _attention_fwd_kernel, kind, head_dim, config, arch, **sizes, **options))
    return cases
