"""How long a step will take: fitted to the first steps of this process, then held beside what the others take."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import fmean, median

import numpy as np

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.workload import workload

__all__ = ["StepTime", "work_of"]

_WARM = 3  # steps of a kind that are left out: memory, caches and threads are set up in them
_FITTED = 20  # steps of a kind that its line is fitted to


@dataclass
class _Line:
    """seconds = fixed + work * slope, once there are enough steps."""

    seen: list[tuple[float, float]] = field(default_factory=list)  # (work, seconds)
    fixed: float | None = None
    slope: float = 0.0

    def fit(self) -> None:
        work, seconds = zip(*self.seen[_WARM:], strict=True)
        spread = np.var(work)
        steepest = fmean(seconds) / fmean(work) if fmean(work) else 0.0  # no part of a step takes less than no time
        found = float(np.cov(work, seconds, bias=True)[0, 1] / spread) if spread else 0.0
        self.slope = min(max(found, 0.0), steepest)
        self.fixed = max(0.0, median(s - self.slope * w for w, s in self.seen[_WARM:]))


class StepTime:
    """Predicts the seconds of a step by its kind and the work in its batch: fixed + work / rate.

    Both are fitted to steps of the same kind: the same stage, the same objectives, gradients measured or not. What a
    policy costs is thereby known: the share of each kind times its seconds. There is no prediction before
    a kind has had 23 steps in this process; the first three are left out.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, _Line] = {}
        self._now: tuple[Hashable, float] = (None, 0.0)

    def begin(self, kind: Hashable, work: float) -> None:
        """Say of which kind a step is and how much work its batch is, in flop of a forward pass."""
        self._now = kind, work

    def predicted(self) -> dict[str, float]:
        """`seconds_predicted` of this step; empty before there is a fit."""
        kind, work = self._now
        line = self._lines.get(kind)
        if line is None or line.fixed is None:
            return {}
        return {"seconds_predicted": float(f"{line.fixed + line.slope * work:.5g}")}

    def see(self, seconds: float) -> None:
        """Say how long it took."""
        kind, work = self._now
        line = self._lines.setdefault(kind, _Line())
        if line.fixed is None:
            line.seen.append((work, seconds))
            if len(line.seen) == _WARM + _FITTED:
                line.fit()


def work_of(recipe: Recipe, batch: Batch, ranks: int) -> list[float]:
    """Each rank's part of the work in a batch."""
    roster = batch.roster
    lengths = np.stack([roster.lengths[name].numpy() for name in recipe.streams], 1)
    found: list[float] = np.bincount(roster.owners.numpy(), workload(recipe, lengths), minlength=ranks).tolist()
    return found
