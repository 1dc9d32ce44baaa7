"""What a mask's pattern, a pair bias, a sink and dropout add to the Triton kernels, and how they are handed over.

Helpers take what belongs to queries and to keys broadcast against each other, [BLOCK_M, 1] and [1, BLOCK_N] or the
other way round, and so serve both orientations of a tile.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops.attention.types import MaskRows, Options

__all__ = ["arguments", "bias_of", "flags", "keep_tile", "load_ints", "tile_state", "visible"]

# States and sizes of the tile map (tiles.py).
SKIP, FULL = tl.constexpr(0), tl.constexpr(2)
TILE_Q, TILE_K = tl.constexpr(128), tl.constexpr(64)


@triton.jit
def load_ints(ptr, o, T, GIVEN: tl.constexpr):
    """int32 entries o of a vector of length T; zeros past its end, or when there is none."""
    if GIVEN:
        return tl.load(ptr + o, mask=o < T, other=0)
    return tl.zeros_like(o)


@triton.jit
def tile_state(tiles_ptr, num_words, query, key):
    """State of the tile that holds this query and key."""
    i_key = key // TILE_K
    word = tl.load(tiles_ptr + query // TILE_Q * num_words + i_key // 16)
    return (word >> (i_key % 16 * 2)) & 3


@triton.jit
def visible(b_lo, b_hi, b_span_q, b_allow, o_n, b_span_k, b_bit, PATTERN: tl.constexpr):
    """Which queries see which keys."""
    m_visible = (b_lo <= o_n) & (o_n < b_hi)
    if PATTERN:
        m_visible = m_visible & ((b_span_q == b_span_k) | ((b_allow & b_bit) != 0))
    return m_visible


@triton.jit
def bias_of(bias_ptr, b_class_q, b_class_k, classes_q, classes_k):
    """Entries of a head's table; NaN for a class beyond it, which so shows and reads no foreign memory."""
    m_inside = (b_class_q >= 0) & (b_class_q < classes_q) & (b_class_k >= 0) & (b_class_k < classes_k)
    return tl.load(bias_ptr + b_class_q * classes_k + b_class_k, mask=m_inside, other=float("nan"))


@triton.jit
def keep_tile(seed_ptr, i_h, o_n, query, keep_below, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What dropout keeps of the keys o_n and BLOCK_M queries from `query`, a multiple of 4, on: [BLOCK_N, BLOCK_M].

    Philox gives four words at a counter (key, query // 4, head, 0), one for each of four queries.
    """
    zero = tl.zeros([BLOCK_N, BLOCK_M // 4], tl.int32)
    o_group = query // 4 + tl.arange(0, BLOCK_M // 4)
    b_key = (zero + o_n[:, None]).to(tl.uint32)
    b_group = (zero + o_group[None, :]).to(tl.uint32)
    b_head = (zero + i_h.to(tl.int32)).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), b_key, b_group, b_head, zero.to(tl.uint32))
    b_words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_N, BLOCK_M / 4, 2, 2], in the order 0, 1, 2, 3
    return (tl.reshape(b_words, [BLOCK_N, BLOCK_M]) >> 1).to(tl.int32) < keep_below


# The kernels' arguments from pattern to dropout, in order; those of an option that is not there are None.
POINTERS = (
    "span_q_ptr",
    "span_k_ptr",
    "allow_q_ptr",
    "bit_k_ptr",
    "tiles_ptr",
    "class_q_ptr",
    "class_k_ptr",
    "bias_ptr",
    "sink_ptr",
    "seed_ptr",
)
SCALARS = ("num_words", "classes_q", "classes_k", "keep_below", "keep_factor")


def arguments(rows: MaskRows, options: Options) -> tuple[Any, ...]:
    """Values of POINTERS and SCALARS."""
    pattern = rows.span_q, rows.span_k, rows.allow_q, rows.bit_k, rows.tiles
    bias = rows.class_q, rows.class_k, options.pair_bias
    classes = (0, 0) if options.pair_bias is None else options.pair_bias.shape[1:]
    keep_probability = 1 - options.dropout_p
    words = 0 if rows.tiles is None else rows.tiles.shape[1]
    scalars = words, *classes, round(keep_probability * 2**31) if options.seed is not None else 0, 1 / keep_probability
    return (*pattern, *bias, options.sink, options.seed, *scalars)


def flags(rows: MaskRows, options: Options) -> dict[str, bool]:
    """The constexpr arguments that say which options there are."""
    return {
        "PATTERN": rows.tiles is not None,
        "BIAS": options.pair_bias is not None,
        "SINK": options.sink is not None,
        "DROPOUT": options.seed is not None,
    }


def is_rich(rows: MaskRows, options: Options) -> bool:
    """Whether a call needs the tiles that leave registers for a pattern, a bias or dropout (a sink needs none)."""
    return rows.tiles is not None or options.pair_bias is not None or options.seed is not None


def class_block(pair_bias: Tensor | None) -> int:
    """Columns of the one-hot matrix of key classes; a matrix product wants at least 16."""
    return 16 if pair_bias is None else max(16, triton.next_power_of_2(pair_bias.shape[2]))
