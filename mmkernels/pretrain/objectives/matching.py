"""Matching: do two streams belong together? Against hard negatives sampled by similarity, or pairs that a view swapped.

Source: Li et al. 2021 (ALBEF, arXiv:2107.07651); swapped pairs: Chen et al. 2020 (UNITER, arXiv:1909.11740).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmkernels import segment_pool
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import Classification, Head
from mmkernels.pretrain.pool import hard_negatives, pooled
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Chunk, Seen
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Matching"]


@dataclass(frozen=True)
class Matching:
    """Binary cross entropy over fused pairs."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    read: str = ""
    """The stream whose tokens are pooled after fusion; empty: b."""
    negatives: Literal["sampled", "swapped"] = "sampled"
    """sampled: for each sample one wrong `a` and one wrong `b` of the whole batch, drawn by similarity; what the fusion
    joins with them stays its own. swapped: those samples in which a view (`Swap`) has replaced a stream."""
    scale: float = 10.0
    """Factor of the similarities that negatives are drawn by; 0: evenly."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    def build(self, facts: Facts) -> MatchingLoss:
        swaps = any(getattr(view, "swaps", False) for stream in facts.streams.values() for view in stream.views)
        if self.negatives == "swapped" and not swaps:
            raise ValueError("streams: expected a view that swaps (Swap), which Matching with swapped negatives needs")
        return MatchingLoss(self, facts)


class MatchingLoss(Classification):
    def __init__(self, part: Matching, facts: Facts) -> None:
        super().__init__()
        self.part, self.read, self.seed = part, part.read or part.b, facts.seed
        self.head = Head(facts, 2)
        self._wrong: dict[str, Tensor] = {}
        self._pool: dict[str, Tokens] = {}

    def begin(self, seen: Seen) -> None:
        """Draw the whole batch's negatives, so that they depend neither on its chunks nor on the ranks that hold it."""
        if self.part.negatives == "swapped":
            return
        a, b, roster = self.part.a, self.part.b, seen.roster
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + seen.step) % 2**63)
        x, y = (roster.rows(seen.embedding(name).detach()) for name in (a, b))
        drawn = hard_negatives(((y, x), (x, y)), roster, roster.present(a, b), self.part.scale, generator)
        for name, wrong in zip((a, b), drawn, strict=True):
            self._pool[name], places = pooled(seen.tokens(name), roster, wrong)
            mine = torch.where(roster.mine >= 0, wrong[roster.mine], -1)
            self._wrong[name] = torch.where(mine >= 0, places[mine], -1).to(x.device)

    def forget(self) -> None:
        self._pool = {}

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        total, count = super().over_tokens(chunk)  # every rank sends back the gradients of what it got, be they none
        return sum((pool.x[:0].sum() for pool in self._pool.values()), total), count

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        if self.part.negatives == "swapped":
            rows = self._known(chunk.batch)
            return self.head(self._pooled(chunk.fused[self.read])[rows]), chunk.batch.labels["matched"][rows]
        a, b, first = self.part.a, self.part.b, chunk.samples.start
        own = self._whole(chunk)
        wrong_a, wrong_b = self._wrong[a][own], self._wrong[b][own]
        has_a, has_b = wrong_a >= 0, wrong_b >= 0
        assert chunk.fusion is not None, "a recipe with Matching has a fusion"
        joined = dict.fromkeys(chunk.fusion.told_by(self.read), torch.cat([own[has_a], own[has_b]]))
        exchanged = {a: torch.cat([wrong_a[has_a], own[has_b]]), b: torch.cat([own[has_a], wrong_b[has_b]])}
        tokens, pairing = {}, {}
        for name, samples in {**joined, **exchanged}.items():
            tokens[name], pairing[name] = self._needed(chunk, name, samples)
        right = self._pooled(chunk.fused[self.read])[own - first]
        wrong = self._pooled(chunk.fusion(tokens, pairing)[self.read])
        targets = torch.zeros(len(right) + len(wrong), dtype=torch.int64, device=own.device)
        targets[: len(right)] = 1
        return self.head(torch.cat([right, wrong])), targets

    def scores(self, chunk: Chunk, tokens: Mapping[str, Tokens], pairing: Mapping[str, Tensor]) -> Tensor:
        """float32 [n]: how well the streams of n pairs match, as a logit."""
        assert chunk.fusion is not None, "a recipe with Matching has a fusion"
        wrong, right = self.head(self._pooled(chunk.fusion(tokens, pairing)[self.read])).float().unbind(1)
        return right - wrong

    def owners(self, chunk: Chunk) -> Tensor:
        if self.part.negatives == "swapped":
            return self._known(chunk.batch)
        own = self._whole(chunk)
        has_a, has_b = (self._wrong[name][own] >= 0 for name in (self.part.a, self.part.b))
        return torch.cat([own, own[has_a], own[has_b]]) - chunk.samples.start

    def _known(self, batch: Batch) -> Tensor:
        """int64 [n]: the samples with both streams of which it is known whether they match."""
        has_a, has_b = (batch[name].cu_seqlens.diff() > 0 for name in (self.part.a, self.part.b))
        return torch.nonzero((batch.labels["matched"] >= 0) & has_a & has_b).flatten()

    def _whole(self, chunk: Chunk) -> Tensor:
        """int64 [n]: the samples of a chunk, by their place in the batch, that have both streams."""
        own = torch.arange(chunk.samples.start, chunk.samples.stop, device=chunk.batch.concepts.device)
        return own[chunk.whole.present(self.part.a, self.part.b)[own]]

    def _needed(self, chunk: Chunk, name: str, samples: Tensor) -> tuple[Tokens, Tensor]:
        """(the tokens of some samples of the pool, where these are in them): all of them if the batch is one chunk."""
        whole = self._pool.get(name) or chunk.whole.tokens(name)
        if len(chunk.samples) == chunk.whole.batch.samples:
            return whole, samples
        needed, place = torch.unique(samples, return_inverse=True)
        return whole.take(needed), place

    def _pooled(self, tokens: Tokens) -> Tensor:
        return segment_pool(tokens.x, tokens.cu_seqlens, mode="mean")

    def chance_loss(self, batch: Batch) -> float | None:
        """Of the share of right pairs: a third when sampled."""
        right, known = 1.0, 3.0
        if self.part.negatives == "swapped":
            matched = batch.labels["matched"][self._known(batch)]
            right, known = batch.roster.ranks.table([int(matched.sum()), len(matched)]).sum(0).tolist()
        return sum(part / known * math.log(known / part) for part in (right, known - right) if part > 0)
