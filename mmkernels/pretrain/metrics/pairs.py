"""Pairs of a held-out batch, and what an objective says of how well each fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.metrics.base import HeldOut
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Pairs", "pairs_of"]

_AT_ONCE = 1024  # pairs that are fused together


@dataclass(frozen=True)
class Pairs:
    """A held-out batch, encoded once."""

    model: Any
    objective: Any  # with a method `scores`
    chunk: Any  # of the whole batch

    def scores(self, pairing: Mapping[str, Tensor], tokens: Mapping[str, Tokens] | None = None) -> Tensor:
        """float32 [n] of n pairs: stream -> which sample int64 [n].

        Args:
            pairing: as above; streams that the fusion does not need may be there too.
            tokens: to use in place of the batch's own, by stream.
        """
        given = {name: self.chunk.whole.tokens(name) for name in pairing} | dict(tokens or {})
        n = len(next(iter(pairing.values())))
        parts = [{name: each[i : i + _AT_ONCE] for name, each in pairing.items()} for i in range(0, n, _AT_ONCE)]
        return torch.cat([torch.zeros(0), *(self.objective.scores(self.chunk, given, part).cpu() for part in parts)])

    def having(self, *streams: str) -> Tensor:
        """int64: the samples of the batch that have all of these streams."""
        return torch.nonzero(self.chunk.whole.present(*streams)).flatten()

    def fused(self, *needed: str) -> list[str]:
        """Streams that the tokens which the objective reads tell of, and those needed."""
        read = getattr(self.objective, "read", "") or self.objective.stream
        joined = self.model.fusion.told_by(read)
        return [name for name in self.model.encoded if name in joined or name in needed]


def pairs_of(model: Any, held_out: HeldOut, name: str, limit: int, samples: list[Any] | None = None) -> Pairs | None:
    """A batch of at most `limit` samples, evenly spaced, or of those given; None if none can be read.

    Raises:
        ValueError: the objective cannot score pairs.
    """
    objective: Any = dict(model.objectives.items()).get(name)
    if not hasattr(objective, "scores") or model.fusion is None:
        can = ", ".join(key for key, each in model.objectives.items() if hasattr(each, "scores")) or "none"
        raise ValueError(f"objective: expected one that scores pairs in a fusion ({can}), got {name!r}")
    if samples is None:
        read = held_out.source.read_some(held_out.items(limit))
        samples, numbers = read.samples, read.items
    else:
        numbers = list(range(len(samples)))
    if not samples:
        return None
    masks = not hasattr(objective.part, "negatives")  # a masked word is asked for; a pair is judged as it is
    batch = held_out.collator(samples, numbers, mode="loss" if masks else "plain", objective=name)
    return Pairs(model, objective, model.whole(batch.to(held_out.device), name))
