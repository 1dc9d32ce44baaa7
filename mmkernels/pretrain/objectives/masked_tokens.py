"""Masked tokens: predict what a view has hidden, from what is left.

Source: Devlin et al. 2019 (arXiv:1810.04805).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head, matched_tokens
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk
from mmkernels.pretrain.tokens import Tokens, taken

__all__ = ["MaskedTokens"]


@dataclass(frozen=True)
class MaskedTokens:
    """Cross entropy at the masked tokens of a stream."""

    stream: str = "text"
    """The stream, which needs a view that masks."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""
    unmatched: bool = False
    """Also in samples of which a view has swapped another stream."""

    def build(self, facts: Facts) -> MaskedTokensLoss:
        views = facts.streams[self.stream].views
        if not any(getattr(view, "masks", False) for view in views):
            raise ValueError(f"streams.{self.stream}.views: expected one that masks tokens (MaskWords), got {views}")
        return MaskedTokensLoss(self, facts)


class MaskedTokensLoss(Classification):
    def __init__(self, part: MaskedTokens, facts: Facts) -> None:
        super().__init__()
        self.part, self.stream, self.vocabulary = part, part.stream, facts.vocabulary
        self.head = Head(facts, facts.vocabulary)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        rows, targets = self.masked(chunk)
        return self.head(chunk.fused[self.stream].x[rows]), targets

    def owners(self, chunk: Chunk) -> Tensor:
        return chunk.fused[self.stream].layout.owners()[self.masked(chunk)[0]]

    def masked(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(int64 [n] the masked tokens of a chunk, int64 [n] what they are)."""
        labels = chunk.batch[self.stream].labels
        assert labels is not None, "a view has set them"
        masked = labels >= 0 if self.part.unmatched else (labels >= 0) & matched_tokens(chunk, self.stream)
        rows = torch.nonzero(masked).flatten()
        return rows, labels[rows]

    def scores(self, chunk: Chunk, tokens: Mapping[str, Tokens], pairing: Mapping[str, Tensor]) -> Tensor:
        """float32 [n]: the mean log probability of the masked tokens of n pairs; 0 without any."""
        assert chunk.fusion is not None, "nothing else brings streams together"
        fused = chunk.fusion(tokens, pairing)[self.stream]
        labels = chunk.batch[self.stream].labels
        assert labels is not None, "a view has set them"
        labels = labels[taken(tokens[self.stream].layout, pairing[self.stream])[0]]
        rows = torch.nonzero(labels >= 0).flatten()
        log_p = self.head(fused.x[rows]).float().log_softmax(1).gather(1, labels[rows, None]).flatten()
        sums = log_p.new_zeros(2, fused.samples)
        owners = fused.layout.owners()[rows]
        total, count = sums.index_add_(1, owners, torch.stack([log_p, torch.ones_like(log_p)]))
        return total / count.clamp(min=1)

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.vocabulary)
