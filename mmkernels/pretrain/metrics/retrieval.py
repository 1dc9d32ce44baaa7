"""Held-out retrieval between two streams, both ways: recall at 1, 5 and 10, and chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["KS", "Embedded", "Retrieval", "embed", "ranks"]

KS = (1, 5, 10)
_BLOCK = 512  # queries ranked at a time


@dataclass(frozen=True)
class Retrieval:
    """Several samples may share a concept: a query of `a` finds its `b` if its concept's is among the k nearest; a
    query of `b` (one per concept) finds its `a` if any sample of its concept is."""

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
        figures = []
        for way, rank, chance in zip(self.ways, ranks(space), (space.chance_a, space.chance_b), strict=True):
            for k in KS:
                value = (rank < k).double().mean().item()
                headline = k == KS[-1] and way == self.ways[0]
                figures.append(Figure(f"{way} R@{k}", value, chance(k), headline=headline))
        return figures

    @property
    def ways(self) -> tuple[str, str]:
        return f"{self.a} → {self.b}", f"{self.b} → {self.a}"


@dataclass(frozen=True)
class Embedded:
    """A held-out set in the shared space."""

    a: Tensor  # [Q, E] float32
    b: Tensor  # [G, E] float32, one per concept
    targets: Tensor  # [Q] int64, the row of b that belongs to each row of a
    items_a: list[int]  # Q, numbers of the samples
    items_b: list[int]  # G

    def chance_a(self, k: int) -> float:
        """Recall at k of a random ranking, a -> b."""
        return min(1.0, k / len(self.b))

    def chance_b(self, k: int) -> float:
        """b -> a: the mean over b of 1 - C(Q - m, k) / C(Q, k) for m rows of a each."""
        queries, shots = len(self.a), min(k, len(self.a))
        each = np.bincount(self.targets.cpu().numpy(), minlength=len(self.b)).tolist()
        missed = [comb(queries - m, shots) / comb(queries, shots) for m in range(max(each) + 1)]
        return 1 - sum(missed[m] for m in each) / len(self.b)


def embed(model: Any, held_out: HeldOut, a: str, b: str, through: str = "") -> Embedded:
    """Embed the samples of a held-out set that have both streams. Raises ValueError if `through` has no space."""
    shared = None if not through else getattr(dict(model.objectives.items()).get(through), "shared", None)
    if through and shared is None:
        expected = "expected an objective with a space of its own (Correlation, Cycle)"
        raise ValueError(f"metrics.retrieval.through: {expected}, got {through!r}")
    rows_a: list[Tensor] = []
    rows_b: list[Tensor] = []
    concepts: list[int] = []
    items: list[int] = []
    for batch in held_out.batches():
        have = (batch[a].cu_seqlens.diff() > 0) & (batch[b].cu_seqlens.diff() > 0)
        for name, rows in ((a, rows_a), (b, rows_b)):
            found = model.encoder(name).embeddings(batch[name])[have].float()
            rows.append(found if shared is None else shared(name, found))
        concepts += batch.concepts[have].tolist()
        items += [item for item, kept in zip(batch.numbers, have.tolist(), strict=True) if kept]
    gallery: dict[int, int] = {}
    first: list[int] = []
    for row, concept in enumerate(concepts):
        if concept not in gallery:
            gallery[concept] = len(first)
            first.append(row)
    targets = torch.tensor([gallery[concept] for concept in concepts], dtype=torch.int64, device=held_out.device)
    if not first:
        nothing = torch.zeros((0, 1), device=held_out.device)
        return Embedded(nothing, nothing, targets, [], [])
    return Embedded(torch.cat(rows_a), torch.cat(rows_b)[first], targets, items, [items[row] for row in first])


def ranks(space: Embedded) -> tuple[Tensor, Tensor]:
    """Number of wrong answers ranked before the first right one, for each row of a [Q] and of b [G].

    Ties and NaN count as wrong answers ranked before the right one, so a collapsed model scores zero.
    """
    a, b, targets = space.a, space.b, space.targets
    numbers = torch.arange(len(b), device=targets.device)

    def of_a(rows: slice) -> tuple[Tensor, Tensor]:
        return a[rows] @ b.T, targets[rows, None] == numbers

    def of_b(rows: slice) -> tuple[Tensor, Tensor]:
        return b[rows] @ a.T, numbers[rows, None] == targets

    return _count(of_a, len(a)), _count(of_b, len(b))


def _count(block: Callable[[slice], tuple[Tensor, Tensor]], queries: int) -> Tensor:
    counts = []
    for start in range(0, queries, _BLOCK):
        scores, right = block(slice(start, start + _BLOCK))
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        counts.append((~(scores < best) & ~right).sum(1))
    return torch.cat(counts) if counts else torch.empty(0, dtype=torch.int64)
