"""Losses over the embeddings of a batch, and over tokens."""

from mmkernels.pretrain.objectives.contrast import Contrast
from mmkernels.pretrain.objectives.sigmoid import Sigmoid

__all__ = ["Contrast", "Sigmoid"]
