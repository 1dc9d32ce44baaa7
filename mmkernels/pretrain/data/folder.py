"""Your own folder: one table, and the files that it names.

    {"image": "photos/1.jpg", "caption": "a heron by the river"}
    {"image": "photos/2.jpg", "caption": ["two kites", "kites over a beach"]}

or a .csv, .tsv or .parquet with the columns `image` and `caption`, where a caption may be a (JSON) list too. Paths are
relative to the table. Several rows for one image give it several captions.

With other columns (`cells.py` lists them) each row is a sample, and may lack some of them:

    {"image": "photos/1.jpg", "question": "what stands by the river?", "answer": "a heron"}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import Data, Sample, Source, Subset
from mmkernels.pretrain.data.cells import PAIR, Cell
from mmkernels.pretrain.data.columns import ColumnSource, by_row, checked
from mmkernels.pretrain.data.tables import Row, TableFormat, find_table, read_table, reading_of
from mmkernels.pretrain.data.unicode import file_in, printable


class FolderDataset(ColumnSource):
    """The rows of a table in a folder.

    Args:
        path: the table, or a folder that has exactly one.
        table: its separator and columns.
        fields: those to read; None: image and text, and the other known columns that exist.
        labels: further columns, whose values are classes.
        resolution: side in pixels at which images are kept.
        max_broken: fraction of samples, and of table rows, that may be unreadable.
        cache_bytes: memory for decoded images, clips and recordings.
        partial: leave out fields that no sample has, instead of refusing the data for them.

    Raises:
        ValueError: no table, or more than one; a table with missing columns, too many fields in a row or an unclosed
            quote; no rows.
        TooManyBrokenError: more rows than allowed have no readable image or caption.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        table: TableFormat | None = None,
        fields: Sequence[str] | None = None,
        labels: Sequence[str] = (),
        resolution: int = 48,
        max_broken: float = 0.05,
        cache_bytes: int = 1 << 30,
        partial: bool = False,
    ) -> None:
        source, form = find_table(Path(path)), table or TableFormat()
        reading = reading_of(source, form, fields, labels, partial)
        lost: dict[str, str] = {}
        rows = _without_faults(read_table(source, form, reading), lost)
        names, cells = _by_image(rows) if reading.pairs else by_row(((r.place, r.cells) for r in rows), reading)
        columns, broken = checked(source, names, cells, reading, lost, max_broken=max_broken, partial=partial)
        self._root = source.parent
        options = {"resolution": resolution, "cache_bytes": cache_bytes}
        super().__init__(names, columns, reading, faults={}, broken=broken, **options)

    def _file(self, cell: Cell) -> Path:
        return file_in(self._root, cell)


def _without_faults(rows: Iterable[Row], lost: dict[str, str]) -> Iterable[Row]:
    for row in rows:
        if row.fault:
            lost[row.place] = row.fault
        else:
            yield row


def _by_image(rows: Iterable[Row]) -> tuple[list[str], dict[str, list[Cell]]]:
    """(names, cells by field): a sample per image, with all of its captions."""
    captions: dict[str, list[str]] = {}
    for row in rows:
        captions.setdefault(row.cells["image"], []).extend(row.cells["text"])
    texts = [tuple(dict.fromkeys(each)) for each in captions.values()]
    return [printable(image) for image in captions], dict(zip(PAIR, (list(captions), texts), strict=True))


class Labelled(Subset):
    """The same samples with further labels.

    Args:
        whole: the samples.
        names: label -> the name of each sample's class, None without one.
        classes: label -> the names that count, in order.
    """

    def __init__(
        self, whole: Source, names: Mapping[str, Sequence[str | None]], classes: Mapping[str, tuple[str, ...]]
    ) -> None:
        super().__init__(whole, np.arange(len(whole)))
        self.fields, self.classes = (*whole.fields, *names), {**whole.classes, **classes}
        self._numbers: list[dict[str, int]] = [{} for _ in range(len(whole))]
        for label, each in names.items():
            places = {name: i for i, name in enumerate(classes[label])}
            for numbers, name in zip(self._numbers, each, strict=True):
                if name in places:
                    numbers[label] = places[name]

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        return replace(sample, values={**sample.values, **self._numbers[index]})

    def peek(self, index: int) -> Mapping[str, Any]:
        return {**super().peek(index), **self._numbers[index]}


def with_labels(data: Data, rows: Data, labels: Sequence[str]) -> Data:
    """The same samples with labels that are columns of their table: those of a sample's row, or of an image with all of
    its captions those that its rows agree in. The classes are those of the training samples.

    Args:
        data: without the labels.
        rows: the same data read row by row, all of `train` or in its own splits, with the labels.
        labels: fields of `rows`.

    Raises:
        ValueError: rows of one image have different classes.
    """
    said = {source: _classes_said(source, labels) for source in {rows.train, *rows.held_out.values()}}

    def names(source: Source, of: Source) -> dict[str, list[str | None]]:
        return {
            label: [_agreed(label, source.name(i), said[of][label]) for i in range(len(source))] for label in labels
        }

    own = names(data.train, rows.train)
    classes = {label: tuple(sorted({name for name in each if name})) for label, each in own.items()}
    held_out: dict[str, Source] = {
        split: Labelled(source, names(source, rows.held_out.get(split, rows.train)), classes)
        for split, source in data.held_out.items()
    }
    return Data(Labelled(data.train, own, classes), held_out)


def _classes_said(rows: Source, labels: Sequence[str]) -> dict[str, dict[str, dict[str, None]]]:
    """label -> name of a row, or of the file of its image -> the classes that are said of it."""
    said: dict[str, dict[str, dict[str, None]]] = {label: {} for label in labels}
    for i in range(len(rows)):
        values, keys = rows.peek(i), {rows.name(i), rows.image_file(i)} - {None}
        for label in labels:
            if (number := values.get(label)) is not None:
                for key in keys:
                    said[label].setdefault(str(key), {})[rows.classes[label][number]] = None
    return said


def _agreed(label: str, name: str, said: Mapping[str, Iterable[str]]) -> str | None:
    found = list(said.get(name, ()))
    if len(found) > 1:
        raise ValueError(
            f"labels: expected one {label} of each image, which is a sample with all of its captions, got "
            f"{found[0]!r} and {found[1]!r} in rows of {name}"
        )
    return found[0] if found else None
