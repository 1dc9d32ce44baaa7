"""Attention over packed tokens, its prologue (norm and rotary embedding) and epilogue (gated residual)."""

from .additive import additive_attention
from .api import attention
from .gate import gated_residual
from .mask import AttentionMask
from .rope import norm_rope, qk_norm_rope, rotary_cos_sin

__all__ = [
    "AttentionMask",
    "additive_attention",
    "attention",
    "gated_residual",
    "norm_rope",
    "qk_norm_rope",
    "rotary_cos_sin",
]
