"""Groups that are dealt anew, as if they made no difference, to samples that are not independent of each other."""

from __future__ import annotations

import numpy as np

__all__ = ["Shuffled"]


class Shuffled:
    """Deals the groups of n values to them anew. What is independent is the cluster, so that clusters are dealt whole:

    - Those of one group go, in random order, to one group after the other until it is as large as it was, up to a
      cluster. The number of values in a group counts, not that of clusters, since it is what its mean is over.
    - Those of several groups exchange how they are divided among groups, and each is then divided at random, item by
      item. If all are divided alike, that is a shuffle within clusters; if nearly all of each is in one group, it is
      nearly one of whole clusters.

    Args:
        groups: int64 [n], from 0.
        items: int64 [n]: values of one item of a cluster stay in the same group.
        clusters: int64 [n].
        seed: of the draws.
    """

    def __init__(self, groups: np.ndarray, items: np.ndarray, clusters: np.ndarray, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        pairs, firsts, owners = np.unique(
            np.stack([clusters, items], 1), axis=0, return_index=True, return_inverse=True
        )
        self._owners = owners.reshape(-1)  # [n]: the item of each value; items are sorted by their clusters
        _, starts, places = np.unique(pairs[:, 0], return_index=True, return_inverse=True)
        self._starts, self._places = starts, places.reshape(-1)  # the first item of each cluster; each item's cluster
        self._groups = groups[firsts]  # of each item
        self._counts = np.diff(starts, append=len(pairs))  # items of each cluster
        self._sizes = np.bincount(self._places, np.bincount(self._owners, minlength=len(pairs)))  # values of it
        low, high = (of.reduceat(self._groups, starts) for of in (np.minimum, np.maximum))
        self._whole, self._divided = np.flatnonzero(low == high), np.flatnonzero(low != high)
        self._ends = np.cumsum(np.bincount(low[self._whole], self._sizes[self._whole], minlength=int(groups.max()) + 1))
        self._sorted = self._groups[np.lexsort((self._groups, self._places))]  # by cluster, then by group

    def __call__(self) -> np.ndarray:
        """int64 [n]: the group of each value."""
        of_cluster = np.zeros(len(self._starts), np.int64)
        order = self._random.permutation(self._whole)
        sizes = self._sizes[order]
        of_cluster[order] = np.searchsorted(self._ends, np.cumsum(sizes) - sizes / 2, side="right")
        found = of_cluster[self._places]
        if len(self._divided):
            self._divide(found)
        return found[self._owners]

    def _divide(self, found: np.ndarray) -> None:
        """Into int64 [items], those of the clusters that are divided."""
        source, shift = np.arange(len(self._starts)), self._random.random(len(self._starts))
        source[self._divided] = self._random.permutation(self._divided)  # whose division each cluster gets
        order = np.lexsort((self._random.random(len(found)), self._places))  # items of a cluster in random order
        place = np.arange(len(found)) - self._starts[self._places]
        given = source[self._places]
        taken = (place + shift[self._places]) * self._counts[given] / self._counts[self._places]  # evenly spaced
        taken = np.minimum(taken.astype(np.int64), self._counts[given] - 1)
        dealt = self._sorted[self._starts[given] + taken]
        mixed = np.isin(self._places, self._divided)
        found[order[mixed]] = dealt[mixed]
