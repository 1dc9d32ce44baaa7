"""What a data set is: samples by index, with a value for each field; concepts; a record of what could not be read."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from mmkernels.pretrain.data.shares import Shares
from mmkernels.pretrain.data.unicode import printable

log = logging.getLogger("mmkernels.pretrain.data")

_SHOWN = 10  # unused files that a log line names
_LISTED = 20  # broken samples that an error names


@dataclass(frozen=True)
class Sample:
    """One sample: a value for each of its fields; a field that it lacks is absent.

    | field | value |
    |---|---|
    | image | uint8 [H, W, 4] RGBA, straight alpha; or uint8 [H, W, 3] RGB |
    | text, question, and any further text | `Text`, or a str |
    | audio | float32 [frames, mels], log-mel |
    | video | uint8 [frames, H, W, 3] |
    | regions | `Regions` |
    | document | `Document` |
    | answer, tag, action, relation and other labels | int, an index into the data set's `classes[field]` |
    | vector | float32 [n] |
    """

    values: Mapping[str, Any]
    concept: int  # samples with the same concept are positives of each other
    name: str  # its source, for logs

    @classmethod
    def of_pair(
        cls,
        image: np.ndarray,
        captions: tuple[str, ...],
        keywords: tuple[str, ...],
        concept: int,
        name: str,
        **labels: int,
    ) -> Sample:
        """An image with its text, and labels."""
        return cls({"image": image, "text": Text(captions, keywords), **labels}, concept, name)

    @property
    def image(self) -> np.ndarray:
        image: np.ndarray = self.values["image"]
        return image

    @property
    def captions(self) -> tuple[str, ...]:
        captions: tuple[str, ...] = self.values["text"].captions
        return captions


class Text(NamedTuple):
    """Texts that say the same, and tags."""

    captions: tuple[str, ...]  # at least one; evaluation uses the first
    keywords: tuple[str, ...] = ()  # short tags that may be mixed into a training caption; often none


class Regions(NamedTuple):
    """The objects of an image, in reading order."""

    boxes: np.ndarray  # float32 [n, 4]: left, top, right, bottom as fractions of the image
    crops: np.ndarray  # uint8 [n, c, c, 3] RGB, resized
    tags: np.ndarray  # int64 [n], indices into the data set's classes["tag"]


class Document(NamedTuple):
    """Images and texts in reading order."""

    parts: tuple[str | np.ndarray, ...]  # texts, and images uint8 [H, W, 3] or [H, W, 4]


class BrokenImageError(Exception):
    """A sample that cannot be read; the message is the reason."""


class TooManyBrokenError(RuntimeError, ValueError):
    """More samples than allowed could not be read; the message lists every name."""


class BrokenLog:
    """Record and limit what could not be read.

    Args:
        total: samples in the data set, plus table rows and whole shards that are broken.
        max_broken: fraction of `total` that may be broken before `TooManyBrokenError` stops the run.

    Attributes:
        reasons: why each sample could not be read, by name, in the order found.
        left_out: why other things were not read, by name: files that belong to no sample, truncated shards, what was
            excused. These do not count towards `max_broken`.
    """

    def __init__(self, total: int, max_broken: float) -> None:
        if not 0.0 <= max_broken <= 1.0:
            raise ValueError(f"max_broken: expected a share between 0 and 1, got {max_broken}")
        self.total, self.max_broken = total, max_broken
        self.reasons: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._excused: set[str] = set()

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, name: str, reason: str) -> None:
        if name in self.reasons:
            return
        if name in self._excused:
            self.left_out[name] = reason
            return
        self.reasons[name] = reason
        counted = f"{len(self)} of {self.total} samples"
        log.warning("skipped %s: %s (%s skipped so far)", printable(name), printable(reason), counted)
        self.limit(self.max_broken)

    def limit(self, max_broken: float) -> None:
        """Set the limit. Raise TooManyBrokenError if it is exceeded already."""
        self.max_broken = max_broken
        if len(self) > max_broken * self.total:
            counted = f"{len(self)} of {self.total} samples"
            share = f"more than max_broken={max_broken}"
            raise TooManyBrokenError(f"{counted} could not be read, {share}{self.listing(self.reasons)}")

    def excuse(self, names: Iterable[str]) -> None:
        """Do not count these towards the limit, whether they have been found or will be: they are known."""
        self._excused.update(names)
        for name in self._excused & self.reasons.keys():
            self.left_out[name] = self.reasons.pop(name)

    @staticmethod
    def listing(reasons: Mapping[str, str]) -> str:
        """Names with their reasons, one per line, to append to a sentence."""
        lines = [f"\n  {printable(name)}: {printable(reason)}" for name, reason in islice(reasons.items(), _LISTED)]
        more = f"\n  and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
        return ":" + "".join(lines) + more if reasons else ""

    def cut(self, name: str, what: str) -> None:
        """Record that a file was read only in part."""
        self.left_out[name] = what
        log.warning("%s %s", printable(name), printable(what))

    def leave_out(self, where: str, files: Mapping[str, str]) -> None:
        """Record unused files of a shard, and log them in one line."""
        self.left_out.update(files)
        shown = [f"{printable(name)} ({printable(reason)})" for name, reason in list(files.items())[:_SHOWN]]
        more = [f"and {len(files) - _SHOWN} more"] if len(files) > _SHOWN else []
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        log.warning("left out %s of %s: %s", count, printable(where), ", ".join(shown + more))


class Source(ABC):
    """A map-style data set of `Sample`s.

    Attributes:
        fields: of its samples; a sample may lack some.
        classes: the names of the classes of each field that is a label.
        concepts: int64 [n], the concept of each sample, known without decoding.
        broken: the record of what could not be read.
        shares: of a mixture: how much of an epoch comes from each of its parts.
    """

    fields: tuple[str, ...]
    classes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    concepts: np.ndarray
    broken: BrokenLog
    shares: Shares | None = None

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """The sample at `index`. Raises `BrokenImageError` if it cannot be read."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The source of sample `index`, known without decoding."""

    def __len__(self) -> int:
        return len(self.concepts)

    def read(self, indices: Iterable[int]) -> list[Sample]:
        """The samples at `indices`, in order, without the broken ones, which are recorded.

        What is skipped depends on the files alone, not on earlier reads, so a resumed run sees the same batches. Raises
        `TooManyBrokenError` beyond the allowed share.
        """
        found = self.read_some(indices)
        for name, reason in found.broken.items():
            self.broken.add(name, reason)
        return found.samples

    def read_some(self, indices: Iterable[int]) -> Read:
        """As `read`, but broken samples are returned, not recorded: for worker processes."""
        samples, items, broken = [], [], {}
        for index in map(int, indices):
            try:
                samples.append(self[index])
                items.append(index)
            except BrokenImageError as error:
                broken[self.logged_as(index)] = str(error)
        return Read(samples, items, broken)

    def peek(self, index: int) -> Mapping[str, Any]:
        """The values of a sample that are known without decoding; `...` stands for others. For lengths and texts."""
        return self[index].values

    def logged_as(self, index: int) -> str:
        """What `broken` calls sample `index`."""
        return self.name(index)

    def image_file(self, index: int) -> str | None:
        """The file of a sample's image, as its table names it; None if there is none or it has no name."""
        return None

    def contents(self, index: int) -> Mapping[str, str]:
        """A hash of each field of a sample that may change while its name does not, known without decoding; empty for a
        field that the sample lacks. The same whichever other fields are read. What comes along has none: names tell it.
        """
        return {}

    def stored_size(self, index: int) -> tuple[int, int] | None:
        """(width, height) in pixels of a sample's image as it is stored, which may be larger than the decoded one; None
        without an image. Raises `BrokenImageError` if it cannot be read.
        """
        image = self[index].values.get("image")
        return None if image is None else (image.shape[1], image.shape[0])

    def only(self, indices: np.ndarray) -> Source:
        """Some of the samples, int64 [n] ascending."""
        return Subset(self, indices)


