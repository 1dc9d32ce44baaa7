"""One number of an evaluation, with what a guess would get and the interval in which it would fall again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["Figure", "interval"]

RESAMPLES = 1000
LEVEL = 0.95
_AT_ONCE = 2_000_000  # drawn clusters in memory

Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation."""

    name: str  # "image → text R@10"
    value: float
    chance: float | None = None  # of a guess that ignores the input
    percent: bool = True  # a share, shown as a percentage
    higher_is_better: bool = True
    headline: bool = False  # shown at the top of the report and on the progress bar
    low: float | None = None  # the 95% bootstrap interval over the held-out samples; it says nothing of other seeds
    high: float | None = None

    @classmethod
    def of_each(
        cls,
        name: str,
        values: Tensor | np.ndarray,
        chance: float | None = None,
        *,
        clusters: Tensor | np.ndarray | None = None,
        **more: Any,
    ) -> Figure:
        """The mean of n values, and its interval.

        Args:
            name: of the figure.
            values: float or bool [n], at least one.
            chance: as in the figure.
            clusters: int [n]: values of the same cluster (answers of one sample, pictures of one concept) are drawn
                together, since they are not independent; None: each alone.
            more: further fields.
        """
        each = np.asarray(values, np.float64)
        return cls.of_sums(name, np.stack([each, np.ones_like(each)], 1), _ratio, chance, clusters=clusters, **more)

    @classmethod
    def of_sums(
        cls,
        name: str,
        sums: np.ndarray,
        statistic: Statistic,
        chance: float | None = None,
        *,
        clusters: Tensor | np.ndarray | None = None,
        **more: Any,
    ) -> Figure:
        """A function of sums over n samples, and its interval.

        Args:
            sums: float [n, K], what each sample adds.
            statistic: [B, K] -> [B].
            chance, clusters, more: as in `of_each`.
        """
        value = float(statistic(sums.sum(0, keepdims=True))[0])
        low, high = interval(sums, statistic, None if clusters is None else np.asarray(clusters))
        return cls(name, value, chance, low=low, high=high, **more)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def shown(self) -> str:
        return self._shown(self.value)

    def shown_chance(self) -> str:
        return "" if self.chance is None else self._shown(self.chance)

    def shown_interval(self) -> str:
        return "" if self.low is None or self.high is None else f"{self._shown(self.low)} to {self._shown(self.high)}"

    def _shown(self, value: float) -> str:
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}"


def interval(
    sums: np.ndarray, statistic: Statistic, clusters: np.ndarray | None = None
) -> tuple[float | None, float | None]:
    """The middle 95% of a statistic over 1000 resamples with replacement, always the same ones.

    Args:
        sums: float [n, K], what each sample adds.
        statistic: [B, K] -> [B].
        clusters: int [n]; None: each sample is one.

    Returns:
        (low, high), or (None, None) if there is but one cluster, or a resample has no value.
    """
    if clusters is not None:
        _, places = np.unique(clusters, return_inverse=True)
        grouped = np.zeros((int(places.max(initial=-1)) + 1, sums.shape[1]))
        np.add.at(grouped, places.reshape(-1), sums)
        sums = grouped
    n = len(sums)
    if n < 2:
        return None, None
    random, found = np.random.default_rng(0), []
    block = max(1, _AT_ONCE // n)
    for first in range(0, RESAMPLES, block):
        drawn = random.integers(n, size=(min(block, RESAMPLES - first), n))
        times = np.stack([np.bincount(row, minlength=n) for row in drawn])
        found.append(statistic(times @ sums))
    values = np.concatenate(found)
    if not np.isfinite(values).all():
        return None, None
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: np.ndarray = sums[:, 0] / sums[:, 1]
    return ratio
