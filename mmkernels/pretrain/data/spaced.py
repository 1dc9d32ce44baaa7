"""Some of many, evenly spaced: always the same ones."""

from __future__ import annotations

import numpy as np

__all__ = ["spaced"]


def spaced(n: int, most: int | None) -> np.ndarray:
    """int64 [min(n, most)]: numbers below n, in order, the first and the last among them; all of them for None."""
    return np.arange(n) if most is None or n <= most else np.linspace(0, n - 1, most).astype(np.int64)
