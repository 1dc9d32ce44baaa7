"""Hashes as draws, for data that are computed: each is a function of (seed, purpose, number), in any order.

`seeds.generator` serves a batch. This serves single samples, whose few draws cost less than setting that up, and the
draws of many samples at once.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np

_BLOCK = 64  # draws computed at a time
_STEP = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """Independent uses of the same (seed, number)."""

    CONCEPTS = 0
    LAYOUT = 1
    LOOK = 2
    QUESTION = 3
    PAIR = 4
    DOCUMENT = 5
    MOTION = 6
    MOTION_LOOK = 7
    MOTION_QUESTION = 8


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64 in which every bit matters."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, purpose: Purpose, numbers: np.ndarray, first: int, count: int) -> np.ndarray:
    """Draws `first` to `first + count` of each number: float64 [n, count], uniform in [0, 1).

    Args:
        seed: 0 <= seed < 2**64.
        purpose: what for.
        numbers: int64 or uint64 [n].
    """
    key = _mixed(_mixed(np.array([seed], np.uint64)) + np.uint64(purpose + 1))
    keys = _mixed(numbers.astype(np.uint64) * _STEP + key)  # arrays wrap around silently; NumPy's scalars would warn
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _STEP
    bits = _mixed(keys[:, None] + counters) >> np.uint64(11)
    return bits * 2.0**-53


class Draws:
    """The endless draws of one (seed, purpose, number), one after the other, from `first` on."""

    def __init__(self, seed: int, purpose: Purpose, number: int, first: int = 0) -> None:
        self._seed, self._purpose, self._number = seed, purpose, np.array([number], np.uint64)
        self._next, self._block = first, iter(list[float]())

    def share(self) -> float:
        """A number in [0, 1)."""
        share = next(self._block, None)
        if share is None:
            self._block = iter(uniform(self._seed, self._purpose, self._number, self._next, _BLOCK)[0].tolist())
            self._next += _BLOCK
            share = next(self._block)
        return share

    def below(self, end: int) -> int:
        """An integer in [0, end)."""
        return int(self.share() * end)

    def between(self, first: int, last: int) -> int:
        """An integer in [first, last]."""
        return first + self.below(last - first + 1)

    def shuffled(self, count: int) -> list[int]:
        """A permutation of range(count)."""
        items = list(range(count))
        for i in range(count - 1, 0, -1):
            j = self.below(i + 1)
            items[i], items[j] = items[j], items[i]
        return items


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the hash of a name falls into the first `fraction` of the range; no seed changes that."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") < fraction * 2**64
