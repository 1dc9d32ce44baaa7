"""Correlation: whatever linear maps of two streams correlate most should correlate fully (deep CCA).

    loss = 1 - |S_aa^-1/2 S_ab S_bb^-1/2|_* / E    S_ab = (a - mean a)^T (b - mean b) / (n - 1), S_aa likewise + ridge I

1 less the mean of the canonical correlations. Embeddings are scaled to a mean square of 1, so that the ridge has a
scale. Computed in float64; Cholesky factors serve for the square roots, as the singular values are the same.

Source: Andrew et al. 2013, Deep Canonical Correlation Analysis; maps for retrieval from running covariances: Chang et
al. 2018 (arXiv:1707.09669).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.objectives.base import BatchObjective
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.seen import Seen

__all__ = ["Correlation"]


@dataclass(frozen=True)
class Correlation:
    """The mean canonical correlation of two streams. A batch needs more samples than an embedding has numbers: with
    fewer, any two streams correlate fully."""

    a: str = "image"
    """One stream."""
    b: str = "text"
    """The other stream."""
    ridge: float = 1e-3
    """Added to the variances."""
    decay: float = 0.95
    """Of the running covariances, from which the maps into the shared space are made."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""

    @property
    def compares(self) -> tuple[str, ...]:
        return self.a, self.b

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ValueError(f"ridge: expected a positive number, got {self.ridge}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay: expected 0 <= decay < 1, got {self.decay}")

    def build(self, facts: Facts) -> CorrelationLoss:
        return CorrelationLoss(self, facts)


class CorrelationLoss(BatchObjective):
    mean: Tensor
    covariance: Tensor
    steps: Tensor

    def __init__(self, part: Correlation, facts: Facts) -> None:
        super().__init__()
        self.part, self.size = part, facts.shape.embed_dim
        self.least = self.size + 1
        self.register_buffer("mean", torch.zeros(2 * self.size, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(2 * self.size, 2 * self.size, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._latest: tuple[Tensor, Tensor] | None = None

    def over_batch(self, seen: Seen) -> Tensor:
        if 1 < seen.roster.samples < self.least:
            expected = f"expected more samples than the {self.size} numbers of an embedding (model.embed_dim)"
            raise ValueError(f"batch: {expected}, which Correlation needs, got {seen.roster.samples}")
        embedded, have = seen.everyone(self.part.a, self.part.b)
        rows = torch.nonzero(have).flatten()
        both = torch.cat([x[rows] for x in embedded], 1).double()
        if len(rows) <= self.size:  # too few to say anything
            return 0.0 * both.sum().float()
        both = both * self.size**0.5
        mean = both.mean(0)
        covariance = (both - mean).T @ (both - mean) / (len(rows) - 1)
        self._latest = mean.detach(), covariance.detach()
        correlations = torch.linalg.svdvals(self._whitened(covariance)[0])
        return (1 - correlations.mean()).float()

    def _whitened(self, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """([E, E] correlations of the whitened streams, the Cholesky factors of each stream's own covariance)."""
        n = self.size
        ridge = self.part.ridge * torch.eye(n, dtype=covariance.dtype, device=covariance.device)
        left = torch.linalg.cholesky(covariance[:n, :n] + ridge)
        right = torch.linalg.cholesky(covariance[n:, n:] + ridge)
        half = torch.linalg.solve_triangular(left, covariance[:n, n:], upper=False)
        return torch.linalg.solve_triangular(right, half.T, upper=False).T, left, right

    def after_step(self) -> None:
        if self._latest is None:
            return
        decay = self.part.decay if int(self.steps) else 0.0
        for kept, new in zip((self.mean, self.covariance), self._latest, strict=True):
            kept.lerp_(new, 1 - decay)
        self.steps += 1

    def forget(self) -> None:
        self._latest = None

    def shared(self, stream: str, x: Tensor) -> Tensor:
        """Embeddings [n, E] of a stream in the space in which the two correlate, weighted by their correlations."""
        if not int(self.steps):
            return x
        matrix, left, right = self._whitened(self.covariance)
        u, s, vh = torch.linalg.svd(matrix)
        first = stream == self.part.a
        factor, turn, mean = (left, u, self.mean[: self.size]) if first else (right, vh.T, self.mean[self.size :])
        centred = x.double() * self.size**0.5 - mean
        white = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
        return F.normalize(white @ turn * s, dim=-1).to(x.dtype)
