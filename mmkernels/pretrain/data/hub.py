"""Hugging Face data sets: a folder that `save_to_disk` wrote, or a name on the hub.

Columns are read by the rules of `cells.py`. Images, sounds and clips are decoded here, not by the package: a broken one
is then skipped and counted as everywhere. Everything but texts and labels stays on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkernels.pretrain.data.base import BrokenImageError
from mmkernels.pretrain.data.cells import MEDIA, Cell, Reading
from mmkernels.pretrain.data.columns import ColumnSource, by_row, checked
from mmkernels.pretrain.data.tables import TableFormat

__all__ = ["HubDataset", "load_splits"]

_ROWS = 1000  # read at a time


class HubDataset(ColumnSource):
    """The rows of one split.

    Args:
        name: of the data set, for messages.
        rows: a `datasets.Dataset`.
        table: names of the columns with images and captions.
        fields: those to read; None: image and text, and the other known columns that exist.
        labels: further columns, whose values are classes; a `ClassLabel`'s have the names that it gives them.
        resolution, max_broken, cache_bytes, partial: as in `FolderDataset`.

    Raises:
        ValueError: missing columns; no rows.
        TooManyBrokenError: more rows than allowed lack what they must have.
    """

    def __init__(
        self,
        name: str,
        rows: Any,
        *,
        table: TableFormat | None = None,
        fields: Sequence[str] | None = None,
        labels: Sequence[str] = (),
        resolution: int = 48,
        max_broken: float = 0.05,
        cache_bytes: int = 1 << 30,
        partial: bool = False,
    ) -> None:
        form = table or TableFormat()
        keys = {"image": form.img_key, "caption": form.caption_key}
        reading = Reading.of(rows.column_names, fields, labels, **keys, partial=partial)
        found = {field: reading.column(field, rows.column_names) for field in reading.columns}
        if None in found.values():
            raise ValueError(f"{name}: expected the {reading.noun} {reading.shown}, got {rows.column_names}")
        self._rows = _undecoded(rows)
        lost: dict[str, str] = {}
        names, cells = by_row(_cells(self._rows, reading, lost), reading)
        columns, broken = checked(name, names, cells, reading, lost, max_broken=max_broken, partial=partial)
        options = {"resolution": resolution, "cache_bytes": cache_bytes}
        super().__init__(names, columns, reading, faults={}, broken=broken, **options)

    def _file(self, cell: Cell) -> Path | bytes:
        row, column = cell
        value = self._rows[row][column]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return Path(value)
        if not isinstance(value, bytes):
            raise BrokenImageError(f"{column}: expected the bytes of a file or its path, got {type(value).__name__}")
        return value


def load_splits(name: str) -> dict[str, Any]:
    """The splits of a data set, `datasets.Dataset`s by name.

    Args:
        name: a folder that `save_to_disk` wrote, or a name on the hub (or a folder of files that `load_dataset` reads);
            with `:split` at its end, that split alone.

    Raises:
        ValueError: the package is missing, there is no such data set, or no such split.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(f"hf:{name}: needs the package datasets: pip install 'mmkernels[hf]'") from error
    path, _, split = ("", "", "") if Path(name).exists() else name.rpartition(":")
    path = path or name
    saved = any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    try:
        found = datasets.load_from_disk(path) if saved else datasets.load_dataset(path)
    except Exception as error:  # whatever the hub, its scripts and its file formats raise
        raise ValueError(f"hf:{name}: expected a data set that can be opened, got {_line(error)}") from error
    splits = dict(found) if isinstance(found, Mapping) else {"train": found}
    if split and split not in splits:
        raise ValueError(f"hf:{name}: expected one of the splits {', '.join(splits)}, got {split!r}")
    return {split: splits[split]} if split else splits


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _undecoded(rows: Any) -> Any:
    """The data set with its media as bytes or paths."""
    import datasets

    known: list[Any] = [getattr(datasets, kind) for kind in ("Image", "Audio", "Video") if hasattr(datasets, kind)]
    for column, feature in rows.features.items():
        for kind in known:
            if isinstance(feature, kind):
                rows = rows.cast_column(column, kind(decode=False))
    return rows


def _cells(rows: Any, reading: Reading, lost: dict[str, str]) -> Iterator[tuple[str, dict[str, Cell]]]:
    """The cells of each row without a fault, by name; a medium's is (row, column)."""
    columns = {column for field in reading.columns if (column := reading.column(field, rows.column_names))}
    media = {column for field in MEDIA if field in reading.columns and (column := reading.column(field, columns))}
    media |= {reading.image} & set(rows.column_names)
    names = {c: rows.features[c].names for c in columns if hasattr(rows.features[c], "names")}
    texts = rows.select_columns(sorted(columns - media)) if columns - media else None
    for first in range(0, len(rows), _ROWS):
        last = min(first + _ROWS, len(rows))
        block = texts[first:last] if texts is not None else {}
        present = {column: _present(rows, column, first, last) for column in media}
        for i in range(last - first):
            row = {column: values[i] for column, values in block.items()}
            row |= {c: each[row[c]] for c, each in names.items() if isinstance(row.get(c), int) and row[c] >= 0}
            row |= {column: (first + i, column) if there[i] else None for column, there in present.items()}
            cells, fault = reading.parse(row, lambda cell: (cell, "" if cell else "expected a file, got None"))
            if fault:
                lost[f"row {first + i + 1}"] = fault
            else:
                yield f"row {first + i + 1}", cells


def _present(rows: Any, column: str, first: int, last: int) -> list[bool]:
    """Whether each row has a value, without reading it."""
    table = rows.with_format("arrow").select_columns([column])[first:last]
    present: list[bool] = table.column(0).is_valid().to_pylist()
    return present
