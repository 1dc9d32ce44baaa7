"""Cycle: maps between the embedding spaces of two streams, there and back again.

    loss = paired * (u(G a, b) + u(F b, a)) / 2 + (1 - paired) * (u(F G a, a) + u(G F b, b)) / 2
    u(x, y) = mean |x - y|^2 / mean |y - mean y|^2

The first part needs pairs; the second learns from every sample, also from those that lack the other stream. u is the
share of the variance that is not explained: embeddings that all become alike gain nothing.

Source: Zhu et al. 2017 (CycleGAN, arXiv:1703.10593); of embeddings: Lample et al. 2018 (arXiv:1710.04087).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["Cycle"]


@dataclass(frozen=True)
class Cycle:
    """A map from the embeddings of a to those of b, one back, and their consistency."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    paired: float = 0.5
    """Share of the loss that compares a map's result with the sample's own partner; 0: no pairs are used."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    @property
    def compares(self) -> tuple[str, ...]:
        return self.a, self.b

    def __post_init__(self) -> None:
        if not 0 <= self.paired <= 1:
            raise ValueError(f"paired: expected a share between 0 and 1, got {self.paired}")

    def build(self, facts: Facts) -> CycleLoss:
        return CycleLoss(self, facts)


class CycleLoss(BatchObjective):
    def __init__(self, part: Cycle, facts: Facts) -> None:
        super().__init__()
        self.part = part
        self.there, self.back = (Translator(facts.shape.embed_dim) for _ in range(2))

    def over_batch(self, seen: Seen) -> Tensor:
        (a,), has_a = seen.everyone(self.part.a)
        (b,), has_b = seen.everyone(self.part.b)
        there, back = self.there(a), self.back(b)
        pairs = unexplained(there, b, has_a & has_b) + unexplained(back, a, has_a & has_b)
        cycles = unexplained(self.back(there), a, has_a) + unexplained(self.there(back), b, has_b)
        return self.part.paired * pairs / 2 + (1 - self.part.paired) * cycles / 2

    def told(self, seen: Seen) -> bool:
        return any(bool(seen.roster.present(stream).any()) for stream in self.part.compares)

    def shared(self, stream: str, x: Tensor) -> Tensor:
        """Embeddings [n, E] of a stream in the space of b."""
        return self.there(x) if stream == self.part.a else x

    def chance_loss(self, batch: Batch) -> float | None:
        """Of maps to the mean."""
        return 1.0


class Translator(nn.Module):
    """From the unit vectors of one space to those of another."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, x: Tensor) -> Tensor:
        """[n, E] -> [n, E]"""
        scaled = x * x.shape[-1] ** 0.5  # to a mean square of 1
        return F.normalize(scaled + self.down(F.gelu(self.up(scaled), approximate="tanh")), dim=-1)


def unexplained(x: Tensor, y: Tensor, have: Tensor) -> Tensor:
    """The share of the variance of some rows of y that x does not explain; 0 for fewer than two rows."""
    rows = torch.nonzero(have).flatten()
    x, y = x[rows].float(), y[rows].float()
    if len(rows) < 2:
        return 0.0 * (x.sum() + y.sum())
    spread = (y - y.mean(0)).square().sum(1).mean()
    return (x - y).square().sum(1).mean() / spread.clamp(min=1e-6)
