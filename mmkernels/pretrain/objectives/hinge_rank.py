"""HingeRank: a sample's own key must be nearer than every wrong one, by a margin.

    loss = mean over rows i of mean over wrong j of max(0, margin - <a_i, b_i> + <a_i, b_j>)

Source: Frome et al. 2013, DeViSE: A Deep Visual-Semantic Embedding Model, who sum over j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["HingeRank"]

_BLOCK = 1024  # rows whose similarities are in memory at a time


@dataclass(frozen=True)
class HingeRank:
    """A margin between right and wrong keys, for all of the batch; keys of the same concept are not wrong."""

    a: str = "image"
    """Stream of the queries."""
    b: str = "text"
    """Stream of the keys."""
    margin: float = 0.1
    """How much nearer the right key must be, in cosine."""
    symmetric: bool = False
    """Also from b to a."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    by_concept: ClassVar[bool] = True

    @property
    def compares(self) -> tuple[str, ...]:
        return self.a, self.b

    def __post_init__(self) -> None:
        if not self.margin > 0:
            raise ValueError(f"margin: expected a positive number, got {self.margin}")

    def build(self, facts: Facts) -> HingeRankLoss:
        return HingeRankLoss(self)


class HingeRankLoss(BatchObjective):
    def __init__(self, part: HingeRank) -> None:
        super().__init__()
        self.part = part

    def over_batch(self, seen: Seen) -> Tensor:
        embedded, have = seen.everyone(self.part.a, self.part.b)
        rows = torch.nonzero(have).flatten()
        a, b = (x[rows] for x in embedded)
        concepts = seen.roster.concepts.to(rows.device)[rows]
        ways = [(a, b), (b, a)] if self.part.symmetric else [(a, b)]
        return torch.stack([hinge_rank(*way, concepts, self.part.margin) for way in ways]).mean()

    def chance_loss(self, batch: Batch) -> float | None:
        """Of keys that are all alike."""
        return self.part.margin


def hinge_rank(queries: Tensor, keys: Tensor, concepts: Tensor, margin: float) -> Tensor:
    """The loss of queries [N, E] whose right keys are at the same places of keys [N, E]; 0 without a wrong key."""
    right = (queries * keys).sum(1).float()
    _, which, counts = torch.unique(concepts, return_inverse=True, return_counts=True)
    wrong = len(concepts) - counts[which]  # keys, for each query

    def of_rows(x: Tensor, own: Tensor, ids: Tensor, number: Tensor) -> Tensor:
        excess = (margin - own[:, None] + x.float() @ keys.float().T).relu()
        return (excess.masked_fill(ids[:, None] == concepts, 0).sum(1) / number.clamp(min=1)).sum()

    blocks = zip(*(each.split(_BLOCK) for each in (queries, right, concepts, wrong)), strict=True)
    again = len(queries) > _BLOCK and torch.is_grad_enabled()
    sums = [checkpoint(of_rows, *block, use_reentrant=False) if again else of_rows(*block) for block in blocks]
    total: Tensor = torch.stack(sums).sum() if sums else right.sum()
    return total / (wrong > 0).sum().clamp(min=1)
