"""Which column of scores is a guess, and which other sample is another one: what all metrics agree on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["best_column", "of_others", "through_name"]


def best_column(scores: Tensor) -> Tensor:
    """int64 [n]: where the maximum of each row of [n, K] is; -1, which is wrong, for a tie, and beside a NaN."""
    if not scores.shape[1]:
        return torch.full((len(scores),), -1, dtype=torch.int64, device=scores.device)
    best, place = scores.max(1)  # NaN if there is one in the row
    return torch.where((scores == best[:, None]).sum(1) == 1, place, -1)


def of_others(concepts: Tensor) -> Tensor | None:
    """int64 [n]: for each sample of a batch the next one of another concept, the first following the last; None if all
    have the same."""
    n = len(concepts)
    last = torch.nonzero(concepts.repeat(2)[:-1] != concepts.repeat(2)[1:]).flatten()  # of each run of one concept
    if not len(last):
        return None
    rows = torch.arange(n, device=concepts.device)
    return (last[torch.searchsorted(last, rows)] + 1) % n


def through_name(model: Any, through: str, *pair: str) -> str:
    """What the names of figures through an objective begin with: its own, where several objectives compare the pair."""
    compared = [set(getattr(getattr(each, "part", None), "compares", ())) for each in model.objectives.values()]
    return f"{through}: " if through and compared.count(set(pair)) > 1 else ""
