"""Which rank gets which samples of a batch: nearly the same work for each, and nobody asks anybody for samples."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from mmkernels.pretrain.data.base import Source
from mmkernels.pretrain.data.collate import Collator
from mmkernels.pretrain.ranks import Ranks

__all__ = ["Dealer", "Hand", "deal"]


class Hand(NamedTuple):
    """What one rank gets of a batch."""

    places: np.ndarray  # int64 [S]: of its samples in the batch
    present: dict[str, np.ndarray]  # stream -> bool [B]: which samples of the batch have it


class Dealer:
    """Deals batches to ranks by cost. All ranks call it in turn, and come to the same result.

    Args:
        source: the training data.
        collator: knows the lengths of samples.
        ranks: who share the batches.
        cost: int64 [n, streams] lengths -> float64 [n]: the work of each sample.
    """

    def __init__(
        self, source: Source, collator: Collator, ranks: Ranks, cost: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        self.source, self.collator, self.ranks, self.cost = source, collator, ranks, cost

    def hands(self, batches: Sequence[np.ndarray]) -> list[Hand]:
        """This rank's part of some batches of sample numbers. Each rank looks at its share of the samples, and tells
        the others how long they are."""
        items = np.concatenate(batches)
        share = np.array_split(items, self.ranks.size)
        looked = self.ranks.together(lambda: self.collator.stream_lengths(self.source, share[self.ranks.rank]))
        lengths = self.ranks.rows(torch.from_numpy(looked), [len(each) for each in share]).numpy()
        ends = np.cumsum([len(batch) for batch in batches])[:-1]
        return [self._hand(each) for each in np.split(lengths, ends)]

    def _hand(self, lengths: np.ndarray) -> Hand:
        owners = deal(self.cost(lengths), self.ranks.size)
        present = dict(zip(self.collator.streams, (lengths > 0).T, strict=True))
        return Hand(np.flatnonzero(owners == self.ranks.rank), present)


def deal(costs: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each item, int64 [n], so that their costs nearly add up to the same: each item in turn, the dearest
    first, goes to the rank with the least so far. No rank has more than 4/3 of the least possible maximum.

    Args:
        costs: float64 [n], at least 0.
        ranks: W.

    Source: Graham 1969, Bounds on Multiprocessing Timing Anomalies (LPT).
    """
    owners = np.zeros(len(costs), np.int64)
    loads = [(0.0, 0, rank) for rank in range(ranks)]  # ties go to the rank with fewer items
    values = costs.tolist()
    for item in np.argsort(-costs, kind="stable").tolist():
        load, count, rank = loads[0]
        owners[item] = rank
        heapq.heapreplace(loads, (load + values[item], count + 1, rank))
    return owners
