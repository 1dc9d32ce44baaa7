"""Attention over packed tokens, its prologue (norm and rotary embedding) and epilogue (gated residual)."""

from mmkernels.ops.attention.additive import additive_attention
from mmkernels.ops.attention.api import attention
from mmkernels.ops.attention.gate import gated_residual
from mmkernels.ops.attention.mask import AttentionMask
from mmkernels.ops.attention.rope import norm_rope, qk_norm_rope, rotary_cos_sin
from mmkernels.ops.attention.weights import attention_weights

__all__ = [
    "AttentionMask",
    "additive_attention",
    "attention",
    "attention_weights",
    "gated_residual",
    "norm_rope",
    "qk_norm_rope",
    "rotary_cos_sin",
]
