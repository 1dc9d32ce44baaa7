"""Two streams of a held-out set in one space, and how far down the list each one's partner is."""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import topk_similar
from mmkernels.pretrain.metrics.base import HeldOut

__all__ = ["KS", "Embedded", "embed", "ranks"]

KS = (1, 5, 10)


@dataclass(frozen=True)
class Embedded:
    """A held-out set in the shared space."""

    a: Tensor  # [Q, E] float32
    b: Tensor  # [G, E] float32, one per concept
    targets: Tensor  # [Q] int64, the row of b that belongs to each row of a
    items_a: list[int]  # Q, numbers of the samples
    items_b: list[int]  # G

    @property
    def concepts(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [Q] and [G]: which concept each row is of."""
        return self.targets.cpu().numpy(), np.arange(len(self.b))

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
    return held_out.once(("embedded", held_out.name, a, b, through), lambda: _embed(model, held_out, a, b, shared))


def _embed(model: Any, held_out: HeldOut, a: str, b: str, shared: Any) -> Embedded:
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


def ranks(space: Embedded, most: int = KS[-1]) -> tuple[Tensor, Tensor]:
    """Number of wrong answers ranked before the first right one, for each row of a [Q] and of b [G]; at least `most`
    where it is not among the `most` nearest. No Q x G matrix is stored.

    Ties count as wrong answers ranked before the right one. Beside a NaN nothing is found, however small the gallery.
    """
    numbers = torch.arange(len(space.b), device=space.targets.device)
    several = int(space.targets.bincount().max()) if len(space.targets) else 1
    of_a = _ranks(space.a, space.b, space.targets, numbers, most + 1)
    return of_a, _ranks(space.b, space.a, numbers, space.targets, most + several)


def _ranks(queries: Tensor, keys: Tensor, wanted: Tensor, has: Tensor, k: int) -> Tensor:
    """Among the k nearest are all answers as near as the first right one, or more wrong ones than count."""
    if not (len(queries) and len(keys)):
        return torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    if not bool(queries.isfinite().all() & keys.isfinite().all()):
        return torch.full((len(queries),), max(len(keys), k), device=queries.device)
    scores, nearest = topk_similar(queries, keys, min(k, len(keys)))
    right = has[nearest] == wanted[:, None]
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best) & ~right).sum(1)
