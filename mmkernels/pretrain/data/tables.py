"""Tables of images and captions, and of other columns: .jsonl, .csv, .tsv, .parquet.

A faulty row (no caption, text that is not UTF-8) is reported with its line and skipped. A fault that casts doubt on
other rows rejects the table: too many fields in a row, an unclosed quote.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mmkernels.pretrain.data.audio import AUDIO_SUFFIXES
from mmkernels.pretrain.data.cells import MEDIA, PAIR, Cell, Reading
from mmkernels.pretrain.data.decode import IMAGE_SUFFIXES
from mmkernels.pretrain.data.unicode import printable

__all__ = ["DELIMITED", "TABLE_SUFFIXES", "Row", "TableFormat", "find_table", "read_table", "reading_of"]

DELIMITED = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
_EXPECTED = f"{', '.join(TABLE_SUFFIXES[:-1])} or {TABLE_SUFFIXES[-1]}"


@dataclass(frozen=True)
class TableFormat:
    """The format of a table.

    Attributes:
        separator: between the fields of a .csv or .tsv; None: a tab in a .tsv, else a comma. The two characters `\\t`
            mean a tab.
        img_key, caption_key: the columns with the images' paths and with their captions.
    """

    separator: str | None = None
    img_key: str = "image"
    caption_key: str = "caption"

    def __post_init__(self) -> None:
        for name in ("img_key", "caption_key"):
            object.__setattr__(self, name, printable(getattr(self, name)))  # from a command line in the C locale
        separator = "\t" if self.separator == "\\t" else self.separator and printable(self.separator)
        if separator is not None and (len(separator) != 1 or separator in '"\r\n'):
            raise ValueError(f"csv_separator: expected one character, no quote or line break, got {separator!r}")
        object.__setattr__(self, "separator", separator)
        if self.img_key == self.caption_key:
            raise ValueError(f"csv_img_key, csv_caption_key: expected two columns, got {self.img_key!r} for both")


class Row(NamedTuple):
    """A row, or the reason why it is faulty."""

    place: str  # the table's name and the line
    cells: Mapping[str, Cell]  # by field
    fault: str = ""


def find_table(path: Path) -> Path:
    """The captions file that `path` refers to: itself, or the only one in that folder; .jsonl and .csv come first."""
    if path.is_dir():
        tables = sorted(p for p in path.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and p.is_file())
        tables = [p for p in tables if p.suffix.lower() in (".jsonl", ".csv")] or tables
        if len(tables) != 1:
            found = ", ".join(printable(p.name) for p in tables) or "none"
            raise ValueError(
                f"{path}: expected exactly one .jsonl or .csv file with captions, got {found} (if there is none, one "
                ".tsv or .parquet)"
            )
        return tables[0]
    if path.suffix.lower() not in TABLE_SUFFIXES or not path.is_file():
        raise ValueError(f"{path}: expected a folder, or an existing {_EXPECTED} file")
    return path


def reading_of(
    table: Path,
    form: TableFormat,
    fields: Sequence[str] | None = None,
    labels: Sequence[str] = (),
    partial: bool = False,
) -> Reading:
    """Which of a table's columns to read, see `Reading.of`. The table is opened if the names of all matter."""
    names: dict[str, None] = {}
    if fields is None or partial:
        if table.suffix.lower() == ".parquet":
            with _parquet(table) as file:
                names = dict.fromkeys(file.schema_arrow.names)
        else:
            with _text(table) as file:
                if table.suffix.lower() == ".jsonl":
                    names = {str(key): None for _, row, fault in _objects(file, table) if not fault for key in row}
                else:
                    header = next(_records(file, table, _separator(table, form)), None)
                    names = dict.fromkeys([] if header is None else header.fields)
    try:
        return Reading.of(names, fields, labels, image=form.img_key, caption=form.caption_key, partial=partial)
    except ValueError as error:
        raise ValueError(f"{table}: {error}") from error


def read_table(table: Path, form: TableFormat, reading: Reading) -> Iterator[Row]:
    """Yield each row with its line.

    Raises:
        ValueError: the table as a whole cannot be read; the message has the file and the line.
    """
    suffix = table.suffix.lower()
    if form.separator is not None and suffix not in DELIMITED:
        raise ValueError(f"csv_separator: expected none for {table.name}, got {form.separator!r}")
    if suffix == ".parquet":
        yield from _parquet_rows(table, reading)
        return
    with _text(table) as file:
        if suffix == ".jsonl":
            for place, row, fault in _objects(file, table):
                yield Row(place, {}, fault) if fault else Row(place, *reading.parse(row))
        else:
            yield from _delimited_rows(file, table, reading, _separator(table, form))


@contextmanager
def _text(table: Path) -> Iterator[TextIO]:
    with table.open(encoding=_encoding(table), errors="surrogateescape", newline="") as file:
        try:
            yield file
        except UnicodeDecodeError as error:  # in UTF-16 a fault cannot be confined to a row
            raise ValueError(f"{table}: expected UTF-16 as its byte order mark says, got {error.reason}") from error


