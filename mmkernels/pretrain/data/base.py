"""What the loop needs of a data set: samples by index, concepts, and a strict account of what could not be read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mmkernels.pretrain.data.unicode import printable

log = logging.getLogger("mmkernels.pretrain.data")

_SHOWN = 10  # files of no use that a line of the log names


class Sample(NamedTuple):
    """One image with its text."""

    image: np.ndarray  # uint8 [R, R, 4]: RGBA, straight alpha; transparent where a picture is not square
    captions: tuple[str, ...]  # each describes the image; the first stands for it in evaluation
    keywords: tuple[str, ...]  # short tags that may be mixed into a training caption; often none
    concept: int  # samples with the same concept are positives of each other
    name: str  # where it came from, for logs


class BrokenImageError(Exception):
    """A sample that cannot be read; the message is the reason."""


class TooManyBrokenError(RuntimeError, ValueError):
    """More of the data set than allowed could not be read; the message lists every name."""


class BrokenLog:
    """Names, counts and limits what could not be read.

    Args:
        total: samples in the data set, and what else may be broken: rows of a table, whole shards.
        max_broken: share of `total` that may be broken before `TooManyBrokenError` stops the run.

    Attributes:
        reasons: why a sample could not be read, by its name, in the order met.
        left_out: what else was not read, by its name, and why: files that belong to no sample, shards that are cut.
            Not held against `max_broken`.
    """

    def __init__(self, total: int, max_broken: float) -> None:
        if not 0.0 <= max_broken <= 1.0:
            raise ValueError(f"max_broken: expected a share between 0 and 1, got {max_broken}")
        self.total, self.max_broken = total, max_broken
        self.reasons: dict[str, str] = {}
        self.left_out: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        self.reasons[name] = reason
        counted = f"{len(self)} of {self.total} samples"
        log.warning("skipped %s: %s (%s skipped so far)", printable(name), printable(reason), counted)
        if len(self) > self.max_broken * self.total:
            share = f"more than max_broken={self.max_broken}"
            raise TooManyBrokenError(f"{counted} could not be read, {share}{self.listing(self.reasons)}")

    @staticmethod
    def listing(reasons: Mapping[str, str]) -> str:
        """Every name with its reason, a line each, to stand after a sentence."""
        lines = (f"\n  {printable(name)}: {printable(reason)}" for name, reason in reasons.items())
        return ":" + "".join(lines) if reasons else ""

    def cut(self, name: str, what: str) -> None:
        """Says that a file is read in part."""
        self.left_out[name] = what
        log.warning("%s %s", printable(name), printable(what))

    def leave_out(self, where: str, files: Mapping[str, str]) -> None:
        """Names and counts files of no use, all those of one shard in one line."""
        self.left_out.update(files)
        shown = [f"{printable(name)} ({printable(reason)})" for name, reason in list(files.items())[:_SHOWN]]
        more = [f"and {len(files) - _SHOWN} more"] if len(files) > _SHOWN else []
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        log.warning("left out %s of %s: %s", count, printable(where), ", ".join(shown + more))


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
    """A data set whose images are decoded on first use and then kept, as long as they fit in `cache_bytes`.

    Args:
        names: of the samples.
        captions: of each sample, at least one.
        faults: why a sample cannot be read, by its index, where that is known without decoding. They are counted at
            once, so that a run that never draws them names them too.
        broken: the account, with what is known to be lost besides.
        resolution, cache_bytes: as in the data sets.
    """

    def __init__(
        self,
        names: Sequence[str],
        captions: Sequence[tuple[str, ...]],
        *,
        faults: Mapping[int, str],
        broken: BrokenLog,
        resolution: int,
        cache_bytes: int,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: expected at least 1 pixel, got {resolution}")
        self.resolution, self.broken = resolution, broken
        self.concepts = concepts_of(captions)
        self._names, self.captions, self._faults = names, captions, faults
        self._cache: dict[int, np.ndarray] = {}
        self._cache_items = cache_bytes // (4 * resolution * resolution)
        for index, reason in faults.items():
            broken.add(names[index], reason)

    @abstractmethod
    def _decode(self, index: int) -> np.ndarray:
        """The image at `index`, uint8 [R, R, 4]. Raises `BrokenImageError`."""

    def __getitem__(self, index: int) -> Sample:
        if index in self._faults:
            raise BrokenImageError(self._faults[index])
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
