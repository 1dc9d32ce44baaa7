"""Counter-based randomness: every draw is a function of (seed, purpose, step or number), so that workers, ranks and
resumed runs agree without talking.

| | for | keyed by |
|---|---|---|
| `generator` | a whole step or epoch | seed, step, `Stream` |
| `Draws` | the samples of a batch | seed, step, a purpose's name, their numbers |
| `SampleDraws`, `uniform` | data that are computed: one sample, many at once | seed, `Purpose`, number |

The latter two are hashes: a few draws of a sample cost less than to set up a generator for it.
"""

from __future__ import annotations

import hashlib
import zlib
from enum import IntEnum

import numpy as np

__all__ = ["Draws", "Purpose", "SampleDraws", "Stream", "generator", "is_held_out", "uniform"]


class Stream(IntEnum):
    """Independent uses of the same (seed, step)."""

    ORDER = 0
    OBJECTIVE = 1
    PASS = 2
    ENCODERS = 3


def generator(seed: int, step: int, stream: Stream, part: int = 0) -> np.random.Generator:
    """A Philox generator keyed by (seed, step), in its own block of counters per stream, and per part of it."""
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}: expected 0 <= {name} < 2**64, got {value}")
    key = np.array([seed, step], np.uint64)
    counter = np.array([0, 0, part, int(stream)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


class Draws:
    """Random numbers for the B samples of a batch; a sample's do not depend on the others in its batch.

    Args:
        seed, step: of the run.
        purpose: a name; another purpose gets independent numbers.
        samples: [B] the numbers of the samples in the data set.
    """

    def __init__(self, seed: int, step: int, purpose: str, samples: np.ndarray) -> None:
        self.seed, self.step, self.purpose = seed, step, purpose
        self.samples = np.asarray(samples, np.uint64)
        key = _mixed(np.array([seed], np.uint64) ^ _mixed(np.array([step], np.uint64) + _GOLDEN))
        key = _mixed(key + np.array([zlib.crc32(purpose.encode())], np.uint64) * _GOLDEN)
        self._keys = _mixed(self.samples * _GOLDEN + key)  # [B]

    def __len__(self) -> int:
        return len(self.samples)

    def uniform(self, n: int) -> np.ndarray:
        """float64 [B, n] in [0, 1)."""
        return _shares(self._keys, 0, n)

    def generator(self, i: int) -> np.random.Generator:
        """A generator for sample i of the batch, for draws whose number depends on the sample."""
        return np.random.Generator(np.random.Philox(key=int(self._keys[i])))


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


def uniform(seed: int, purpose: Purpose, numbers: np.ndarray, first: int, count: int) -> np.ndarray:
    """Draws `first` to `first + count` of each number: float64 [n, count], uniform in [0, 1).

    Args:
        seed: 0 <= seed < 2**64.
        purpose: what for.
        numbers: int64 or uint64 [n].
    """
    key = _mixed(_mixed(np.array([seed], np.uint64)) + np.uint64(purpose + 1))
    return _shares(_mixed(numbers.astype(np.uint64) * _GOLDEN + key), first, count)


class SampleDraws:
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
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


_BLOCK = 64  # draws computed at a time
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014), a bijection of uint64 in which every bit matters.

    Arrays wrap around silently; NumPy's scalars would warn.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _shares(keys: np.ndarray, first: int, count: int) -> np.ndarray:
    """Draws `first` to `first + count` of each key: float64 [n, count] in [0, 1)."""
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
    bits: np.ndarray = _mixed(keys[:, None] + counters) >> np.uint64(11)
    return bits * 2.0**-53
