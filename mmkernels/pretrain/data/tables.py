"""Tables of images and captions: .jsonl, .csv, .tsv, .parquet.

A faulty row (no caption, text that is not UTF-8) is reported with its line and skipped. A fault that casts doubt on
other rows rejects the table: too many fields in a row, an unclosed quote.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mmkernels.pretrain.data.captions import LONGEST, parse_captions
from mmkernels.pretrain.data.decode import IMAGE_SUFFIXES
from mmkernels.pretrain.data.unicode import printable, unicode_fault

__all__ = ["TABLE_SUFFIXES", "Row", "TableFormat", "find_table", "read_table"]

_DELIMITED = {".csv": ",", ".tsv": "\t"}
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
    image: str
    captions: list[str]
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


def read_table(table: Path, form: TableFormat) -> Iterator[Row]:
    """Yield each row with its line.

    Raises:
        ValueError: the table as a whole cannot be read; the message has the file and the line.
    """
    suffix = table.suffix.lower()
    if form.separator is not None and suffix not in _DELIMITED:
        raise ValueError(f"csv_separator: expected none for {table.name}, got {form.separator!r}")
    if suffix == ".parquet":
        yield from _parquet_rows(table, form)
        return
    with table.open(encoding=_encoding(table), errors="surrogateescape", newline="") as file:
        try:
            if suffix == ".jsonl":
                yield from _json_rows(file, table, form)
            else:
                yield from _delimited_rows(file, table, form, form.separator or _DELIMITED[suffix])
        except UnicodeDecodeError as error:  # in UTF-16 a fault cannot be confined to a row
            raise ValueError(f"{table}: expected UTF-16 as its byte order mark says, got {error.reason}") from error


def _encoding(table: Path) -> str:
    """UTF-8, with or without a byte order mark, or UTF-16 with one (spreadsheets write it)."""
    with table.open("rb") as file:
        return "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _json_rows(file: TextIO, table: Path, form: TableFormat) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{table.name}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            shown = printable(line.strip()[:80])
            yield Row(place, "", [], f"expected one JSON object, got {shown!r} ({error})")
            continue
        if isinstance(row, dict):
            yield _row(place, row, form)
        else:
            yield Row(place, "", [], f"expected one JSON object, got {type(row).__name__}")


def _delimited_rows(file: TextIO, table: Path, form: TableFormat, separator: str) -> Iterator[Row]:
    reader = csv.reader(file, delimiter=separator, strict=True)
    header: list[str] | None = None
    columns: tuple[int, int] | None = None
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field limit" in str(error) and reader.line_num == first and header is not None:
                yield Row(
                    f"{table.name}: line {first}", "", [], f"a field of more than {csv.field_size_limit()} characters"
                )
                continue
            hint = " (a quote that is not closed, or not doubled within quotes?)"
            raise ValueError(f"{table}: line {first}: {error}{hint}") from error
        if not any(field.strip() for field in fields) and len(fields) < 2:
            continue
        if header is None:
            header = fields
            continue
        if columns is None:
            columns = _check_columns(f"{table}: line {first}", header, form)
        if not max(columns) < len(fields) <= len(header):
            expected = f"expected {len(header)} fields, got {len(fields)}"
            hint = f"a {separator!r} within a field needs quotes around the field"
            raise ValueError(f"{table}: line {first}: {expected} ({hint})")
        if reader.line_num > first:
            _check_line_breaks(f"{table}: line {first}", fields, columns[0], separator)
        yield _row(f"{table.name}: line {first}", dict(zip(header, fields, strict=False)), form)


def _check_columns(place: str, columns: list[str], form: TableFormat) -> tuple[int, int]:
    """The indices of the two columns. Reject a table without them, or with a duplicate."""
    counts = [columns.count(key) for key in (form.img_key, form.caption_key)]
    if counts != [1, 1]:
        twice = " once each" if max(counts) > 1 else ""
        expected = f"expected the columns {form.img_key!r} and {form.caption_key!r}{twice}"
        options = "csv_separator, csv_img_key, csv_caption_key"
        raise ValueError(f"{place}: {expected}, got {[printable(name) for name in columns]} (see {options})")
    return columns.index(form.img_key), columns.index(form.caption_key)


def _check_line_breaks(place: str, fields: list[str], column: int, separator: str) -> None:
    """Reject a multi-line field that contains another row: an unclosed quote has swallowed it."""
    for line in (line for field in fields for line in field.splitlines()[1:]):
        parts = line.split(separator)
        if len(parts) > column and parts[column].strip(' "').lower().endswith(IMAGE_SUFFIXES):
            raise ValueError(f"{place}: a quote is not closed and swallows the row {printable(line[:80])!r}")


def _parquet_rows(table: Path, form: TableFormat) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ValueError(f"{table}: needs the package pyarrow: pip install 'mmkernels[parquet]'") from error
    try:
        with pq.ParquetFile(table) as file:
            _check_columns(str(table), file.schema_arrow.names, form)
            number = 0
            for batch in file.iter_batches(columns=[form.img_key, form.caption_key]):
                images, captions = (batch.column(name) for name in (form.img_key, form.caption_key))
                for image, caption in zip(images, captions, strict=True):
                    number += 1
                    yield _parquet_row(f"{table.name}: row {number}", image, caption, form)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{table}: expected a .parquet file, got something else ({error})") from error


def _parquet_row(place: str, image: Any, caption: Any, form: TableFormat) -> Row:
    try:
        return _row(place, {form.img_key: image.as_py(), form.caption_key: caption.as_py()}, form)
    except UnicodeDecodeError as error:
        return Row(place, "", [], f"not UTF-8: {error.reason}")


def _row(place: str, row: Mapping[str, Any], form: TableFormat) -> Row:
    if form.img_key not in row or form.caption_key not in row:
        keys = [printable(str(key)) for key in row]
        fault = f"expected the columns {form.img_key!r} and {form.caption_key!r}, got {keys}"
        return Row(place, "", [], fault)
    image = row[form.img_key]
    if not isinstance(image, str) or not image.strip():
        return Row(place, "", [], f"{form.img_key}: expected a path, got {repr(image)[:80]}")
    image = image.strip()
    if unicode_fault(image) and not _is_bytes(image):
        return Row(place, "", [], f"{form.img_key}: {unicode_fault(image)}")
    if len(image) > LONGEST:
        return Row(place, "", [], f"{form.img_key}: a path of {len(image)} characters")
    captions, fault = parse_captions(row[form.caption_key])
    return Row(place, image, captions, f"{form.caption_key}: {fault}" if fault else "")


def _is_bytes(name: str) -> bool:
    """Whether a name that is not Unicode can still be a file's: all its lone surrogates stand for bytes."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True
