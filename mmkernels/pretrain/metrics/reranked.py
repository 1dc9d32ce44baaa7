"""Retrieval whose nearest answers are put in order again by what the fusion says of each pair.

Source: Li et al. 2021 (ALBEF, arXiv:2107.07651).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmkernels import topk_similar
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["Reranked"]

_PAIRS = 1024  # fused at a time


@dataclass(frozen=True)
class Reranked:
    """Recall at 1 of a matching objective's first stream, `a`, in its second, `b`: by the similarity of embeddings
    alone, and after the objective has judged the nearest candidates."""

    objective: str = "matching"
    """A `Matching` with sampled negatives."""
    candidates: int = 16
    """Nearest answers of each query that are judged."""
    limit: int = 256
    """Most samples, evenly spaced: each is a query and an answer."""

    def __post_init__(self) -> None:
        for name in ("candidates", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective = model.objectives[self.objective]
        if not hasattr(objective, "scores"):
            raise ValueError(f"metrics.Reranked.objective: expected a matching objective, got {self.objective!r}")
        items = held_out.items()
        chosen = [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(len(items), self.limit)).astype(int))]
        read = held_out.source.read_some(chosen)
        if not read.samples:
            return []
        batch = held_out.collator(read.samples, read.items, mode="plain").to(held_out.device)
        return self._measure(model, objective, batch)

    def _measure(self, model: Any, objective: Any, batch: Batch) -> list[Figure]:
        a, b = objective.part.a, objective.part.b
        chunk = model.whole(batch, self.objective)
        rows = torch.nonzero(chunk.whole.present(a, b)).flatten()
        concepts = batch.concepts[rows]
        firsts = torch.tensor([i for i, c in enumerate(concepts.tolist()) if c not in concepts[:i].tolist()])
        answers = rows[firsts.to(rows.device)] if len(rows) else rows
        if len(answers) < 2:
            return []
        queries, keys = (chunk.whole.embedding(name).float() for name in (a, b))
        k = min(self.candidates, len(answers))
        _, nearest = topk_similar(queries[rows], keys[answers], k)
        found = answers[nearest]  # [Q, k]
        pairs = torch.stack([rows[:, None].expand_as(found), found], -1).reshape(-1, 2)
        scores = torch.cat([objective.scores(chunk, *some.unbind(1)) for some in pairs.split(_PAIRS)]).view(-1, k)
        best = found.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
        chance, clusters = 1 / len(answers), concepts.cpu()
        right = [(batch.concepts[each] == concepts).cpu() for each in (found[:, 0], best)]
        name = f"{a} → {b} R@1"
        return [
            Figure.of_each(f"{name}, of {len(answers)}", right[0], chance, clusters=clusters),
            Figure.of_each(f"{name}, of {len(answers)}, re-ranked", right[1], chance, clusters=clusters, headline=True),
        ]