class Read(NamedTuple):
    """Samples, their numbers, and why others could not be read, by name."""

    samples: list[Sample]
    items: list[int]
    broken: dict[str, str]


class Data(NamedTuple):
    """Training data and held-out sets of a run."""

    train: Source
    held_out: dict[str, Source]  # by split


class Subset(Source):
    """A view of some samples of a data set; the whole records the broken ones."""

    def __init__(self, whole: Source, indices: np.ndarray) -> None:
        self.whole, self.indices = whole, np.asarray(indices, np.int64)
        self.fields, self.classes = whole.fields, whole.classes
        self.concepts, self.broken = whole.concepts[self.indices], whole.broken

    def __getitem__(self, index: int) -> Sample:
        return self.whole[int(self.indices[index])]

    def name(self, index: int) -> str:
        return self.whole.name(int(self.indices[index]))

    def peek(self, index: int) -> Mapping[str, Any]:
        return self.whole.peek(int(self.indices[index]))

    def logged_as(self, index: int) -> str:
        return self.whole.logged_as(int(self.indices[index]))

    def image_file(self, index: int) -> str | None:
        return self.whole.image_file(int(self.indices[index]))

    def contents(self, index: int) -> Mapping[str, str]:
        return self.whole.contents(int(self.indices[index]))

    def stored_size(self, index: int) -> tuple[int, int] | None:
        return self.whole.stored_size(int(self.indices[index]))
