"""A data set whose samples are computed from their numbers, not read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Source
from mmkernels.pretrain.data.tiles import load_tiles

SPLITS = ("train", "held_out", "combinations", "drawings")
MOST = 1 << 40  # samples of a split
_STRIDE = 4 * MOST  # numbers of a split: those from MOST on are for what a sample needs besides
END = len(SPLITS) * _STRIDE  # numbers from here on are for what those of the splits do not suffice for


class Computed(Mapping[str, Any]):
    """The values of a sample, each computed when it is read: a run pays for those that its recipe uses.

    Args:
        drawn: has an attribute for each field.
        fields: of the sample.
    """

    def __init__(self, drawn: object, fields: tuple[str, ...]) -> None:
        self._drawn, self._fields = drawn, fields

    def __getitem__(self, field: str) -> Any:
        if field not in self._fields:
            raise KeyError(field)
        return getattr(self._drawn, field)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)


class GeneratedSource(Source):
    """Samples that are functions of (seed, number), in splits with numbers of their own.

    Args:
        split: one of SPLITS.
        fields: of the samples, some of `known`.
        known: the fields that there are.
        size: number of samples.
        seed: 0 <= seed < 2**64.

    Attributes:
        first: the number of sample 0; that of sample i is `first + i`.
        numbers: int64 [size], the numbers of the samples.
        vendors: who may have drawn a sample, indices into `Tiles.vendors`: all but the held-out one, or it alone.
    """

    kind: str  # the first part of a sample's name

    def __init__(self, split: str, fields: Sequence[str], known: tuple[str, ...], size: int, seed: int) -> None:
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
        if isinstance(fields, str) or not fields or not set(fields) <= set(known):
            raise ValueError(f"fields: expected some of {known}, got {fields!r}")
        if not 1 <= size <= MOST:
            raise ValueError(f"size: expected 1 to 2**40 samples, got {size}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected 0 <= seed < 2**64, got {seed}")
        self.split, self.seed = split, seed
        self.fields = tuple(field for field in known if field in fields)
        self.first = SPLITS.index(split) * _STRIDE
        self.numbers = self.first + np.arange(size, dtype=np.int64)
        last = len(load_tiles().vendors) - 1
        self.vendors = range(last, last + 1) if split == "drawings" else range(last)
        self.broken = BrokenLog(size, 0.0)

    def number(self, index: int) -> int:
        """The number of the sample at `index`. Raises IndexError if there is none."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return self.first + index

    def name(self, index: int) -> str:
        return f"{self.kind}/{self.split}/{index}"
