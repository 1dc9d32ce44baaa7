"""Additive (Bahdanau) attention: a tanh score over the visible pairs of a mask."""

from mmkernels.ops.attention.additive.api import additive_attention

__all__ = ["additive_attention"]
