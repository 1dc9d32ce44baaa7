"""Sigmoid: every pair of the batch is a yes-or-no question; learned scale and bias start at 10 and -10.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023 (arXiv:2303.15343).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmkernels.nn import SigLIPLoss
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective, paired
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["Sigmoid"]


@dataclass(frozen=True)
class Sigmoid:
    """Whether two samples of two streams belong together, for every pair."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""
    init_scale: float = 10.0
    """Learned factor of the similarities, at the start."""
    init_bias: float = -10.0
    """Learned addend of the logits, at the start."""
    max_scale: float = 100.0
    """Upper bound of the scale."""

    by_concept: ClassVar[bool] = True

    @property
    def compares(self) -> tuple[str, ...]:
        return self.a, self.b

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.b,)

    def build(self, facts: Facts) -> SigmoidLoss:
        return SigmoidLoss(self, facts)


class SigmoidLoss(BatchObjective):
    def __init__(self, part: Sigmoid, facts: Facts) -> None:
        super().__init__()
        self.part = part
        self.loss = SigLIPLoss(
            init_scale=part.init_scale,
            init_bias=part.init_bias,
            max_scale=part.max_scale,
            normalize=False,
            backend=facts.backend,
        )

    def over_batch(self, seen: Seen) -> Tensor:
        a, b = self.part.a, self.part.b
        rows = torch.nonzero(seen.present(a, b)).flatten()
        if not seen.roster.present(a, b).any():
            return 0.0 * (seen.embedding(a).sum() + seen.embedding(b).sum())
        options: dict[str, Any] = {"group": seen.roster.ranks.group, "gathered": seen.roster.sent.get((b, a, b))}
        if not seen.roster.distinct(a, b):
            options |= {"query_ids": seen.batch.concepts[rows], "key_ids": seen.batch.concepts[rows]}
        loss: Tensor = self.loss(seen.embedding(a)[rows], seen.embedding(b)[rows], **options)
        return loss

    def after_step(self) -> None:
        self.loss.clamp_()

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": self.loss.scale.item(), "logit_bias": self.loss.logit_bias.item()}

    def chance_loss(self, batch: Batch) -> float | None:
        """Every pair positive with probability 1/n."""
        n = paired(batch, self.part.a, self.part.b)
        return math.log(n) + (n - 1) * math.log(n / (n - 1)) if n > 1 else None
