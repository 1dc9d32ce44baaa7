"""Counter-based randomness: every draw is a function of (seed, purpose, step, sample), so that workers, ranks and
resumed runs agree without talking."""

from __future__ import annotations

import zlib
from enum import IntEnum

import numpy as np

__all__ = ["Draws", "Stream", "generator"]


class Stream(IntEnum):
    """Independent uses of the same (seed, step)."""

    ORDER = 0
    OBJECTIVE = 1
    PASS = 2


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
        with np.errstate(over="ignore"):
            key = _mixed(np.array([seed], np.uint64) ^ _mixed(np.array([step], np.uint64) + _GOLDEN))
            key = _mixed(key + np.uint64(zlib.crc32(purpose.encode())) * _GOLDEN)
            self._keys = _mixed(self.samples * _GOLDEN + key)  # [B]

    def __len__(self) -> int:
        return len(self.samples)

    def uniform(self, n: int) -> np.ndarray:
        """float64 [B, n] in [0, 1)."""
        with np.errstate(over="ignore"):
            counters = self._keys[:, None] + _GOLDEN * np.arange(1, n + 1, dtype=np.uint64)
        return (_mixed(counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def generator(self, i: int) -> np.random.Generator:
        """A generator for sample i of the batch, for draws whose number depends on the sample."""
        return np.random.Generator(np.random.Philox(key=int(self._keys[i])))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: uint64 to well-mixed uint64."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
