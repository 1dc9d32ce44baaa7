"""The losses of sentence-transformers with in-batch negatives, computed without a matrix of scores.

    from mmkernels.integrations.sentence_transformers import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=64)  # for sentence_transformers.losses'

Subclasses of the losses that they replace, with their constructors: trainers, model cards and evaluators see those.
"""

from __future__ import annotations

from mmkernels.integrations.sentence_transformers.losses import (
    CachedGISTEmbedLoss,
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "MultipleNegativesRankingLoss",
]
