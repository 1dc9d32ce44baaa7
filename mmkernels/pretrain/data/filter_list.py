"""Filter lists: training samples to leave out, as JSON lines that `mmkernels data-report --drop` writes.

    {"filter": 1, "data": "folder:photos", "fields": ["image", "text"], "samples": 900, "names": "5d0c...", ...}
    {"split": "train", "index": 17, "name": "17.jpg", "reasons": ["duplicates"], "why": "as 3.jpg", "contents": {...}}
    {"split": "train", "index": null, "name": "captions.jsonl: line 9", "reasons": ["empty"], "why": "caption: ..."}

A list belongs to one data set, read in one way: its head has a hash of the names of all training samples, and each
entry one of each field of its sample (`Source.contents`), as another set may have the same names, and the same set
other samples by now. Entries without an index are rows that are no sample; they and the entries of held-out sets are
unreadable, and a list only excuses them: they no longer count as broken. No held-out sample is ever left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import Data, Source
from mmkernels.pretrain.data.unicode import printable

__all__ = ["TRAIN", "Dropped", "FilterList", "names_digest"]

log = logging.getLogger("mmkernels.pretrain.data")

TRAIN = "train"  # what lists call the training set
_VERSION = 1


@dataclass(frozen=True)
class Dropped:
    """One entry."""

    split: str
    index: int | None  # in the split; None for a row that is no sample
    name: str
    reasons: tuple[str, ...]
    why: str = ""
    contents: Mapping[str, str] = field(default_factory=dict)  # when the list was written; empty if it was not said


@dataclass(frozen=True)
class FilterList:
    """The samples to leave out of a data set.

    Args:
        about: the data set: "data", "fields", "eval_fraction", "samples" and "names", the hash of the training names.
        dropped: the entries.
    """

    about: Mapping[str, Any]
    dropped: tuple[Dropped, ...]

    def text(self) -> str:
        """As a file."""
        lines = [{"filter": _VERSION, **self.about}, *map(asdict, self.dropped)]
        return "".join(json.dumps(line) + "\n" for line in lines)

    @classmethod
    def read(cls, path: Path) -> FilterList:
        """From a file that `text` was written to. Raise ValueError if it is none."""
        expected = "filter: expected a list that mmkernels data-report --drop wrote"
        try:
            head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            if head.pop("filter") != _VERSION or not {"data", "samples", "names"} <= head.keys():
                raise ValueError("another kind of file, or of another version")
            entries = tuple(map(_entry, lines))
        except FileNotFoundError as error:
            raise ValueError(f"{expected}, got {path}, which does not exist") from error
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"{expected}, got {path} ({type(error).__name__}: {error})") from error
        return cls(head, entries)

    def apply(self, data: Data) -> Data:
        """The data without the samples that the list drops; what it excuses no longer counts as broken.

        Raises:
            ValueError: the list belongs to other data, names samples that are not there or have changed, or drops all.
        """
        train, listed = data.train, self
        if (len(train), names_digest(train)) != (self.about["samples"], self.about["names"]):
            listed = self._by_row(train)
        ours = [entry for entry in listed.dropped if entry.split == TRAIN]
        sources = {TRAIN: train, **data.held_out}
        for entry in listed.dropped:
            if entry.split in sources and (entry.split != TRAIN or entry.index is None):
                sources[entry.split].broken.excuse([entry.name])
        indices = np.unique(np.array([entry.index for entry in ours if entry.index is not None], np.int64))
        for entry in (entry for entry in ours if entry.index is not None):
            if not (0 <= int(entry.index or 0) < len(train) and train.logged_as(int(entry.index or 0)) == entry.name):
                raise ValueError(
                    f"filter: expected names of training samples, got sample {entry.index}, {printable(entry.name)!r}, "
                    "which is not there"
                )
        _expect_unchanged([entry for entry in ours if entry.index is not None], train)
        train.broken.excuse(train.logged_as(int(index)) for index in indices)
        if len(indices) == len(train):
            raise ValueError(f"filter: expected samples left to train on, got a list of all {len(train):,}")
        listed._tell(len(train), len(indices))
        return Data(train.only(np.setdiff1d(np.arange(len(train)), indices)), data.held_out)

    def _by_row(self, train: Source) -> FilterList:
        """A list of images with their captions, for a table read row by row: every row of a listed image is meant.

        Raises:
            ValueError: it is of other data.
        """
        rows: dict[str, list[int]] = {}
        for row in range(len(train)):
            if (file := train.image_file(row)) is not None:
                rows.setdefault(file, []).append(row)
        images = list(rows)
        if (len(images), _digest(images)) != (self.about["samples"], self.about["names"]):
            raise ValueError(
                f"filter: expected a list of these {len(train):,} training samples, got one of {self._described()}. "
                "Write a list with mmkernels data-report, for the same --recipe, --labels, --eval-fraction and "
                "--held-out-by; or read all of them, with --filter None"
            )
        meant = []
        for entry in self.dropped:
            if entry.split != TRAIN or entry.index is None:
                meant.append(entry)
            elif 0 <= entry.index < len(images) and images[entry.index] == entry.name:
                image = {name: held for name, held in entry.contents.items() if name == "image"}  # a row has few texts
                meant += [replace(entry, index=i, name=train.logged_as(i), contents=image) for i in rows[entry.name]]
            else:
                raise ValueError(
                    f"filter: expected names of training images, got image {entry.index}, {printable(entry.name)!r}, "
                    "which is not there"
                )
        return FilterList(self.about, tuple(meant))

    def _described(self) -> str:
        fields = ", ".join(self.about.get("fields", ()))
        by = ", ".join(self.about.get("held_out_by", ()))
        held_out = f"{self.about.get('eval_fraction')}" + (f" by {by}" if by else "")
        way = f" (fields {fields}; eval_fraction {held_out})" if fields else ""
        return f"{self.about['samples']:,} of {printable(str(self.about['data']))}{way}"

    def _tell(self, samples: int, left_out: int) -> None:
        reasons = Counter(r for e in self.dropped if e.split == TRAIN and e.index is not None for r in e.reasons)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
        log.warning(
            "filter: left out %s of %s training samples (%s)", f"{left_out:,}", f"{samples:,}", counts or "none"
        )


def _entry(line: Any) -> Dropped:
    """From a line of a file."""
    return Dropped(**{**line, "reasons": tuple(line["reasons"]), "contents": dict(line.get("contents", {}))})


def _expect_unchanged(entries: Sequence[Dropped], train: Source) -> None:
    """Compare what samples hold with what they held, in the fields that were read then and are now.

    Raises:
        ValueError: some have changed.
    """
    changed, unknown = [], 0
    for entry in entries:
        now = train.contents(int(entry.index or 0))
        both = [name for name in now if name in entry.contents]
        unknown += bool(now) and not both
        if other := [name for name in both if now[name] != entry.contents[name]]:
            changed.append(f"{printable(entry.name)} (its {', '.join(other)})")
    if changed:
        raise ValueError(
            f"filter: expected samples as they were when the list was written, got {len(changed):,} of the "
            f"{len(entries):,} listed ones changed, the first of them {changed[0]}: the data have been edited since, "
            "or the list is one of other data. Write a list with mmkernels data-report; or read all, with --filter None"
        )
    if unknown:
        log.warning(
            "filter: whether %s of the %s listed samples have changed since is unknown: the list does not say what "
            "they held in the fields that are read; mmkernels data-report writes one that does",
            f"{unknown:,}",
            f"{len(entries):,}",
        )


def names_digest(source: Source) -> str:
    """A hash of the names of all samples, in order."""
    return _digest(map(source.logged_as, range(len(source))))


def _digest(names: Iterable[str]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in names:
        found.update(name.encode("utf-8", "surrogatepass") + b"\n")
    return found.hexdigest()
