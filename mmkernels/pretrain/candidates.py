"""The values of a batch that a view may give to another sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["SWAPPED_BY", "Candidates"]

SWAPPED_BY = "swapped by"
"""Label that only views see, int64 [S]: what stands for the view that has swapped a sample's value; 0: none has."""


class Candidates(NamedTuple):
    """B samples, of which any rank may have any."""

    concepts: np.ndarray  # int64 [B]
    value: Callable[[int], Any]  # of a sample, by its place: its own; None if it has none, or cannot be read
