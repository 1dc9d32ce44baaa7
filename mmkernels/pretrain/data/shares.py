"""How much of an epoch comes from each part of a mixture, and which samples: functions of (seed, epoch) alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from mmkernels.pretrain.data.seeds import Stream, generator

__all__ = ["Shares", "check_weights"]


def check_weights(weights: Sequence[float]) -> None:
    """Raise ValueError for a weight that is not a positive number."""
    for weight in weights:
        number = isinstance(weight, Real) and not isinstance(weight, bool)
        if not (number and math.isfinite(weight) and weight > 0):
            raise ValueError(f"data_weights: expected positive numbers, got {' '.join(map(str, weights))}")


class Shares:
    """The order of a mixture's samples, which are numbered one part after the other.

    An epoch has as many samples as the mixture. A part is dealt pass after pass, each a fresh permutation of it. One
    with a larger share than its size is repeated within the epoch; one with a smaller share goes on in the next epoch
    where it stopped, so that all of it is seen. Over any number of epochs a part deals its share, to within a sample.
    The parts are spread evenly over an epoch, so each batch has about the same of them.

    Args:
        names: of the parts, for messages.
        sizes: samples of each part, at least one.
        weights: of each part, positive; they need not add up to 1. None: by size, so that an epoch is one pass of each.

    Raises:
        ValueError: a weight per part is missing, or is not positive, or gives a part less than a sample an epoch.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], weights: Sequence[float] | None = None) -> None:
        self.names, self.sizes, self.weights = tuple(names), tuple(map(int, sizes)), weights
        if weights is not None:
            if len(weights) != len(self.names):
                sets = ", ".join(self.names)
                raise ValueError(f"data_weights: expected one for each of {sets}, got {' '.join(map(str, weights))}")
            check_weights(weights)
        # As decimals: shares of 0.1 and 0.2 are a third and two thirds, which no float is.
        exact = [Fraction(str(weight)) for weight in (self.sizes if weights is None else weights)]
        self.of: tuple[Fraction, ...] = tuple(each / sum(exact) for each in exact)
        self._latest: dict[int, tuple[Any, Any]] = {}
        for name, share in zip(self.names, self.of, strict=True):
            if share * len(self) < 1:
                raise ValueError(
                    f"data_weights: expected at least one sample an epoch of each part, got {float(share):.2g} of "
                    f"{len(self)} samples for {name}"
                )

    def __len__(self) -> int:
        """Samples of an epoch."""
        return sum(self.sizes)

    def dealt(self, epochs: int) -> list[int]:
        """How many samples each part has dealt after some epochs: by largest remainder, so they add up."""
        exact = [share * len(self) * epochs for share in self.of]
        counts = [math.floor(each) for each in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: len(self) * epochs - sum(counts)]:
            counts[i] += 1
        return counts

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The samples of an epoch in order, int64 [n]; one may occur more than once."""
        return self.between(seed, self.dealt(epoch), self.dealt(epoch + 1), generator(seed, epoch, Stream.ORDER))

    def between(self, seed: int, first: Sequence[int], last: Sequence[int], spread: np.random.Generator) -> np.ndarray:
        """What the parts deal from their `first` sample up to their `last` one, spread evenly: int64 [n]."""
        places, samples = [], []
        for part, (begin, end) in enumerate(zip(first, last, strict=True)):
            samples.append(self._passes(seed, part, begin, end) + self._starts[part])
            places.append((np.arange(end - begin) + spread.random(end - begin)) / max(end - begin, 1))
        return np.concatenate(samples)[np.argsort(np.concatenate(places), kind="stable")]

    def _passes(self, seed: int, part: int, first: int, last: int) -> np.ndarray:
        """Samples `first` to `last` of the endless passes of a part, numbered within it."""
        size = self.sizes[part]
        each = [
            self._pass(seed, part, number)[max(first - number * size, 0) : last - number * size]
            for number in range(first // size, -(-last // size))
        ]
        return np.concatenate([*each, np.zeros(0, np.int64)])

    def _pass(self, seed: int, part: int, number: int) -> np.ndarray:
        """One pass; the last one of each part is remembered, which may be read bit by bit."""
        key = (seed, number)
        if self._latest.get(part, (None,))[0] != key:
            order = generator(seed, number, Stream.PASS, part).permutation(self.sizes[part])
            self._latest[part] = key, order
        return self._latest[part][1]

    @cached_property
    def _starts(self) -> list[int]:
        return np.concatenate([[0], np.cumsum(self.sizes)]).tolist()

    def fit(self, concepts: np.ndarray, batch: int) -> None:
        """Raise ValueError if a part cannot have its share of every batch, since each concept is there at most once.

        Args:
            concepts: int64 [n], of all samples.
            batch: samples of a batch, all of different concepts.
        """
        for name, share, (distinct, most) in zip(self.names, self.of, self._frequent(concepts), strict=True):
            if self.weights is not None and share * batch > distinct:
                raise ValueError(
                    f"data_weights: expected at most {100 * distinct / batch:.3g}% for {name}, with {distinct} "
                    f"concepts, each at most once in a batch of {batch}; got {100 * float(share):.3g}%"
                )
            if self.weights is not None and share * batch * most > 1:
                raise ValueError(
                    f"data_weights: expected at most {100 / (batch * most):.3g}% for {name}, since "
                    f"{100 * most:.3g}% of its samples have one concept, which a batch of {batch} has at most "
                    f"once; got {100 * float(share):.3g}%"
                )

    def most(self, concepts: np.ndarray, batch: float) -> list[float]:
        """The largest share of each part that a batch can have, see `fit`: at most 1."""
        return [min(1.0, distinct / batch, 1 / (batch * most)) for distinct, most in self._frequent(concepts)]

    def _frequent(self, concepts: np.ndarray) -> list[tuple[int, float]]:
        """Of each part: (how many concepts it has, the share of its samples that have the most frequent one)."""
        each = [
            np.unique(concepts[begin:end], return_counts=True)[1]
            for begin, end in zip(self._starts, self._starts[1:], strict=False)
        ]
        return [(len(counts), counts.max() / counts.sum()) for counts in each]

    def spread(self, most: int) -> np.ndarray:
        """At most about `most` different samples, evenly spaced in each part, each part by its share: int64."""
        found = []
        for start, size, share in zip(self._starts, self.sizes, self.of, strict=False):
            count = min(size, max(1, round(share * most)))
            found.append(start + np.linspace(0, size - 1, count).astype(np.int64))
        return np.concatenate(found)

    def described(self) -> list[str]:
        """What the order depends on, for a state."""
        return [f"{share} from {size}" for share, size in zip(self.of, self.sizes, strict=True)]
