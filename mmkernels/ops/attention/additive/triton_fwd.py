"""Forward of additive attention in Triton.

A program owns BLOCK_M queries of one head and loops over the hull of their keys, BLOCK_N at a time, with the online
softmax in units of log2. A tile of scores [BLOCK_M, BLOCK_N] is summed over the head dim one element at a time: the
outer sum of a column of q and a column of k, its tanh, times a scalar of w. The columns of a tile stay in the L1 cache;
the tanh dominates. All arithmetic is float32; probabilities are rounded to the input's dtype for the product with v.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
from mmkernels.ops.triton_common import LN_2, LOG2_E, block_dim, cast, dot, tanh, unit_rows

__all__ = ["additive_fwd"]


class Terms(NamedTuple):
    """The score operands of one head."""

    q: Any  # Head
    k: Any  # Head
    w_ptr: Any  # [D]
    bias_ptr: Any  # [D]


@triton.jit
def load_column(x, o_t, i_d, T):
    """Element i_d of the rows o_t of a Head in float32: [len(o_t)]."""
    return tl.load(x.ptr + o_t.to(tl.int64) * x.stride_t + i_d, mask=o_t < T, other=0.0).to(tl.float32)


@triton.jit
def tanh_tile(terms, o_m, o_n, i_d, Tq, Tk):
    """tanh(q + k + bias) of one element of the head dim: [BLOCK_M, BLOCK_N]."""
    b_q = load_column(terms.q, o_m, i_d, Tq) + tl.load(terms.bias_ptr + i_d)
    return tanh(b_q[:, None] + load_column(terms.k, o_n, i_d, Tk)[None, :])


@triton.jit
def scores(terms, o_m, o_n, Tq, Tk, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N]"""
    b_s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_d in range(0, D):
        b_s += tl.load(terms.w_ptr + i_d) * tanh_tile(terms, o_m, o_n, i_d, Tq, Tk)
    return b_s


@triton.jit
def _additive_fwd_kernel(
    q, k, v, out,  # Heads
    w_ptr, bias_ptr,  # [H, D]
    lse_ptr,  # [H, Tq]
    rows, Tq, Tk, group,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    first_q, i_h = tl.program_id(0) * BLOCK_M, tl.program_id(1).to(tl.int64)
    o_m = first_q + tl.arange(0, BLOCK_M)
    terms = Terms(of_head(q, i_h), of_head(k, i_h // group), w_ptr + i_h * D, bias_ptr + i_h * D)
    v = of_head(v, i_h // group)
    b_acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    begin, end = hull(rows.lo, rows.hi, o_m, Tq, Tk)
    for start in range(begin, end, BLOCK_N):
        b_s = scores(terms, o_m, start + tl.arange(0, BLOCK_N), Tq, Tk, D, BLOCK_M, BLOCK_N)
        # Loaded after the scores, whose loop needs the registers.
        queries, keys = load_queries(rows, first_q, Tq, Tk, BLOCK_M), load_keys(rows, start, Tk, BLOCK_N)
        b_s = tl.where(visible(queries, keys, rows, 1), b_s * LOG2_E, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        # A row that has seen no key yet keeps -inf; subtracting 0 instead keeps its exponents at -inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BLOCK_M, BLOCK_N]
        b_rescale = tl.exp2(b_max - b_shift)
        b_v = load_tile(v, keys.index, Tk, DV, BLOCK_DV, True)  # [BLOCK_N, BLOCK_DV]
        b_acc = b_acc * b_rescale[:, None] + dot(cast(b_p, b_v.dtype), b_v)
        b_sum = b_sum * b_rescale + tl.sum(b_p, 1)
        b_max = b_new
    m_empty = b_sum == 0.0
    b_total = tl.where(m_empty, 1.0, b_sum)
    store_tile(of_head(out, i_h), o_m, Tq, DV, b_acc / b_total[:, None])
    b_lse = tl.where(m_empty, float("-inf"), (b_max + tl.log2(b_total)) * LN_2)
    tl.store(lse_ptr + i_h * Tq + o_m, b_lse, mask=o_m < Tq)


def fwd_config(single: bool, widest: int) -> dict[str, int]:
    """Tiles and launch options without spills on sm_80, sm_90 and sm_100."""
    return tiles(32, 32, 8) if single else tiles(64 if widest <= 64 else 32, 32, 4)


def additive_fwd(q: Tensor, k: Tensor, v: Tensor, w: Tensor, bias: Tensor, mask: Visible) -> tuple[Tensor, Tensor]:
    """out [Tq, H, Dv] and lse [H, Tq]."""
    q, k, v = unit_rows(q), unit_rows(k), unit_rows(v)
    (Tq, H, D), (Tk, Hkv, DV) = q.shape, v.shape
    out = torch.empty((Tq, H, DV), dtype=q.dtype, device=q.device)
    lse = torch.empty((H, Tq), dtype=torch.float32, device=q.device)
    if Tq == 0:
        return out, lse
    config = fwd_config(q.dtype == torch.float32, max(D, DV))
    _additive_fwd_kernel[(triton.cdiv(Tq, config["BLOCK_M"]), H)](
        as_heads(q), as_heads(k), as_heads(v), as_heads(out), w, bias, lse, MaskRows(*mask), Tq, Tk, H // Hkv,
        D=D, DV=DV, BLOCK_DV=block_dim(DV), **config,
    )  # fmt: skip
    return out, lse
