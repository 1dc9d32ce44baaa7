"""Held-out retrieval between two streams, both ways: recall at 1, 5 and 10, and chance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut
from mmkernels.pretrain.metrics.embedded import KS, Embedded, embed, ranks
from mmkernels.pretrain.metrics.guessing import through_name

__all__ = ["KS", "Embedded", "Retrieval", "embed", "ranks"]


@dataclass(frozen=True)
class Retrieval:
    """Several samples may share a concept: a query of `a` finds its `b` if its concept's is among the k nearest; a
    query of `b` (one per concept) finds its `a` if any sample of its concept is. The figures have the name of the
    objective where several compare the two streams."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    through: str = ""
    """An objective that maps the embeddings into a space of its own; empty: they are compared as they are."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        space = embed(model, held_out, self.a, self.b, self.through)
        if not len(space.targets):
            return []
        first, _ = self.ways
        through = through_name(model, self.through, self.a, self.b)
        ways = zip(self.ways, ranks(space), (space.chance_a, space.chance_b), space.concepts, strict=True)
        return [
            Figure.of_each(
                f"{through}{way} R@{k}",
                (rank < k).cpu(),
                chance(k),
                clusters=concepts,
                headline=way == first and k == KS[-1],
            )
            for way, rank, chance, concepts in ways
            for k in KS
        ]

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        """Whether each query of `a` finds its `b` among the ten nearest."""
        space = embed(model, held_out, self.a, self.b, self.through)
        if not len(space.targets):
            return None
        k, (rank, _) = KS[-1], ranks(space)
        hits, concepts = (rank < k).cpu().numpy(), space.concepts[0]
        name = f"{through_name(model, self.through, self.a, self.b)}{self.ways[0]} R@{k}"
        return Each(name, hits, np.array(space.items_a), concepts, guess=space.chance_a(k))

    @property
    def ways(self) -> tuple[str, str]:
        return f"{self.a} → {self.b}", f"{self.b} → {self.a}"
