"""Retrieval by a fusion, which judges pair by pair.

Source: Li et al. 2021 (ALBEF, arXiv:2107.07651); what is added to a logit: Gutmann and Hyvärinen 2010,
Noise-contrastive Estimation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmkernels import topk_similar
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.guessing import best_column
from mmkernels.pretrain.metrics.pairs import pairs_of

__all__ = ["Matched", "Reranked"]


@dataclass(frozen=True)
class Reranked:
    """Recall at 1 of a matching objective's first stream, `a`, in its second, `b`: by the similarity of embeddings
    alone, and after the objective has judged the nearest candidates. The figures have its name where several judge the
    two streams.

    Its wrong pairs were drawn by exp(scale x similarity), so that its logit tells the right answer from those that look
    right, and nothing of how much they do: both are added, as noise-contrastive estimation adds the noise."""

    objective: str = "matching"
    """A `Matching` with sampled negatives."""
    candidates: int = 16
    """Nearest answers of each query that are judged."""
    limit: int = 256
    """Most samples, evenly spaced: each is a query and an answer."""

    def __post_init__(self) -> None:
        _positive(self, "candidates", "limit")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = pairs_of(model, held_out, self.objective, self.limit)
        if found is None:
            return []
        part, chunk = found.objective.part, found.chunk
        a, b = part.a, part.b
        rows = found.having(a, b)
        concepts = chunk.batch.concepts[rows]
        answers = rows[_firsts(concepts)]
        if len(answers) < 2:
            return []
        (queries, keys), k = (chunk.whole.embedding(x).float() for x in (a, b)), min(self.candidates, len(answers))
        similar, places = topk_similar(queries[rows], keys[answers], k)  # [Q, k]
        near = answers[places]
        asking: Any = dict.fromkeys(found.fused(a, b), rows.repeat_interleave(k)) | {b: near.flatten()}
        judged = found.scores(asking).view(-1, k).to(near.device)
        scores = judged + (part.scale * similar if part.negatives == "sampled" else 0.0)
        right = chunk.batch.concepts[near] == concepts[:, None]
        plain, better = (_chosen(each, right).cpu() for each in (similar, scores))
        chance, clusters = 1 / len(answers), concepts.cpu()
        parts: list[Any] = [getattr(each, "part", None) for each in model.objectives.values()]
        judges = [each for each in parts if hasattr(each, "negatives")]
        several = sum({each.a, each.b} == {a, b} for each in judges) > 1
        name = f"{self.objective}: {a} → {b}" if several else f"{a} → {b}"
        return [
            Figure.of_each(f"{name}, nearest R@1", plain, chance, clusters=clusters),
            Figure.of_each(f"{name}, re-ranked R@1", better, chance, clusters=clusters, headline=True),
        ]


@dataclass(frozen=True)
class Matched:
    """Share of samples whose own `b` fits their other streams best, among `b`s of other concepts: by a matching
    objective, or by how likely it makes masked words."""

    objective: str = "matching"
    """A `Matching` or `MaskedTokens`."""
    a: str = "regions"
    """The stream that stays."""
    b: str = "text"
    """The stream that is exchanged."""
    candidates: int = 16
    """The right one and others."""
    limit: int = 512
    """Most samples, evenly spaced."""

    def __post_init__(self) -> None:
        _positive(self, "candidates", "limit")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = pairs_of(model, held_out, self.objective, self.limit)
        if found is None:
            return []
        rows = found.having(self.a, self.b)
        others = drawn(found.chunk.batch.concepts[rows].cpu().numpy(), self.candidates - 1)
        if others is None:
            return []
        every = np.concatenate([np.arange(len(rows))[:, None], others], 1)  # [Q, candidates], the right one first
        table = rows[torch.from_numpy(every).to(rows.device)]
        streams = found.fused(self.a, self.b)
        pairing: dict[str, Tensor] = dict.fromkeys(streams, rows.repeat_interleave(table.shape[1]))
        scores = found.scores({**pairing, self.b: table.flatten()}).view(table.shape)
        right = (scores[:, :1] > scores[:, 1:]).all(1)  # a tie or NaN is wrong
        name = f"{self.objective}: {self.a} → {self.b} R@1 of {table.shape[1]}"
        clusters = found.chunk.batch.concepts[rows].cpu()
        return [Figure.of_each(name, right, 1 / table.shape[1], clusters=clusters, headline=True)]


def drawn(concepts: np.ndarray, count: int) -> np.ndarray | None:
    """int64 [n, at most count]: for each of n samples different ones of other concepts, always the same; None if some
    have none."""
    random, found = np.random.default_rng(0), []
    for concept in concepts:
        others = np.flatnonzero(concepts != concept)
        found.append(random.permutation(others)[:count])
    least = min((len(each) for each in found), default=0)
    return np.stack([each[:least] for each in found]) if least else None


def _chosen(scores: Tensor, right: Tensor) -> Tensor:
    """bool [Q]: whether the candidate with the highest score [Q, k] is right; a tie or NaN is wrong."""
    best = best_column(scores)
    return right.gather(1, best.clamp(min=0)[:, None]).squeeze(1) & (best >= 0)


def _firsts(concepts: Tensor) -> Tensor:
    """The first row of each concept."""
    seen: dict[int, int] = {}
    for row, concept in enumerate(concepts.tolist()):
        seen.setdefault(concept, row)
    return torch.tensor(list(seen.values()), dtype=torch.int64, device=concepts.device)


def _positive(part: Any, *names: str) -> None:
    for name in names:
        least = 2 if name == "candidates" else 1
        if getattr(part, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(part, name)}")
