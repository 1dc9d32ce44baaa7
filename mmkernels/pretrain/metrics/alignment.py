"""Alignment of positives and uniformity of each stream on the hypersphere.

Source: Wang and Isola 2020 (arXiv:2005.10242).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.embedded import embed
from mmkernels.pretrain.metrics.guessing import through_name

__all__ = ["Alignment"]

_BLOCK = 512  # rows compared at a time


@dataclass(frozen=True)
class Alignment:
    """Alignment: mean squared distance of an `a` to its own `b`; chance is that to every `b`. Uniformity: the log of
    the mean of exp(-2 distance squared) over all pairs of a stream; chance is 0, where all are in one place. It has no
    interval: a resample has pairs of a sample with itself. Lower is better."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    through: str = ""
    """As in `Retrieval`."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        space = embed(model, held_out, self.a, self.b, self.through)
        if len(space.b) < 2:
            return []
        a, b = space.a.double(), space.b.double()
        distances = (a - b[space.targets]).square().sum(1)
        everywhere = a.square().sum(1).mean() + b.square().sum(1).mean() - 2 * a.mean(0) @ b.mean(0)
        more: dict[str, Any] = {"percent": False, "higher_is_better": False}
        through, clusters = through_name(model, self.through, self.a, self.b), space.concepts[0]
        name = f"{through}{self.a}, {self.b}: alignment"
        return [
            Figure.of_each(name, distances.cpu(), everywhere.item(), clusters=clusters, **more),
            Figure(f"{through}{self.a}: uniformity", uniformity(a), 0.0, **more),
            Figure(f"{through}{self.b}: uniformity", uniformity(b), 0.0, **more),
        ]


def uniformity(x: Tensor) -> float:
    """log mean exp(-2 |x_i - x_j|^2) over the pairs i < j of float64 [N, E], a block of rows at a time."""
    total, squares = 0.0, x.square().sum(1)
    for first in range(0, len(x), _BLOCK):
        rows = slice(first, first + _BLOCK)
        distances = (squares[rows, None] + squares - 2 * x[rows] @ x.T).clamp(min=0)
        total += torch.exp(-2 * distances).triu(first + 1).sum().item()
    return -math.inf if total == 0 else math.log(total / (len(x) * (len(x) - 1) / 2))  # a NaN stays one
