"""Columns and keys of your own data: which of them are read, and what their values must be.

| column | its values |
|---|---|
| image | path of an image |
| caption, or text | a text, or a (JSON) list of texts that say the same |
| audio | path of a sound file |
| video | path of a folder of frames, or of an animated GIF or WebP |
| regions, pair | JSON: `[{"box": [left, top, right, bottom], "tag": "dog"}, ...]`, fractions of the image |
| vector | numbers, or a list of equally many numbers each |
| labels | a text or a number: a class |
| question, and any other | as a caption |
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkernels.pretrain.data.captions import LONGEST, parse_captions, short
from mmkernels.pretrain.data.unicode import printable, unicode_fault

__all__ = ["KNOWN", "MEDIA", "PAIR", "Cell", "Reading"]

PAIR = ("image", "text")
KNOWN = (*PAIR, "audio", "video", "regions", "question")
"""Columns that are read where they exist, unless others are asked for."""
MEDIA = ("image", "video", "audio")
_KINDS = {**{field: field for field in (*MEDIA, "regions", "vector")}, "pair": "regions"}

_OURS = ("concept", "matched")  # what batches call labels of their own

Cell = Any
"""Of a medium: where it is. Of regions: their image's cell, and (box, tag) of each. Texts; an array; a class."""


@dataclass(frozen=True)
class Reading:
    """Which columns are read, and as what.

    Attributes:
        columns: field -> the names that its column may have.
        labels: the fields whose values are classes.
        image: the column with the images, which regions are cut from.
    """

    columns: Mapping[str, tuple[str, ...]]
    labels: frozenset[str] = frozenset()
    image: str = "image"

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        fields: Sequence[str] | None = None,
        labels: Sequence[str] = (),
        *,
        image: str = "image",
        caption: str = "caption",
        partial: bool = False,
    ) -> Reading:
        """Which of a table's columns to read.

        Args:
            names: of the columns, as far as they are known.
            fields: asked for; None: images, captions, and the others of `KNOWN` that exist.
            labels: further fields, whose values are classes.
            image, caption: names of the columns with the images and with the captions.
            partial: leave out fields without a column, instead of refusing the table for them.

        Raises:
            ValueError: a field that your own data cannot have; a label with a name that batches use; none of the fields
                has a column, if `partial`.
        """
        names = list(names)
        known = set(names)
        if fields is None:
            captions = {caption, "text"} if caption == "caption" else {caption}
            pair = [field for field, by in zip(PAIR, ({image}, captions), strict=True) if by & known]
            more = [field for field in KNOWN[2:] if field in known]
            fields = [*pair, *more] if more or labels else PAIR
        if "document" in fields and not partial:
            raise ValueError("fields: expected fields that columns can hold, got 'document'")
        if taken := [label for label in labels if label in _OURS]:
            raise ValueError(f"labels: expected columns of other names than {', '.join(_OURS)}, got {taken[0]!r}")
        wanted = list(dict.fromkeys([*fields, *labels]))
        if any(_KINDS.get(field) == "regions" for field in wanted):  # the classes of whose boxes have that name
            wanted = [field for field in wanted if field != "tag"]
        texts = (caption, "text") if caption == "caption" else (caption,)
        columns = {"image": (image,), "text": texts}
        by_field = {field: columns.get(field, (field,)) for field in wanted}
        if partial:
            there = {field: by for field, by in by_field.items() if known.intersection(by) and field != "document"}
            if not there:
                expected = ", ".join(repr(by[0]) for by in by_field.values())
                raise ValueError(f"expected some of the columns {expected}, got {[printable(n) for n in names]}")
            by_field = there
        return cls(by_field, frozenset(labels) & by_field.keys(), image)

    @property
    def pairs(self) -> bool:
        """Images and captions alone: each sample must have both."""
        return set(self.columns) == set(PAIR)

    @property
    def shown(self) -> str:
        """The columns, for messages."""
        names = [repr(names[0]) for names in self.columns.values()]
        return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

    @property
    def noun(self) -> str:
        return "columns" if len(self.columns) > 1 else "column"

    def kind(self, field: str) -> str:
        """image, audio, video, regions, vector, label or text."""
        return "label" if field in self.labels else _KINDS.get(field, "text")

    def column(self, field: str, names: Iterable[str]) -> str | None:
        """Which of the existing columns holds a field."""
        existing = set(names)
        return next((name for name in self.columns[field] if name in existing), None)

    def parse(
        self, row: Mapping[str, Any], medium: Callable[[Any], tuple[Cell, str]] | None = None
    ) -> tuple[dict[str, Cell], str]:
        """(the cells of a row by field, why it cannot be used): one of the two is empty.

        A row of images and captions must have both. With other columns it may lack some (None or blank), but not all.

        Args:
            row: column -> value.
            medium: from the value of a medium to (its cell, why there is none); None: the values are paths.
        """
        found = {field: self.column(field, row) for field in self.columns}
        if self.pairs and None in found.values():
            return {}, f"expected the {self.noun} {self.shown}, got {[printable(str(key)) for key in row]}"
        cells: dict[str, Cell] = {}
        for field, column in found.items():
            value = None if column is None else row[column]
            if _blank(value) and not self.pairs:
                continue
            cell, fault = self._cell(field, value, row, medium or _path)
            if fault:
                return {}, f"{column}: {fault}"
            cells[field] = cell
        if not cells.keys() - self.labels:
            return {}, f"expected a value in some of the columns {self.shown}, got none"
        return cells, ""

    def _cell(
        self, field: str, value: Any, row: Mapping[str, Any], medium: Callable[[Any], tuple[Cell, str]]
    ) -> tuple[Cell, str]:
        kind = self.kind(field)
        if kind in MEDIA:
            return medium(value)
        if kind == "label":
            return _class(value)
        if kind == "vector":
            return _vector(value)
        if kind == "text":
            captions, fault = parse_captions(value)
            return tuple(captions), fault
        regions, fault = _regions(value)
        image, missing = medium(row.get(self.image))
        return (image, regions), fault or (f"{self.image}, which they are cut from: {missing}" if missing else "")


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip()) or (value != value) is True


