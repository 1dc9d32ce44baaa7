"""What the loop needs of a data set: samples by index, concepts, and a strict account of what could not be read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

log = logging.getLogger("mmkernels.pretrain.data")


class Sample(NamedTuple):
    """One image with its text."""

    image: np.ndarray  # uint8 [R, R, 4]: RGBA, straight alpha; transparent where a picture is not square
    captions: tuple[str, ...]  # each describes the image; the first stands for it in evaluation
    keywords: tuple[str, ...]  # short tags that may be mixed into a training caption; often none
    concept: int  # samples with the same concept are positives of each other
    name: str  # where it came from, for logs


class BrokenImageError(Exception):
    """A sample that cannot be read; the message is the reason."""


class TooManyBrokenError(RuntimeError):
    """More of the data set than allowed could not be read; the message lists every name."""


class BrokenLog:
    """Names, counts and limits the samples that could not be read.

    Args:
        total: samples in the data set.
        max_broken: share of `total` that may be broken before `TooManyBrokenError` stops the run.
    """

    def __init__(self, total: int, max_broken: float) -> None:
        if not 0.0 <= max_broken <= 1.0:
            raise ValueError(f"max_broken: expected a share between 0 and 1, got {max_broken}")
        self.total, self.max_broken = total, max_broken
        self.reasons: dict[str, str] = {}  # by name, in the order met

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        log.warning("skipped %s: %s (%d of %d samples skipped so far)", name, reason, len(self), self.total)
        if len(self) > self.max_broken * self.total:
            listing = "".join(f"\n  {n}: {r}" for n, r in self.reasons.items())
            share = f"more than max_broken={self.max_broken}"
            raise TooManyBrokenError(f"{len(self)} of {self.total} samples could not be read, {share}:{listing}")


class ImageTextDataset(ABC):
    """A map-style data set of `Sample`s.

    Attributes:
        concepts: int64 [n], the concept of each sample, known without decoding.
        resolution: side in pixels of every image.
        broken: the account of what could not be read.
    """

    concepts: np.ndarray
    resolution: int
    broken: BrokenLog

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Raises `BrokenImageError` if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Where sample `index` comes from, known without decoding."""

    def __len__(self) -> int:
        return len(self.concepts)

    def read(self, indices: Iterable[int]) -> list[Sample]:
        """The samples at `indices`, in order, less the broken ones, which are counted and named.

        What is skipped depends on the files alone and never on what was read before, so a resumed run sees the
        same batches. Raises `TooManyBrokenError` beyond the allowed share.
        """
        samples = []
        for index in indices:
            try:
                samples.append(self[int(index)])
            except BrokenImageError as error:
                self.broken.add(self.name(int(index)), str(error))
        return samples


class Subset(ImageTextDataset):
    """A view of some samples of a data set; broken ones are accounted for by the whole."""

    def __init__(self, whole: ImageTextDataset, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, np.asarray(indices, np.int64)
        self.concepts = whole.concepts[self.indices]
        self.resolution, self.broken = whole.resolution, whole.broken

    def __getitem__(self, index: int) -> Sample:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))


class DecodedDataset(ImageTextDataset):
    """A data set whose images are decoded on first use and then kept, as long as they fit in `cache_bytes`."""

    def __init__(
        self,
        names: Sequence[str],
        captions: Sequence[tuple[str, ...]],
        *,
        resolution: int,
        max_broken: float,
        cache_bytes: int,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: expected at least 1 pixel, got {resolution}")
        self.resolution = resolution
        self.broken = BrokenLog(len(names), max_broken)
        self.concepts = concepts_of(captions)
        self._names, self.captions = names, captions
        self._cache: dict[int, np.ndarray] = {}
        self._cache_items = cache_bytes // (4 * resolution * resolution)

    @abstractmethod
    def _decode(self, index: int) -> np.ndarray:
        """The image at `index`, uint8 [R, R, 4]. Raises `BrokenImageError`."""

    def __getitem__(self, index: int) -> Sample:
        image = self._cache.get(index)
        if image is None:
            image = self._decode(index)
            if len(self._cache) < self._cache_items:
                self._cache[index] = image
        return Sample(image, self.captions[index], (), int(self.concepts[index]), self._names[index])

    def name(self, index: int) -> str:
        return self._names[index]


def caption_key(captions: Sequence[str]) -> str:
    """What makes two samples the same concept: their first caption, but for case and spacing."""
    return " ".join(captions[0].casefold().split()) if captions else ""


def concepts_of(captions: Sequence[tuple[str, ...]]) -> np.ndarray:
    """Concept ids int64 [n]: samples with the same first caption share one."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(caption_key(c), len(ids)) for c in captions], np.int64)
