"""Answer: choose a sample's class from its fused tokens: visual questions, actions, relations.

Source: Antol et al. 2015 (VQA, arXiv:1505.00468).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels import segment_pool
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """Cross entropy over the classes of a label field."""

    read: str = "question"
    """The stream whose tokens are pooled after fusion."""
    label: str = "answer"
    """The field of the data that has the class."""
    pool: Literal["mean", "max", "first", "sum", "weighted"] = "mean"
    """From tokens to one prediction; weighted: by learned weights, which sum to 1."""
    level: Literal["features", "logits"] = "features"
    """What is pooled: the tokens, or what each of them predicts (see `Late`)."""
    head: Literal["hidden", "linear"] = "hidden"
    """From features to classes: a hidden layer, a norm and a projection, or the latter two alone."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    def build(self, facts: Facts) -> AnswerLoss:
        if self.head not in ("hidden", "linear"):
            raise ValueError(f"head: expected 'hidden' or 'linear', got {self.head!r}")
        if (classes := len(facts.classes[self.label])) < 2:
            raise ValueError(f"label: expected a field with several classes, got {self.label!r}, which has {classes}")
        return AnswerLoss(self, facts)


class AnswerLoss(Classification):
    def __init__(self, part: Answer, facts: Facts) -> None:
        super().__init__()
        self.part, self.classes = part, len(facts.classes[part.label])
        self.head = Head(facts, self.classes, linear=part.head == "linear")
        self.score = nn.Linear(facts.shape.width, 1) if part.pool == "weighted" else None

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        labels = chunk.batch.labels[self.part.label]
        tokens, rows = chunk.fused[self.part.read], self.owners(chunk)
        if self.part.level == "logits":
            return self._pooled(self.head(tokens.x), tokens)[rows], labels[rows]
        return self.head(self._pooled(tokens.x, tokens)[rows]), labels[rows]

    def owners(self, chunk: Chunk) -> Tensor:
        has = chunk.fused[self.part.read].cu_seqlens.diff() > 0
        return torch.nonzero((chunk.batch.labels[self.part.label] >= 0) & has).flatten()

    def _pooled(self, x: Tensor, tokens: Tokens) -> Tensor:
        """[T, K] -> [S, K]"""
        if self.score is None:
            return segment_pool(x, tokens.cu_seqlens, mode=self.part.pool)
        weights = self.score(tokens.x).sigmoid().flatten()
        total = segment_pool(weights[:, None], tokens.cu_seqlens, mode="sum")
        weights = weights / total[tokens.layout.owners()].flatten()
        return segment_pool(x, tokens.cu_seqlens, mode="weighted", weights=weights)

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.classes)