def _separator(table: Path, form: TableFormat) -> str:
    return form.separator or DELIMITED[table.suffix.lower()]


def _encoding(table: Path) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one (spreadsheets write it)."""
    with table.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _objects(file: TextIO, table: Path) -> Iterator[tuple[str, dict[str, Any], str]]:
    """(place, a line's object, why it has none) of a .jsonl."""
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{table.name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = printable(line.strip()[:80])
            yield place, {}, f"expected one JSON object, got {shown!r} ({error})"
            continue
        if isinstance(row, dict):
            yield place, row, ""
        else:
            yield place, {}, f"expected one JSON object, got {type(row).__name__}"


class _Record(NamedTuple):
    """The fields of a row, which begins at a line, or why it has none."""

    line: int
    fields: list[str]
    lines: int = 1
    fault: str = ""


def _records(file: TextIO, table: Path, separator: str) -> Iterator[_Record]:
    """The header of a .csv or .tsv, and its rows; blank ones are left out."""
    reader = csv.reader(file, delimiter=separator, strict=True)
    begun = False
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error) and reader.line_num == first and begun:
                yield _Record(first, [], fault=f"a field of more than {csv.field_size_limit()} characters")
                continue
            hint = " (a quote that is not closed, or not doubled within quotes?)"
            raise ValueError(f"{table}: line {first}: {error}{hint}") from error
        if any(field.strip() for field in fields) or len(fields) > 1:
            begun = True
            yield _Record(first, fields, reader.line_num - first + 1)


def _delimited_rows(file: TextIO, table: Path, reading: Reading, separator: str) -> Iterator[Row]:
    records = _records(file, table, separator)
    header: list[str] | None = None
    columns: dict[str, int] | None = None
    for line, fields, lines, fault in records:
        if header is None:
            header = fields
            continue
        if fault:
            yield Row(f"{table.name}: line {line}", {}, fault)
            continue
        if columns is None:
            columns = _check_columns(f"{table}: line {line}", header, reading)
        if not max(columns.values()) < len(fields) <= len(header):
            expected = f"expected {len(header)} fields, got {len(fields)}"
            hint = f"a {separator!r} within a field needs quotes around the field"
            raise ValueError(f"{table}: line {line}: {expected} ({hint})")
        if lines > 1:
            media = [column for field, column in columns.items() if reading.kind(field) in MEDIA]
            _check_line_breaks(f"{table}: line {line}", fields, media, separator)
        yield Row(f"{table.name}: line {line}", *reading.parse(dict(zip(header, fields, strict=False))))


def _check_columns(place: str, names: list[str], reading: Reading) -> dict[str, int]:
    """Field -> the index of its column. Reject a table without one, or with a duplicate."""
    found = {field: reading.column(field, names) for field in reading.columns}
    counts = [0 if column is None else names.count(column) for column in found.values()]
    if any(count != 1 for count in counts):
        once = ("" if len(counts) == 1 else " once each") if max(counts) > 1 else ""
        options = " (see csv_separator, csv_img_key, csv_caption_key)" if set(found) & set(PAIR) else ""
        expected = f"expected the {reading.noun} {reading.shown}{once}"
        raise ValueError(f"{place}: {expected}, got {[printable(name) for name in names]}{options}")
    return {field: names.index(column) for field, column in found.items() if column is not None}


def _check_line_breaks(place: str, fields: list[str], media: list[int], separator: str) -> None:
    """Reject a multi-line field that contains another row: an unclosed quote has swallowed it."""
    for line in (line for field in fields for line in field.splitlines()[1:]):
        parts = line.split(separator)
        paths = (parts[column] for column in media if column < len(parts))
        if any(path.strip(' "').lower().endswith((*IMAGE_SUFFIXES, *AUDIO_SUFFIXES)) for path in paths):
            raise ValueError(f"{place}: a quote is not closed and swallows the row {printable(line[:80])!r}")


@contextmanager
def _parquet(table: Path) -> Iterator[Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(f"{table}: needs the package pyarrow: pip install 'mmkernels[parquet]'") from error
    try:
        with pq.ParquetFile(table) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table}: expected a .parquet file, got something else ({error})") from error


def _parquet_rows(table: Path, reading: Reading) -> Iterator[Row]:
    with _parquet(table) as file:
        columns = _check_columns(str(table), file.schema_arrow.names, reading)
        names = [file.schema_arrow.names[column] for column in columns.values()]
        number = 0
        for batch in file.iter_batches(columns=names):
            for values in zip(*(batch.column(name) for name in names), strict=True):
                number += 1
                place = f"{table.name}: row {number}"
                try:
                    row = {name: value.as_py() for name, value in zip(names, values, strict=True)}
                except UnicodeDecodeError as error:
                    yield Row(place, {}, f"not UTF-8: {error.reason}")
                else:
                    yield Row(place, *reading.parse(row))
