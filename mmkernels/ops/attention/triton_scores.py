"""From products of q and k to logits in Triton, shared by forward and backward: scale, soft cap, pair bias,
distances, units."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops.triton_common import LOG2_E, tanh, tanh_slope


@triton.jit
def in_log2(x, dtype: tl.constexpr):
    """Convert a score factor or natural logarithm to the units of scores: natural for float32, log2 otherwise."""
    return x if dtype == tl.float32 else x * LOG2_E


@triton.jit
def exponential(x, dtype: tl.constexpr):
    """exp of a score difference in those units."""
    return tl.exp2(x * LOG2_E) if dtype == tl.float32 else tl.exp2(x)


@triton.jit
def score_tile(extras, b_products, dtype: tl.constexpr):
    """Scores in those units from products <q, k>: scaled, capped if there is a cap; and the cap's derivative, or 1."""
    if extras.softcap is not None:
        b_x = b_products * extras.scale_in_cap
        b_tanh = tanh(b_x)
        return b_tanh * in_log2(extras.softcap, dtype), tanh_slope(b_x, b_tanh)
    else:
        return b_products * in_log2(extras.scale, dtype), 1.0


@triton.jit
def bias_of(extras, i_h, b_class_q, b_class_k, dtype: tl.constexpr):
    """The pair bias of scores, from classes broadcast against each other. A class out of range gives NaN: the error is
    visible, and nothing is read out of bounds."""
    m_inside = (b_class_q >= 0) & (b_class_q < extras.classes_q) & (b_class_k >= 0) & (b_class_k < extras.classes_k)
    table_ptr = extras.pair_bias + i_h * extras.classes_q * extras.classes_k
    b_bias = tl.load(table_ptr + b_class_q * extras.classes_k + b_class_k, mask=m_inside, other=float("nan"))
    return in_log2(b_bias, dtype)


@triton.jit
def slope_of(extras, i_h, dtype: tl.constexpr):
    """A head's slope, in units of scores."""
    return in_log2(tl.load(extras.slopes + i_h), dtype)


@triton.jit
def distance_of(b_at, b_key):
    """Tokens between the queries' positions and the keys, broadcast against each other."""
    return tl.abs(b_at - b_key).to(tl.float32)
