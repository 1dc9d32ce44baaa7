"""The values of a batch that a view may give to another sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Candidates"]


class Candidates(NamedTuple):
    """B samples, of which any rank may have any."""

    concepts: np.ndarray  # int64 [B]
    present: np.ndarray  # bool [B]: has a value
    value: Callable[[int], Any]  # of a sample, by its place; None if it cannot be read
