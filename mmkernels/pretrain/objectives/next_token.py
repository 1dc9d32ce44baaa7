"""Next token: a causal language model, alone or over what its fusion reads.

Source: Radford et al. 2019 (GPT-2); prefix-causal captions: Wang et al. 2022 (SimVLM, arXiv:2108.10904).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk
from mmkernels.pretrain.tokens import Tokens

__all__ = ["NextToken"]


@dataclass(frozen=True)
class NextToken:
    """Cross entropy of each token given those before it."""

    stream: str = "text"
    """The stream, which must be causal."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    def build(self, facts: Facts) -> NextTokenLoss:
        encoder = facts.streams[self.stream].encoder
        if not getattr(encoder, "causal", False):
            raise ValueError(f"streams.{self.stream}.encoder: expected a causal one, got {encoder}")
        return NextTokenLoss(self, facts)


class NextTokenLoss(Classification):
    def __init__(self, part: NextToken, facts: Facts) -> None:
        super().__init__()
        self.stream, self.vocabulary = part.stream, facts.vocabulary
        self.head = Head(facts, facts.vocabulary)

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        rows, targets = self.followed(chunk)
        return self.head(chunk.fused[self.stream].x[rows]), targets

    def owners(self, chunk: Chunk) -> Tensor:
        return chunk.fused[self.stream].layout.owners()[self.followed(chunk)[0]]

    def followed(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(int64 [n] the tokens of a chunk that another follows, int64 [n] that one)."""
        labels = chunk.batch[self.stream].next_labels()  # they never cross into the next sample
        rows = torch.nonzero(labels >= 0).flatten()
        return rows, labels[rows]

    def following(self, tokens: Tokens) -> Tensor:
        """[S, V]: logits of the token after the last of each sample, which must have one."""
        logits: Tensor = self.head(tokens.x[tokens.cu_seqlens[1:].long() - 1])
        return logits

    def chance_loss(self, batch: Batch) -> float | None:
        return math.log(self.vocabulary)
