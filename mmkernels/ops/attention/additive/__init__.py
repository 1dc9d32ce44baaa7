"""Additive (Bahdanau) attention: a score through tanh, over the pairs that a mask lets see each other."""

from mmkernels.ops.attention.additive.api import additive_attention

__all__ = ["additive_attention"]
