"""A figure by the classes of a label, and how far apart they are: answers by type, gaps between groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut
from mmkernels.pretrain.metrics.shuffled import Shuffled

__all__ = ["Groups"]

_SHUFFLES = 200


@dataclass(frozen=True)
class Groups:
    """The mean of a metric in each group of samples, and the gap between the best and the worst group. Chance of the
    gap is its mean when groups are shuffled among what is independent, such as concepts: even without a difference,
    some group comes out best. A sample whose class the training data lacks is in none."""

    of: Any = None
    """A metric that judges samples one by one: Predictions, Retrieval, LinearProbe, NearestNeighbours."""
    label: str = ""
    """Field of the data whose classes are the groups."""
    least: int = 20
    """A group with fewer values is shown, but takes no part in the gap."""

    optional: ClassVar[bool] = True  # data without the label is welcome

    def __post_init__(self) -> None:
        if not hasattr(self.of, "each"):
            raise ValueError(f"of: expected a metric that judges samples one by one, got {self.of!r}")
        if not self.label:
            raise ValueError("label: expected a label field of the data, got ''")
        if self.least < 1:
            raise ValueError(f"least: expected at least 1, got {self.least}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        each, classes = self.of.each(model, held_out), held_out.train.classes.get(self.label)
        if each is None or classes is None or not len(each.values):
            return []
        values = {item: held_out.source.peek(item).get(self.label, -1) for item in np.unique(each.items).tolist()}
        groups = np.array([values[item] for item in each.items.tolist()], np.int64)
        present = [group for group in np.unique(groups).tolist() if group >= 0]
        figures = [self._one(each.of(groups == group), classes[group]) for group in present]
        compared = [group for group in present if (groups == group).sum() >= self.least]
        return figures + ([self._gap(each, groups, compared)] if len(compared) > 1 else [])

    def _one(self, each: Each, name: str) -> Figure:
        return replace(each.figure(), name=f"{each.name}, {self.label} {name}")

    def _gap(self, each: Each, groups: np.ndarray, compared: list[int]) -> Figure:
        there = np.isin(groups, compared)
        each, own = each.of(there), np.searchsorted(compared, groups[there])
        shuffled = Shuffled(own, each.items, each.clusters)
        sums = [_sums(each.values, shuffled(), len(compared)) for _ in range(_SHUFFLES)]
        chance = float(_gaps(np.stack(sums)).mean())
        name = f"{each.name}: gap between the best and the worst {self.label}"
        table = _table(each.values, own, len(compared))
        return Figure.of_sums(name, table, _gaps, chance, clusters=each.clusters, higher_is_better=False)


def _table(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """float64 [n, 2 G]: the value of each sample in the column of its group, and its count."""
    own = groups[:, None] == np.arange(count)
    return np.concatenate([own * values[:, None].astype(np.float64), own], 1)


def _sums(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray:
    """float64 [2 G]: of the rows of that table."""
    weights = (values.astype(np.float64), None)
    return np.concatenate([np.bincount(groups, each, minlength=count) for each in weights])


def _gaps(sums: np.ndarray) -> np.ndarray:
    """[B, 2 G] -> [B]"""
    totals, counts = np.split(sums, 2, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = totals / counts  # a group of which nothing was drawn is NaN
    gaps: np.ndarray = np.nanmax(means, 1) - np.nanmin(means, 1)
    return gaps
