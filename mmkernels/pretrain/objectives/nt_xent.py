"""NT-Xent: two views of each sample find each other among all views of the batch, with a fixed temperature.

Source: Chen et al. 2020 (SimCLR, arXiv:2002.05709).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels import infonce
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective, paired
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["NtXent"]


@dataclass(frozen=True)
class NtXent:
    """Cross entropy of a view's other view among the 2N - 1 others. Concepts and labels are not used."""

    a: str = "a"
    """Stream of the one view."""
    b: str = "b"
    """Stream of the other view."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""
    temperature: float = 0.1
    """Divisor of the similarities."""

    @property
    def compares(self) -> tuple[str, ...]:
        return self.a, self.b

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a positive number, got {self.temperature}")

    def build(self, facts: Facts) -> NtXentLoss:
        if self.a == self.b:
            raise ValueError(f"NtXent: expected two streams, got {self.a!r} twice")
        return NtXentLoss(self, facts)


class NtXentLoss(BatchObjective):
    def __init__(self, part: NtXent, facts: Facts) -> None:
        super().__init__()
        self.part, self.backend = part, facts.backend

    def over_batch(self, seen: Seen) -> Tensor:
        a, b = seen.embedding(self.part.a), seen.embedding(self.part.b)
        rows = torch.nonzero(seen.present(self.part.a, self.part.b)).flatten()
        n = len(rows)
        if not seen.roster.present(self.part.a, self.part.b).any():
            return 0.0 * (a.sum() + b.sum())
        views = torch.cat([a[rows], b[rows]])  # [2N, E]
        own = torch.arange(2 * n, device=views.device)
        ids = seen.roster.mine.to(rows.device)[rows]  # over all ranks
        ids = torch.cat([2 * ids, 2 * ids + 1])
        loss: Tensor = infonce(
            views,
            views,
            1 / self.part.temperature,
            targets=own.roll(n),
            query_ids=ids,
            key_ids=ids,
            same_id="ignore",  # a view is no negative of itself
            symmetric=False,
            group=seen.roster.ranks.group,
            backend=self.backend,
        )
        return loss

    def chance_loss(self, batch: Batch) -> float | None:
        views = 2 * paired(batch, self.part.a, self.part.b)
        return math.log(views - 1) if views else None
