"""How much of a class a linear map can read from the features: ridge regression to the classes, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut
from mmkernels.pretrain.metrics.features import probed
from mmkernels.pretrain.metrics.guessing import best_column

__all__ = ["LinearProbe", "Ridge"]

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FOLDS = 5


@dataclass(frozen=True)
class LinearProbe:
    """Accuracy on the held-out set of a linear classifier that is fitted to the training samples' features. Every fifth
    of them chooses its ridge. Samples of a class that the training data lacks are not scored; a split without any
    other gives no figure."""

    stream: str = "image"
    """The stream; its pooled tokens are the features, before the projection."""
    label: str = ""
    """Field of the data that has the class; empty: the concept."""
    limit: int = 10_000
    """Most training samples, evenly spaced."""

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = self.each(model, held_out)
        return [] if found is None else [found.figure(headline=True)]

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        """Whether each sample is recognised."""
        found = probed(model, held_out, self.stream, self.label, self.limit)
        if found is None:
            return None
        probe = Ridge(found.fit, found.fit_classes, chosen_ridge(found.fit, found.fit_classes))
        return found.judged(f"{self.stream}: {self.label or 'concept'} by a linear probe", probe(found.score))


class Ridge:
    """Least squares from standardised features to one-hot classes.

    Args:
        x: float [N, C].
        classes: int64 [N], from 0.
        ridge: penalty of the squared weights, as a fraction of N.
    """

    def __init__(self, x: Tensor, classes: Tensor, ridge: float) -> None:
        x = x.double()
        deviation, self.mean = torch.std_mean(x, 0, correction=0)
        self.scale = torch.where(deviation > 1e-6 * deviation.amax(), 1 / deviation, 0.0)  # constant ones say nothing
        x = (x - self.mean) * self.scale
        sums = x.new_zeros(int(classes.max()) + 1, x.shape[1]).index_add_(0, classes, x)  # [K, C]
        self.shares = classes.bincount().double() / len(x)  # the best guess without features
        gram = x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        self.weight = torch.linalg.solve(gram, sums.T)  # [C, K]

    def __call__(self, x: Tensor) -> Tensor:
        """Classes int64 [M] of features [M, C]; -1 for a tie, and beside a NaN."""
        return best_column((x.double() - self.mean) * self.scale @ self.weight + self.shares)


def chosen_ridge(x: Tensor, classes: Tensor) -> float:
    """That of RIDGES which classifies every fifth sample best after a fit to the others; of equals the largest."""
    held = torch.arange(len(x), device=x.device) % _FOLDS == 0
    held &= torch.isin(classes, classes[~held])  # a class without another sample cannot be recognised
    if not bool(held.any()):
        return RIDGES[-1]
    known, kept = torch.unique(classes[~held], return_inverse=True)
    target = torch.searchsorted(known, classes[held])
    right = [(Ridge(x[~held], kept, ridge)(x[held]) == target).double().mean().item() for ridge in RIDGES]
    return max(zip(right, RIDGES, strict=True))[1]
