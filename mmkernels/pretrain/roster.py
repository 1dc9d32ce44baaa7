"""Who is in a batch, over all ranks: what an objective must know of the samples that other ranks hold.

The samples are in the order of the batch, which does not depend on the number of ranks or on who holds which.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmkernels import GatheredKeys
from mmkernels.pretrain.ranks import ALONE, Ranks

__all__ = ["Roster"]


@dataclass(frozen=True, eq=False)
class Roster:
    """The B samples of a batch. Tensors are on the host.

    Attributes:
        ranks: who share them.
        concepts: int64 [B].
        lengths: stream -> int64 [B]: tokens; 0 for a sample without the stream.
        owners: int64 [B]: the rank that holds each.
        mine: int64 [S]: which of them are this rank's, in its own order; -1 for one that only fills an empty rank.
        order: int64 [B]: where each is among the rows of all ranks, one rank after the other.
        counts: rows of each rank.
        sent: embeddings of all ranks that are on their way, by their stream and the streams that their samples have.
    """

    ranks: Ranks
    concepts: Tensor
    lengths: Mapping[str, Tensor]
    owners: Tensor
    mine: Tensor
    order: Tensor
    counts: tuple[int, ...]
    sent: dict[tuple[str, ...], GatheredKeys] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        concepts: Tensor,
        lengths: Mapping[str, Tensor],
        places: Sequence[int] | None = None,
        ranks: Ranks = ALONE,
        counts: Sequence[int] | None = None,
    ) -> Roster:
        """Exchange who has what.

        Args:
            concepts: int64 [S] of this rank.
            lengths: stream -> int64 [S].
            places: of its samples in the whole batch, -1 for one that is none; None: in order.
            ranks: who exchange.
            counts: samples of each rank; None: of this one alone.
        """
        own = torch.arange(len(concepts)) if places is None else torch.tensor(places, dtype=torch.int64)
        lines = torch.stack([own, concepts.cpu(), *(each.cpu() for each in lengths.values())], 1)  # [S, 2 + streams]
        counts = tuple(counts or [len(lines)])
        every = ranks.rows(lines, counts)
        owners = torch.arange(ranks.size).repeat_interleave(torch.tensor(counts))
        order = every[:, 0].argsort(stable=True)
        order = order[every[order, 0] >= 0]
        every, owners = every[order], owners[order]
        mine = torch.full((len(own),), -1)
        mine[own >= 0] = torch.searchsorted(every[:, 0].contiguous(), own[own >= 0])
        columns = dict(zip(lengths, every[:, 2:].unbind(1), strict=True))
        return cls(ranks, every[:, 1].contiguous(), columns, owners, mine, order, counts)

    @property
    def own(self) -> Roster:
        """Of this rank's samples alone, as if there were no other ranks."""
        has = self.mine >= 0
        mine, here = torch.full_like(self.mine, -1), self.mine[has]
        order = torch.arange(len(here))
        mine[has] = order
        lengths = {name: each[here] for name, each in self.lengths.items()}
        return Roster(ALONE, self.concepts[here], lengths, torch.zeros_like(here), mine, order, (len(mine),))

    @property
    def samples(self) -> int:
        """B."""
        return len(self.concepts)

    @property
    def tokens(self) -> int:
        """Of all streams."""
        return sum(int(each.sum()) for each in self.lengths.values())

    def present(self, *streams: str) -> Tensor:
        """bool [B]: the samples that have all of these streams."""
        return torch.stack([self.lengths[stream] > 0 for stream in streams]).all(0)

    def distinct(self, *streams: str) -> bool:
        """Whether no two samples that have these streams share a concept."""
        concepts = self.concepts[self.present(*streams)]
        return len(concepts.unique()) == len(concepts)

    def rows(self, mine: Tensor) -> Tensor:
        """[B, ...]: a row of every sample, from those of this rank [S, ...], for a loss that all ranks compute."""
        if self.ranks.group is None:
            return mine
        return self.ranks.rows(mine, self.counts)[self.order.to(mine.device)]

    def mean(self, values: Tensor, of: int) -> Tensor:
        """This rank's part of the mean of some values over all ranks: the mean of the parts is it, and their gradients'
        mean is its gradient.

        Args:
            values: [n] of this rank.
            of: how many there are on all ranks.
        """
        return values.sum() * (self.ranks.size / max(of, 1))

    def means(self, totals: Mapping[str, tuple[Any, float]]) -> dict[str, tuple[Any, bool]]:
        """Of sums with their counts on this rank: (its part of the mean over all, as in `mean`; if any counted)."""
        counts = self.ranks.table([count for _, count in totals.values()]).sum(0).tolist() if totals else []
        return {
            name: (total * (self.ranks.size / max(count, 1)), count > 0)
            for (name, (total, _)), count in zip(totals.items(), counts, strict=True)
        }
