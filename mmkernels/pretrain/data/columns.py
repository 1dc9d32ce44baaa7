"""Your own data, column by column: texts and labels in memory, media decoded when they are needed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmkernels.pretrain.data.audio import decode_audio, require_soundfile
from mmkernels.pretrain.data.base import BrokenImageError, BrokenLog, Sample, Source, Text
from mmkernels.pretrain.data.cells import MEDIA, Cell, Reading
from mmkernels.pretrain.data.contents import brief, stored
from mmkernels.pretrain.data.decode import decode_image, decode_regions, decode_video, image_size, regions_without_crops
from mmkernels.pretrain.data.unicode import printable

__all__ = ["ColumnSource", "by_row", "caption_key", "checked", "concepts_of", "with_values"]

_SHOWN = 5  # classes that a message names


class ColumnSource(Source):
    """Samples with a cell in some of the columns. Decoded images and videos are cached up to `cache_bytes`.

    Args:
        names: of the samples.
        cells: field -> a cell per sample, None where it lacks the field; `Reading.parse` says what a cell is.
        reading: which columns were read, and as what.
        faults: why a sample cannot be read, by index, where known without decoding. They are recorded at once, so that
            even a run that never draws them reports them.
        broken: the record, including other known losses.
        resolution, cache_bytes: as in the data sets.
    """

    def __init__(
        self,
        names: Sequence[str],
        cells: Mapping[str, Sequence[Any]],
        reading: Reading,
        *,
        faults: Mapping[int, str],
        broken: BrokenLog,
        resolution: int,
        cache_bytes: int,
    ) -> None:
        if resolution < 1:
            raise ValueError(f"resolution: expected at least 1 pixel, got {resolution}")
        if "audio" in cells:
            require_soundfile()
        self.fields, self.resolution, self.broken, self.reading = tuple(cells), resolution, broken, reading
        self.cells, self._names, self._faults = cells, names, faults
        self.keys = self._keys(tuple(cells))
        self.concepts = concepts_of(self.keys)
        self._cache: dict[tuple[str, Any], np.ndarray] = {}
        self._cache_left = cache_bytes
        for index, reason in faults.items():
            broken.add(names[index], reason)
        self._numbers: dict[str, dict[str, int]] = {}
        self.learn_classes(range(len(names)))

    @abstractmethod
    def _file(self, cell: Any) -> Path | bytes:
        """The file of a media cell, or its bytes. Raises `BrokenImageError`."""

    def learn_classes(self, rows: Collection[int]) -> None:
        """Number the classes that occur in some samples, sorted. A sample of another class then has no label."""
        found = {field: sorted({c for c in map(self.cells[field].__getitem__, rows) if c}) for field in self._labels}
        for field in (field for field in self.cells if self.reading.kind(field) == "regions"):
            kept = (self.cells[field][row] or (None, ()) for row in rows)
            found["tag"] = sorted({*found.get("tag", ()), *(tag for _, cell in kept for _, tag in cell if tag)})
        self.take_classes({field: tuple(names) for field, names in found.items()})

    def held_out_by(self, fields: Sequence[str], unread: Collection[str]) -> None:
        """Tell concepts by some fields alone, and then forget those that are not read."""
        self.keys = self._keys(fields)
        self.concepts = concepts_of(self.keys)
        self.cells = {field: cells for field, cells in self.cells.items() if field not in unread}
        self.fields = tuple(self.cells)
        self.learn_classes(range(len(self._names)))

    def expect_values(self, where: object, fields: Sequence[str]) -> None:
        """Raise ValueError if no sample has a value of one of the fields."""
        if empty := [field for field in fields if field not in self.fields and field not in self.classes]:
            shown = ", ".join(map(repr, empty))
            raise ValueError(f"{where}: expected values in every field that is read, got none in {shown}")

    def take_classes(self, classes: Mapping[str, tuple[str, ...]]) -> None:
        """Number the classes as another data set does."""
        self.classes = classes
        self._numbers = {field: {name: i for i, name in enumerate(names)} for field, names in classes.items()}

    def unknown_classes(self, rows: Collection[int]) -> list[str]:
        """What some samples lack because their class has no number: a phrase per label."""
        phrases = []
        for field in self._labels:
            numbers, cells = self._numbers[field], self.cells[field]
            strange = [cells[row] for row in rows if cells[row] and cells[row] not in numbers]
            if strange:
                classes = sorted(set(strange))
                more = f" and {len(classes) - _SHOWN} more" if len(classes) > _SHOWN else ""
                count = "1 sample has" if len(strange) == 1 else f"{len(strange)} samples have"
                phrases.append(f"{count} no {field}: {', '.join(classes[:_SHOWN])}{more}")
        return phrases

    @property
    def _labels(self) -> list[str]:
        return [field for field in self.cells if field in self.reading.labels]

    def __getitem__(self, index: int) -> Sample:
        if index in self._faults:
            raise BrokenImageError(self._faults[index])
        values = {field: self._value(field, cells[index]) for field, cells in self.cells.items()}
        present = {field: value for field, value in values.items() if value is not None}
        return Sample(present, int(self.concepts[index]), self._names[index])

    def _value(self, field: str, cell: Any) -> Any:
        if cell is None:
            return None
        kind = self.reading.kind(field)
        if kind == "label":
            return self._numbers[field].get(cell)
        if kind == "text":
            return Text(cell)
        if kind == "vector":
            return cell
        if kind == "regions":
            image, regions = cell
            return decode_regions(self._file(image), regions, self._numbers["tag"])
        found = self._cache.get((field, cell))
        if found is None:
            found = self._decoded(kind, self._file(cell))
            if found.nbytes <= self._cache_left:
                self._cache[field, cell] = found
                self._cache_left -= found.nbytes
        return found

    def _decoded(self, kind: str, file: Path | bytes) -> np.ndarray:
        if kind == "audio":
            return decode_audio(file)
        return (decode_image if kind == "image" else decode_video)(file, self.resolution)

    def name(self, index: int) -> str:
        return self._names[index]

    def image_file(self, index: int) -> str | None:
        cell = self.cells["image"][index] if "image" in self.cells else None
        return printable(cell) if isinstance(cell, str) else None

    def contents(self, index: int) -> Mapping[str, str]:
        cells = {field: cells[index] for field, cells in self.cells.items()}
        return {field: "" if cell is None else brief(self._content(field, cell)) for field, cell in cells.items()}

    def _content(self, field: str, cell: Any) -> Any:
        """A text and a class of the same words are the same: a column may be read as either."""
        kind = self.reading.kind(field)
        if kind in MEDIA:
            return self._stored(cell)
        if kind == "regions":
            return self._stored(cell[0]), cell[1]
        if kind == "vector":
            return cell.shape, cell.tobytes()
        return tuple(" ".join(text.split()) for text in (cell if kind == "text" else (cell,)))

    def _stored(self, cell: Any) -> Any:
        """What tells a medium from others without decoding it: its name and how it begins, or its bytes."""
        try:
            file = self._file(cell)
        except (BrokenImageError, ValueError) as error:
            return str(error)
        if isinstance(file, bytes):
            return brief(file)
        return cell if isinstance(cell, str) else file.name, stored(file)

    def stored_size(self, index: int) -> tuple[int, int] | None:
        cell = self.cells["image"][index] if "image" in self.cells else None
        return None if cell is None else image_size(self._file(cell))

    def peek(self, index: int) -> Mapping[str, Any]:
        cells = {field: cells[index] for field, cells in self.cells.items() if cells[index] is not None}
        values = {field: self._known(field, cell) for field, cell in cells.items()}
        return {field: value for field, value in values.items() if value is not None}  # a class may have no number

    def _known(self, field: str, cell: Any) -> Any:
        """A value without decoding: `...` for a medium, boxes and tags without crops."""
        if field in MEDIA:
            return ...
        if self.reading.kind(field) == "regions":
            return regions_without_crops(cell[1], self._numbers["tag"])
        return self._value(field, cell)

    def _keys(self, fields: Sequence[str]) -> list[str]:
        """What makes samples the same concept, of some fields: the first caption of their image, else of their own,
        else their first file, else the first text. A file is the same image in every row that names it."""
        known = [field for field in fields if field in self.cells]
        files = {field: self._files(field) for field in known if self.reading.kind(field) in (*MEDIA, "regions")}
        pictures = [files[field] for field in files if self.reading.kind(field) in ("image", "regions")]
        captions = self.cells["text"] if "text" in known else [None] * len(self._names)
        firsts: dict[str, Any] = {}
        for column in pictures:
            for file, caption in zip(column, captions, strict=True):
                if file and caption:
                    firsts.setdefault(file, caption)
        texts = [field for field in known if self.reading.kind(field) == "text" and field != "text"]

        def key(index: int) -> str:
            shared = (firsts[file] for column in pictures if (file := column[index]) in firsts)
            if caption := next(shared, captions[index]):
                return caption_key(caption)
            if found := next((f"{field} {file}" for field in files if (file := files[field][index])), ""):
                return found
            said = (f"{field} {cell[0]}" for field in texts if (cell := self.cells[field][index]))
            return next(said, self._names[index])

        return [key(index) for index in range(len(self._names))]

    def _files(self, field: str) -> list[str | None]:
        """The file of each sample's medium, or of the image of its regions; None without one that has a name."""
        cells = self.cells[field]
        if self.reading.kind(field) == "regions":
            cells = [cell and cell[0] for cell in cells]
        return [cell if isinstance(cell, str) else None for cell in cells]


