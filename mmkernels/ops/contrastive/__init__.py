"""Contrastive losses that never store the logit matrix."""

from mmkernels.ops.contrastive.api import ContrastiveStats, infonce, sample_negatives, siglip, topk_similar

__all__ = ["ContrastiveStats", "infonce", "sample_negatives", "siglip", "topk_similar"]
