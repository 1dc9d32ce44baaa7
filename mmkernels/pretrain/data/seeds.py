"""Counter-based randomness: every draw is a function of (seed, step, stream), so a resumed run needs no saved state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """Independent uses of the same (seed, step)."""

    ORDER = 0
    AUGMENT = 1
    CAPTION = 2


def generator(seed: int, step: int, stream: Stream) -> np.random.Generator:
    """A Philox generator keyed by (seed, step), in its own block of counters per stream."""
    for name, value in (("seed", seed), ("step", step)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name}: expected 0 <= {name} < 2**64, got {value}")
    key = np.array([seed, step], np.uint64)
    counter = np.array([0, 0, 0, int(stream)], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
