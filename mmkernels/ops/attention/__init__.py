"""Attention over packed tokens, with one interval of keys per query as its mask."""

from .api import attention
from .mask import AttentionMask

__all__ = ["AttentionMask", "attention"]
