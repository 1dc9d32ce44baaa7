"""Contrastive losses that never store the logit matrix."""

from mmkernels.ops.contrastive.api import (
    ContrastiveStats,
    GatheredKeys,
    gather_keys,
    infonce,
    sample_negatives,
    siglip,
    topk_similar,
)

__all__ = [
    "ContrastiveStats",
    "GatheredKeys",
    "gather_keys",
    "infonce",
    "sample_negatives",
    "siglip",
    "topk_similar",
]