def caption_key(captions: Sequence[str]) -> str:
    """The key of a sample's concept: its first caption, ignoring case and spacing."""
    return " ".join(captions[0].casefold().split()) if captions else ""


def concepts_of(keys: Sequence[str]) -> np.ndarray:
    """Concept ids int64 [n]: samples with the same key share one."""
    ids: dict[str, int] = {}
    return np.array([ids.setdefault(key, len(ids)) for key in keys], np.int64)


def by_row(rows: Iterable[tuple[str, Mapping[str, Cell]]], reading: Reading) -> tuple[list[str], dict[str, list[Cell]]]:
    """(names, cells by field) of (name, cells by field) of each row."""
    names: list[str] = []
    cells: dict[str, list[Cell]] = {field: [] for field in reading.columns}
    for name, row in rows:
        names.append(name)
        for field, column in cells.items():
            column.append(row.get(field))
    return names, cells


def with_values(
    where: object, cells: Mapping[str, Sequence[Cell]], reading: Reading, partial: bool
) -> dict[str, Sequence[Cell]]:
    """The columns in which some sample has a value. Raise ValueError if one has none; if `partial`, if all have."""
    found = {field: column for field, column in cells.items() if any(cell is not None for cell in column)}
    empty = [field for field in cells if field not in found]
    if empty and not (partial and found.keys() - reading.labels):
        shown = ", ".join(" or ".join(map(repr, reading.columns[field])) for field in empty)
        raise ValueError(f"{where}: expected values in every field that is read, got none in {shown}")
    return found


def checked(
    where: object,
    names: Sequence[str],
    cells: Mapping[str, Sequence[Cell]],
    reading: Reading,
    lost: Mapping[str, str],
    *,
    max_broken: float,
    partial: bool,
) -> tuple[dict[str, Sequence[Cell]], BrokenLog]:
    """(the columns that have values, the record) of a table that has been read.

    Args:
        where: the table, for messages.
        names, cells: of the samples.
        reading: which columns were read.
        lost: why rows could not be used, by place.
        max_broken: share of samples and rows that may be broken.
        partial: whether columns may be without values.

    Raises:
        ValueError: no samples, or no values.
        TooManyBrokenError: too many rows are lost.
    """
    if not names:
        wanted = "image with a caption" if reading.pairs else f"row with the {reading.noun} {reading.shown}"
        got = f"none{BrokenLog.listing(lost)}" if lost else "no rows"
        raise ValueError(f"{where}: expected at least one {wanted}, got {got}")
    found = with_values(where, cells, reading, partial)
    broken = BrokenLog(len(names) + len(lost), max_broken)
    for place, fault in lost.items():
        broken.add(place, fault)
    return found, broken
