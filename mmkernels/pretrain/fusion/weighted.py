"""Weighted: a sum of the streams in which each sample's own gates say how much of each.

    h_s = W_s pool(x_s)    g = softmax over the sample's streams s of <v_s, pool(x_s)>    out = sum_s g_s h_s

Source: Arevalo et al. 2017 (Gated Multimodal Units, arXiv:1702.01992).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mmkernels import segment_pool
from mmkernels.pretrain.fusion.base import Fusion, Pairing, one_each, paired
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Weighted"]


@dataclass(frozen=True)
class Weighted:
    """A gated sum of pooled streams. A sample that lacks a stream shares its weight among the others."""

    streams: tuple[str, ...] = ("image", "question")
    """The streams."""
    into: str = "question"
    """Name of the result: a new one, or a stream that it replaces."""
    keep: Literal["pooled", "tokens"] = "pooled"
    """pooled: the result is one token a sample. tokens: the sum is added to every token of `into`, a stream."""
    pool: Literal["mean", "max", "first"] = "mean"
    """From a stream's tokens to one vector."""

    def build(self, facts: Facts) -> WeightedFusion:
        unknown = [name for name in self.streams if name not in facts.streams]
        if unknown or len(self.streams) < 2 or len(set(self.streams)) < len(self.streams):
            known = ", ".join(facts.streams)
            raise ValueError(f"fusion.streams: expected at least two different ones of {known}, got {self.streams}")
        if self.keep == "tokens" and self.into not in self.streams:
            raise ValueError(f"fusion.into: expected one of the streams, whose tokens are kept, got {self.into!r}")
        return WeightedFusion(self, facts)


class WeightedFusion(Fusion):
    def __init__(self, part: Weighted, facts: Facts) -> None:
        super().__init__()
        self.part, self.joins, width = part, {part.into: part.streams}, facts.shape.width
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in part.streams})
        self.gates = nn.ModuleDict({name: nn.Linear(width, 1) for name in part.streams})
        self.values = nn.ModuleDict({name: nn.Linear(width, width) for name in part.streams})

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        found = {name: paired(tokens[name], name, pairing) for name in self.part.streams}
        have = torch.stack([each.cu_seqlens.diff() > 0 for each in found.values()], 1)  # [S, K]
        pooled = {
            name: self.norms[name](segment_pool(each.x, each.cu_seqlens, mode=self.part.pool))
            for name, each in found.items()
        }
        values = torch.stack([self.values[name](x) for name, x in pooled.items()], 1)  # [S, K, C]
        mixed = (self.weights(pooled, have)[..., None] * values).sum(1)
        if self.part.keep == "tokens":
            kept = found[self.part.into]
            return {self.part.into: kept.with_x(kept.x + mixed[kept.layout.owners()])}
        return {self.part.into: one_each(mixed[:, None], have.any(1, keepdim=True))}

    def weights(self, pooled: Mapping[str, Tensor], have: Tensor) -> Tensor:
        """[S, K] that sum to 1 over the streams which a sample has."""
        scores = torch.cat([self.gates[name](x) for name, x in pooled.items()], 1)
        lowest = torch.finfo(scores.dtype).min
        return scores.masked_fill(~have, lowest).softmax(1) * have
