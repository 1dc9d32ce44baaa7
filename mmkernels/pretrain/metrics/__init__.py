"""Held-out figures, each beside chance."""

from mmkernels.pretrain.metrics.ablation import Ablation
from mmkernels.pretrain.metrics.alignment import Alignment
from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut
from mmkernels.pretrain.metrics.captioning import Captioning
from mmkernels.pretrain.metrics.classified import Classified
from mmkernels.pretrain.metrics.grounding import Grounding
from mmkernels.pretrain.metrics.groups import Groups
from mmkernels.pretrain.metrics.held_out_loss import Predictions
from mmkernels.pretrain.metrics.linear_probe import LinearProbe
from mmkernels.pretrain.metrics.nearest_neighbours import NearestNeighbours
from mmkernels.pretrain.metrics.perplexity import Perplexity
from mmkernels.pretrain.metrics.reconstruction import Reconstruction
from mmkernels.pretrain.metrics.reranked import Matched, Reranked
from mmkernels.pretrain.metrics.retrieval import Retrieval
from mmkernels.pretrain.metrics.shots import Shots
from mmkernels.pretrain.metrics.zero_shot import ZeroShot

__all__ = [
    "Ablation",
    "Alignment",
    "Captioning",
    "Classified",
    "Each",
    "Figure",
    "Grounding",
    "Groups",
    "HeldOut",
    "LinearProbe",
    "Matched",
    "NearestNeighbours",
    "Perplexity",
    "Predictions",
    "Reconstruction",
    "Reranked",
    "Retrieval",
    "Shots",
    "ZeroShot",
]
