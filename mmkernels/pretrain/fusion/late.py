"""Late: streams do not meet before they decide; an objective that reads logits averages or sums their decisions.

Source: Snoek et al. 2005, Early versus Late Fusion in Semantic Video Analysis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from mmkernels import segment_pool
from mmkernels.pretrain.fusion.base import Fusion, Pairing, one_each, paired
from mmkernels.pretrain.layers import FeedForward
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Late"]


@dataclass(frozen=True)
class Late:
    """Each stream pooled by itself, through layers of its own: one token for each stream that a sample has.

    `Answer(level="logits", pool="mean")` then averages the streams' predictions, and `pool="sum"` adds them up.
    """

    streams: tuple[str, ...] = ("image", "question")
    """The streams."""
    into: str = "question"
    """Name of the result: a new one, or a stream that it replaces."""
    pool: Literal["mean", "max", "first"] = "mean"
    """From a stream's tokens to one vector."""

    def build(self, facts: Facts) -> LateFusion:
        if not self.streams or not set(self.streams) <= set(facts.streams):
            known = ", ".join(facts.streams)
            raise ValueError(f"fusion.streams: expected some of {known}, got {self.streams}")
        return LateFusion(self, facts)


class LateFusion(Fusion):
    def __init__(self, part: Late, facts: Facts) -> None:
        super().__init__()
        self.part, self.joins, width = part, {part.into: part.streams}, facts.shape.width
        self.own = nn.ModuleDict({name: FeedForward(facts) for name in part.streams})
        self.out = nn.ModuleDict({name: nn.Linear(width, width) for name in part.streams})

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        rows, have = [], []
        for name in self.part.streams:
            found = paired(tokens[name], name, pairing)
            pooled = segment_pool(found.x, found.cu_seqlens, mode=self.part.pool)
            rows.append(self.out[name](pooled + self.own[name](pooled)))
            have.append(found.cu_seqlens.diff() > 0)
        return {self.part.into: one_each(torch.stack(rows, 1), torch.stack(have, 1))}
