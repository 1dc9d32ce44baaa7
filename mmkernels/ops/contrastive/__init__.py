"""Contrastive losses that never store the logit matrix."""

from mmkernels.ops.contrastive.api import (
    ContrastiveStats,
    FalseNegatives,
    GatheredKeys,
    gather_keys,
    infonce,
    sample_negatives,
    siglip,
    topk_similar,
)
from mmkernels.ops.contrastive.lse import similarity_logsumexp

__all__ = [
    "ContrastiveStats",
    "FalseNegatives",
    "GatheredKeys",
    "gather_keys",
    "infonce",
    "sample_negatives",
    "siglip",
    "similarity_logsumexp",
    "topk_similar",
]
