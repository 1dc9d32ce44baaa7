"""Which class a sample's nearest training samples have: what an encoder has learned, without fitting anything.

Source: Wu et al. 2018 (arXiv:1805.01978).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import topk_similar
from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut
from mmkernels.pretrain.metrics.features import probed

__all__ = ["NearestNeighbours", "vote"]


@dataclass(frozen=True)
class NearestNeighbours:
    """Share of held-out samples whose k nearest training samples vote for their class. Samples of a class that the
    training data lacks are not scored; a split without any other gives no figure."""

    stream: str = "image"
    """The stream; its pooled tokens are compared, before the projection."""
    label: str = ""
    """Field of the data that has the class; empty: the concept."""
    k: int = 5
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour votes with exp(cosine / temperature)."""
    limit: int = 10_000
    """Most training samples, evenly spaced."""

    def __post_init__(self) -> None:
        for name in ("k", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = self.each(model, held_out)
        return [] if found is None else [found.figure(headline=True)]

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        """Whether each sample is recognised."""
        found = probed(model, held_out, self.stream, self.label, self.limit)
        if found is None:
            return None
        keys, queries = F.normalize(found.fit, dim=1), F.normalize(found.score, dim=1)
        cosine, nearest = topk_similar(queries, keys, min(self.k, len(keys)))
        guesses = vote(cosine, found.fit_classes[nearest], self.temperature)
        return found.judged(f"{self.stream}: {self.label or 'concept'} by nearest neighbours", guesses)


def vote(cosine: Tensor, classes: Tensor, temperature: float) -> Tensor:
    """The class with most votes: cosine [N, k] of the neighbours, nearest first, classes [N, k] -> int64 [N].

    A tie goes to the nearest; a row of NaN votes for none, and gets -1.
    """
    weight = ((cosine - cosine[:, :1]) / temperature).exp()
    votes = (weight[:, None] * (classes[:, None] == classes[:, :, None])).sum(2)  # [N, k], of each neighbour's class
    chosen = classes.gather(1, votes.argmax(1, keepdim=True)).squeeze(1)
    return torch.where(votes.isfinite().all(1), chosen, -1)
