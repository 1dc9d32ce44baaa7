"""Give some samples the value of another sample, to be told from those that kept their own.

Source: Chen et al. 2020 (UNITER, arXiv:1909.11740): half of the pairs.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from zlib import crc32

import numpy as np

from mmkernels.pretrain.candidates import SWAPPED_BY, Candidates
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.views.base import View

__all__ = ["Swap"]


@dataclass(frozen=True)
class Swap(View):
    """Set the label "matched": 1 for a sample with its own value, 0 with another's, -100 without any.

    The other sample is one of the batch with another concept; a sample for which there is none keeps its value. So does
    one that another view has swapped already, lest both take it from the same sample, and match; unless they draw the
    same (one field in two streams, and no other salt).
    """

    share: float = 0.5
    """Of the samples, how many are swapped."""

    evaluated: ClassVar[bool] = True
    swaps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a share between 0 and 1, got {self.share}")

    def __call__(
        self,
        values: Sequence[Any],
        draws: Draws,
        labels: MutableMapping[str, np.ndarray],
        among: Candidates | None = None,
    ) -> list[Any]:
        """Values of any kind; `among` has those of the whole batch, if this is only a part of it."""
        concepts = labels["concept"]
        present = np.array([value is not None for value in values], bool)
        among = among or Candidates(concepts, values.__getitem__)
        by, me = labels.setdefault(SWAPPED_BY, np.zeros(len(values), np.int64)), crc32(draws.purpose.encode()) + 1
        matched = np.where(present, 1, -100).astype(np.int64)
        out = list(values)
        for i, (swapped, which) in enumerate(draws.uniform(2).tolist()):
            if not present[i] or swapped >= self.share or by[i] not in (0, me):
                continue
            others = np.flatnonzero(among.concepts != concepts[i])
            # The one that is drawn, or the next that there is: the same however many ranks have a part of the batch.
            found = (among.value(int(place)) for place in np.roll(others, -int(which * len(others))))
            other = next((value for value in found if value is not None), None)
            if other is not None:
                out[i], matched[i], by[i] = other, 0, me
        labels["matched"] = np.minimum(matched, labels.get("matched", matched))  # a second view may swap another field
        return out
