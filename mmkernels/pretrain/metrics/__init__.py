"""Held-out figures, each beside chance."""

from mmkernels.pretrain.metrics.ablation import Ablation
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.held_out_loss import Predictions
from mmkernels.pretrain.metrics.perplexity import Perplexity
from mmkernels.pretrain.metrics.retrieval import Retrieval

__all__ = ["Ablation", "Figure", "HeldOut", "Perplexity", "Predictions", "Retrieval"]
