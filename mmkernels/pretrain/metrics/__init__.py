"""Held-out figures, each beside chance."""

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.held_out_loss import Predictions
from mmkernels.pretrain.metrics.linear_probe import LinearProbe
from mmkernels.pretrain.metrics.nearest_neighbours import NearestNeighbours
from mmkernels.pretrain.metrics.reconstruction import Reconstruction
from mmkernels.pretrain.metrics.retrieval import Retrieval

__all__ = ["Figure", "HeldOut", "LinearProbe", "NearestNeighbours", "Predictions", "Reconstruction", "Retrieval"]
