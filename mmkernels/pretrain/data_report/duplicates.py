"""Duplicates, near-duplicates, pictures with several texts, and leaks between training and held-out sets.

What counts is the content of a sample: its picture and its other media, or its texts if it has no media. Pictures may
be nearly the same, and so may texts; other media must be the same exactly. Samples whose contents are connected by
such likeness form a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mmkernels.pretrain.data import BrokenImageError, Document, Text
from mmkernels.pretrain.data.filter_list import TRAIN
from mmkernels.pretrain.data_report import pictures, texts
from mmkernels.pretrain.data_report.kinds import Finding
from mmkernels.pretrain.data_report.reading import Opened
from mmkernels.pretrain.data_report.scan import NONE, Scan, captions_of, is_picture

__all__ = ["duplicates", "one_stays", "repeated_captions"]

_ALIKE = ("duplicates", "near-duplicates", "same-picture")
_LEADERS = 50  # different texts of a group of pictures that further ones are compared with
PICTURES, SHARE, TIMES = 10, 0.01, 10  # of a caption that is boilerplate: see `KINDS`


def duplicates(data: Opened, found: Scan) -> list[Finding]:
    """Every finding that two samples make together."""
    compare = _Compare(data, found)
    content = _contents(compare)
    order = np.argsort(content, kind="stable")
    starts = np.flatnonzero(np.diff(content[order], prepend=-2))
    sizes = np.diff([*starts, len(order)])
    findings: list[Finding] = []
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        if content[order[start]] != NONE:
            findings += compare.group(order[start : start + size].tolist())
    return sorted(findings, key=lambda each: (found.splits.index(each.split), each.index or 0))


def _contents(compare: _Compare) -> np.ndarray:
    """The number of the content of each row, the same where two are alike; NONE for a row without any."""
    rows = compare.rows
    look, say = compare.looks(), compare.sayings()
    blank_text = np.where(rows.blank == 1, rows.text, NONE)  # nothing but its texts tells a blank picture from others
    bare = (rows.picture == NONE) & (rows.media == NONE)
    keys = np.stack([look, rows.media, np.where(bare, say, blank_text)], 1)
    _, content = np.unique(keys, axis=0, return_inverse=True)
    return np.where(bare & (rows.text == NONE), NONE, content.reshape(-1))


class _Compare:
    """Comparisons that need the samples again, which are read once more."""

    def __init__(self, data: Opened, found: Scan) -> None:
        self.data, self.found, self.rows = data, found, found.rows
        self.text = lru_cache(4096)(self._text)

    def looks(self) -> np.ndarray:
        """int64 [n]: pictures that are nearly the same have the same number; NONE without a picture."""
        rows = self.rows
        numbers, firsts = np.unique(rows.picture, return_index=True)
        able = firsts[(numbers != NONE) & (rows.plain[firsts] == 0)]
        pairs = pictures.near_hashes(rows.hash[able].astype(np.uint64))
        thumbnails = {int(i): self._thumbnail(int(able[i])) for i in np.unique(pairs)}
        kept = [(i, j) for i, j in pairs.tolist() if _alike(thumbnails[i], thumbnails[j])]
        return _connected(rows.picture, [(rows.picture[able[i]], rows.picture[able[j]]) for i, j in kept])

    def sayings(self) -> np.ndarray:
        """int64 [n]: of samples without media, texts that are nearly the same have the same number."""
        rows = self.rows
        bare = np.flatnonzero((rows.picture == NONE) & (rows.media == NONE) & (rows.text != NONE))
        numbers, firsts = np.unique(rows.text[bare], return_index=True)
        pairs = texts.near_texts([self._text(int(bare[first])) for first in firsts])
        return _connected(rows.text, [(numbers[i], numbers[j]) for i, j in pairs])

    def _values(self, row: int) -> tuple[str, int]:
        return self.found.splits[int(self.rows.split[row])], int(self.rows.index[row])

    def _thumbnail(self, row: int) -> np.ndarray | None:
        split, index = self._values(row)
        try:
            values = self.data.splits[split][index].values
        except BrokenImageError:  # it could be read before: the file has changed since
            return None
        return next((pictures.thumbnail(value) for value in values.values() if is_picture(value)), None)

    def _text(self, row: int) -> texts.Texts:
        split, index = self._values(row)
        found = {}
        for name, value in self.data.splits[split].peek(index).items():
            if isinstance(value, str | Text):
                found[name] = " ".join(sorted(map(texts.normalised, captions_of(value))))
            elif isinstance(value, Document):
                found[name] = texts.normalised(" ".join(part for part in value.parts if isinstance(part, str)))
        return found

    def group(self, group: list[int]) -> Iterator[Finding]:
        """The findings of rows with one content, in the order of splits and samples."""
        by_split: dict[int, list[int]] = {}
        for row in sorted(group):
            by_split.setdefault(int(self.rows.split[row]), []).append(row)
        for members in by_split.values():
            yield from self._within(members)
        train = by_split.pop(self.found.splits.index(TRAIN), [])
        held_out = [row for members in by_split.values() for row in members]
        if held_out and not self.rows.blank[group[0]]:
            for row in train:
                same = (each for each in held_out if self._same(each, row, ("picture", "text")))
                yield self._finding("leaked", row, next(same, held_out[0]))

    def _within(self, members: list[int]) -> Iterator[Finding]:
        """Of one split."""
        firsts: dict[tuple[int, ...], int] = {}
        leaders: list[int] = []
        followed: dict[int, int] = {}  # first of its exact group -> the leader that it nearly repeats
        for row in members:
            exact = tuple(int(getattr(self.rows, name)[row]) for name in ("picture", "media", "text", "labels"))
            first = firsts.setdefault(exact, row)
            if first != row:
                yield self._finding("duplicates", row, first)
            elif (leader := next((each for each in leaders[:_LEADERS] if self._near(each, row)), None)) is not None:
                followed[row] = leader
            else:
                leaders.append(row)
            if first in followed:
                yield self._finding("near-duplicates", row, followed[first])
            if followed.get(first, first) != leaders[0] and self.rows.picture[row] != NONE:
                yield self._finding("same-picture", row, leaders[0])

    def _near(self, a: int, b: int) -> bool:
        bare = self.rows.picture[a] == NONE and self.rows.media[a] == NONE
        if not self._same(a, b, ("labels",)):
            return False
        return bare or self._same(a, b, ("text",)) or texts.alike(self.text(a), self.text(b))

    def _same(self, a: int, b: int, names: Iterable[str]) -> bool:
        return all(getattr(self.rows, name)[a] == getattr(self.rows, name)[b] for name in names)

    def _finding(self, kind: str, row: int, of: int) -> Finding:
        split, index = self._values(row)
        other, at = self._values(of)
        where = "" if other == split else f" of {other}"
        name = self.data.splits[other].logged_as(at)
        return Finding(kind, split, index, self.data.splits[split].logged_as(index), f"as {name}{where}", (other, at))


def _alike(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and pictures.alike(a, b)


def _connected(numbers: np.ndarray, pairs: Iterable[tuple[int, int]]) -> np.ndarray:
    """Numbers, with one for all that pairs connect; NONE stays."""
    edges = np.array(list(pairs), np.int64).reshape(-1, 2)
    size = int(numbers.max(initial=NONE)) + 1
    if not len(edges):
        return numbers
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), (size, size))
    _, component = connected_components(graph, directed=False)
    return np.where(numbers == NONE, NONE, component[numbers])


def one_stays(wanted: Sequence[Finding]) -> list[Finding]:
    """The findings for which samples are left out: of samples alike, the first that nothing else is found of stays, if
    the one that they are like goes.

    Args:
        wanted: the findings of the kinds to leave out.
    """
    kept = [each for each in wanted if each.kind not in _ALIKE]
    alone = {(each.split, each.index) for each in kept}
    gone, stood_for = set(alone), set()
    order = sorted((each for each in wanted if each.kind in _ALIKE), key=lambda each: (each.split, each.index or 0))
    for place, found in groupby(order, key=lambda each: (each.split, each.index)):
        mine = list(found)
        if place in alone or any(each.of not in gone or each.of in stood_for for each in mine):
            kept += mine
            gone.add(place)
        else:
            stood_for |= {each.of for each in mine}
    return kept


def repeated_captions(data: Opened, found: Scan, show: Callable[[str, int], str]) -> list[Finding]:
    """Captions that stand for too many different pictures to say anything about one.

    Args:
        data, found: read.
        show: (split, index) -> the first caption.
    """
    findings: list[Finding] = []
    for split in found.splits:
        rows = found.of(split)
        rows = rows[(found.rows.caption[rows] != NONE) & (found.rows.picture[rows] != NONE)]
        if not len(rows):
            continue
        pairs = np.unique(np.stack([found.rows.caption[rows], found.rows.picture[rows]], 1), axis=0)
        captions, counts = np.unique(pairs[:, 0], return_counts=True)
        least = max(PICTURES, SHARE * len(rows), TIMES * float(np.median(counts)))
        often = dict(zip(captions[counts >= least].tolist(), counts[counts >= least].tolist(), strict=True))
        for row in rows.tolist():
            if count := often.get(int(found.rows.caption[row])):
                index = int(found.rows.index[row])
                why = f"the caption of {count:,} different pictures: {show(split, index)[:200]}"
                findings.append(Finding("boilerplate", split, index, data.splits[split].logged_as(index), why))
    return findings
