"""Give some samples the value of another sample, to be told from those that kept their own.

Source: Chen et al. 2020 (UNITER, arXiv:1909.11740): half of the pairs; the most alike of several: Faghri et al. 2018
(VSE++, arXiv:1707.05612).
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.hashing import split_words
from mmkernels.pretrain.views.base import View

__all__ = ["Swap"]


@dataclass(frozen=True)
class Swap(View):
    """Set the label "matched": 1 for a sample with its own value, 0 with another's, -100 without any.

    The other sample is one of the batch with another concept; a sample for which there is none keeps its value.
    """

    share: float = 0.5
    """Of the samples, how many are swapped."""
    nearest_of: int = 1
    """For texts: so many others are drawn, and the one that has most words in common with the sample's own is taken
    (Jaccard index of their words). With 1, whether an image and a text belong together may show in less than what they
    are of: how many things the one has and the other names."""

    evaluated: ClassVar[bool] = True
    swaps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"share: expected a share between 0 and 1, got {self.share}")
        if self.nearest_of < 1:
            raise ValueError(f"nearest_of: expected at least 1, got {self.nearest_of}")

    def __call__(self, values: Sequence[Any], draws: Draws, labels: MutableMapping[str, np.ndarray]) -> list[Any]:
        """Values of any kind; texts if the nearest of several is taken."""
        concepts = labels["concept"]
        present = np.array([value is not None for value in values], bool)
        matched = np.where(present, 1, -100).astype(np.int64)
        out = list(values)
        words = [_words(value) for value in values] if self.nearest_of > 1 else []
        for i, (swapped, *which) in enumerate(draws.uniform(1 + self.nearest_of).tolist()):
            if not present[i] or swapped >= self.share:
                continue
            others = np.flatnonzero(present & (concepts != concepts[i]))
            if len(others):
                drawn = [int(others[int(draw * len(others))]) for draw in which]
                other = max(drawn, key=lambda j: _alike(words[i], words[j])) if words else drawn[0]
                out[i], matched[i] = values[other], 0
        labels["matched"] = np.minimum(matched, labels.get("matched", matched))  # a second view may swap another field
        return out


def _words(value: Any) -> frozenset[str]:
    """Of a str, or the first caption of a `Text`."""
    if value is None:
        return frozenset()
    text = value if isinstance(value, str) else next(iter(getattr(value, "captions", ())), None)
    if text is None:
        raise TypeError(f"nearest_of: expected texts, of which the most alike can be taken, got {type(value).__name__}")
    return frozenset(split_words(text))


def _alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))
