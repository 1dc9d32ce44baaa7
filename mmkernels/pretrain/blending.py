"""Weights and shares as they were given, changed by measured factors, within bounds. No torch.

Nothing but exact sums and + - * / is used, so that all processors come to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

__all__ = ["blended", "capped"]


def blended(weights: Mapping[str, float], factors: Mapping[str, float], floor: float) -> dict[str, float]:
    """Weights with measured factors; their sum stays.

    weight * ((1 - floor) * factor / mean factor + floor), the mean weighted by the weights. Those without a factor stay
    as they are.

    Args:
        weights: the recipe's; above 0.
        factors: at least 0, of those that were measured, not all of them 0.
        floor: share that stays the recipe's.
    """
    known = [name for name in weights if name in factors]
    if not known:
        return dict(weights)
    mean = math.fsum(weights[name] * factors[name] for name in known) / math.fsum(weights[name] for name in known)
    return {
        name: weight * ((1 - floor) * factors[name] / mean + floor) if name in factors else weight
        for name, weight in weights.items()
    }


def capped(shares: Sequence[float], most: Sequence[float]) -> list[float]:
    """Shares that add up to 1, none of them above its bound: what is above it goes to the others, in proportion.

    Args:
        shares: positive; they need not add up to 1.
        most: of each; if these are together less than 1, shares are in proportion to them.
    """
    if (total := math.fsum(most)) < 1:
        return [bound / total for bound in most]
    found, full = [share / math.fsum(shares) for share in shares], set[int]()
    while over := {i for i, (share, bound) in enumerate(zip(found, most, strict=True)) if share > bound} - full:
        full |= over
        rest = [i for i in range(len(found)) if i not in full]
        left, of_rest = 1 - math.fsum(most[i] for i in full), math.fsum(found[i] for i in rest)
        found = [most[i] if i in full else found[i] * left / of_rest for i in range(len(found))]
    return found
