"""Lengths from a file: .npy, .jsonl or .parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["SUFFIXES", "FileError", "read_columns"]

SUFFIXES = (".npy", ".jsonl", ".parquet")
_MOST = np.iinfo(np.int64).max


class FileError(ValueError):
    """A problem with the file, worded for the user."""


def read_columns(path: Path, columns: list[str]) -> dict[str, NDArray[np.int64]]:
    """One integer per item for each column; a list counts as its length.

    A plain .npy array, or .jsonl with a number on each line, is the first and only column.

    Raises:
        FileError: no such file, a suffix not in SUFFIXES, no such column, a value that is not an integer >= 0.
    """
    if path.suffix not in SUFFIXES:
        raise FileError(f"{path}: expected a name that ends with {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    read = {".npy": _read_npy, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[path.suffix]
    return {name: _integers(path, name, values) for name, values in read(path, columns).items()}


def _integers(path: Path, name: str, values: Any) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise FileError(f"{path}: {name}: expected [n] integers, got {list(array.shape)} {array.dtype}")
    for wrong, expected in ((array < 0, ">= 0"), (array > _MOST, "< 2**63")):
        if wrong.any():
            first = int(wrong.argmax())
            raise FileError(f"{path}: {name}: expected integers {expected}, got {array[first]} of item {first}")
    return array.astype(np.int64)


def _missing(path: Path, column: str, there: list[str]) -> FileError:
    return FileError(f"{path}: no column {column!r}; there are: {', '.join(sorted(there)) or 'none'}")


def _read_npy(path: Path, columns: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # a damaged header is parsed as Python, which may raise anything
        raise FileError(f"{path}: not a .npy array: {error}") from None
    names = array.dtype.names
    if names is None:
        if len(columns) > 1:
            raise _missing(path, columns[1], [])
        return {columns[0]: array}
    for column in columns:
        if column not in names:
            raise _missing(path, column, list(names))
    return {column: array[column] for column in columns}


def _read_jsonl(path: Path, columns: list[str]) -> dict[str, Any]:
    found: dict[str, list[int]] = {column: [] for column in columns}
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise FileError(f"{path}:{number}: not JSON: {error}") from None
            row = item if isinstance(item, dict) else {columns[0]: item}
            for column in columns:
                if column not in row:
                    raise FileError(f"line {number} of {_missing(path, column, list(row))}")
                value = len(row[column]) if isinstance(row[column], list) else row[column]
                if isinstance(value, bool) or not isinstance(value, int):
                    raise FileError(f"{path}:{number}: {column}: expected an integer or a list, got {value!r:.80}")
                if abs(value) > _MOST:
                    raise FileError(f"{path}:{number}: {column}: expected an integer < 2**63, got {value}")
                found[column].append(value)
    return {column: np.array(values, np.int64) for column, values in found.items()}


def _read_parquet(path: Path, columns: list[str]) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        there = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path}: not a .parquet file: {error}") from None
    for column in columns:
        if column not in there:
            raise _missing(path, column, there)
    try:
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise FileError(f"{path}: damaged: {error}") from None
    found = {}
    for column in columns:
        values = table[column]
        if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = pc.list_value_length(values)
        if values.null_count:
            raise FileError(f"{path}: {column}: expected a value for each item, got {values.null_count} without")
        found[column] = values.to_numpy()
    return found
