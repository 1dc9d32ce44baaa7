"""Held-out figures, each beside chance."""

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.retrieval import Retrieval

__all__ = ["Figure", "HeldOut", "Retrieval"]
