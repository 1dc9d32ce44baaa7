"""Answer: choose a sample's class from its fused tokens: visual questions, actions, relations.

Source: Antol et al. 2015 (VQA, arXiv:1505.00468).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels import segment_pool
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """Cross entropy over the classes of a label field."""

    read: str = "question"
    """The stream whose tokens are pooled after fusion."""
    label: str = "answer"
    """The field of the data that has the class."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    def build(self, facts: Facts) -> AnswerLoss:
        return AnswerLoss(self, facts)


class AnswerLoss(Classification):
    def __init__(self, part: Answer, facts: Facts) -> None:
        super().__init__()
        self.part, self.classes = part, len(facts.classes[part.label])
        self.head = Head(facts, self.classes)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        labels = chunk.batch.labels[self.part.label]
        tokens = chunk.fused[self.part.read]
        rows = torch.nonzero((labels >= 0) & (tokens.cu_seqlens.diff() > 0)).flatten()
        return self.head(segment_pool(tokens.x, tokens.cu_seqlens, mode="mean")[rows]), labels[rows]

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.classes)