def _path(value: Any) -> tuple[Cell, str]:
    if not isinstance(value, str) or not value.strip():
        return None, f"expected a path, got {repr(value)[:80]}"
    value = value.strip()
    if (fault := unicode_fault(value)) and not _is_bytes(value):
        return None, fault
    return (None, f"a path of {len(value)} characters") if len(value) > LONGEST else (value, "")


def _is_bytes(name: str) -> bool:
    """Whether a name that is not Unicode can still be a file's: all its lone surrogates stand for bytes."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


def _class(value: Any) -> tuple[Cell, str]:
    if isinstance(value, list | dict | tuple):
        return None, f"expected one class, got {short(value)}"
    name = " ".join(str(value).split())
    return (None, fault) if (fault := unicode_fault(name)) else (name, "")


def _regions(value: Any) -> tuple[Cell, str]:
    found = _json(value)
    expected = 'expected a list of {"box": [left, top, right, bottom], "tag": ...} with fractions of the image'
    if not isinstance(found, list):
        return None, f"{expected}, got {short(value)}"
    regions = []
    for region in found:
        box: Any = region.get("box") if isinstance(region, dict) else None
        numbers = isinstance(box, list) and len(box) == 4 and all(_is_number(each) for each in box)
        if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            return None, f"{expected}, got {short(region)}"
        tag, fault = _class(region.get("tag") or "")
        if fault:
            return None, f"tag: {fault}"
        regions.append((tuple(float(each) for each in box), tag))
    return tuple(regions), ""


def _vector(value: Any) -> tuple[Cell, str]:
    found = _json(value)
    rows = found if isinstance(found, list) and found and all(isinstance(row, list) for row in found) else [found]
    for row in rows:
        if not (isinstance(row, list) and row and len(row) == len(rows[0]) and all(_is_number(each) for each in row)):
            return None, f"expected numbers, or lists of equally many, got {short(value)}"
    return np.array(found, np.float32), ""


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
