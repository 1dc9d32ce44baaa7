"""The user's own folder: images, and one .jsonl or .csv file that says what they show.

    {"image": "photos/1.jpg", "caption": "a heron by the river"}
    {"image": "photos/2.jpg", "caption": ["two kites", "kites over a beach"]}

or a CSV with the columns `image,caption`, where a caption may be a JSON list too. Paths are relative to the file.
Several rows for one image are its several captions.
"""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .base import DecodedDataset
from .decode import decode_image


class FolderDataset(DecodedDataset):
    """Images with captions from a folder.

    Args:
        path: the .jsonl or .csv file, or a folder that has exactly one of them.
        resolution: side in pixels at which images are kept.
        max_broken: share of images that may be unreadable.
        cache_bytes: memory for decoded images.

    Raises:
        ValueError: no captions file, or more than one; a row without image or caption; no rows.
    """

    def __init__(
        self, path: str | Path, *, resolution: int = 48, max_broken: float = 0.05, cache_bytes: int = 1 << 30
    ) -> None:
        table = find_table(Path(path))
        captions: dict[str, list[str]] = {}
        for place, row in _rows(table):
            image, texts = _image_and_captions(place, row)
            captions.setdefault(image, []).extend(texts)
        if not captions:
            raise ValueError(f"{table}: expected at least one image with a caption, got an empty file")
        self._root = table.parent
        super().__init__(
            list(captions),
            [tuple(dict.fromkeys(texts)) for texts in captions.values()],
            resolution=resolution,
            max_broken=max_broken,
            cache_bytes=cache_bytes,
        )

    def _decode(self, index: int) -> np.ndarray:
        return decode_image(self._root / self._names[index], self.resolution)


def find_table(path: Path) -> Path:
    """The captions file meant by `path`: itself, or the only .jsonl or .csv in that folder."""
    if path.is_dir():
        tables = sorted(p for p in path.iterdir() if p.suffix.lower() in (".jsonl", ".csv"))
        if len(tables) != 1:
            found = ", ".join(p.name for p in tables) or "none"
            raise ValueError(f"{path}: expected exactly one .jsonl or .csv file with captions, got {found}")
        return tables[0]
    if path.suffix.lower() not in (".jsonl", ".csv") or not path.is_file():
        raise ValueError(f"{path}: expected a folder, or an existing .jsonl or .csv file")
    return path


def _rows(table: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place, for error messages. Reads UTF-8, with or without a byte order mark."""
    with table.open(encoding="utf-8-sig", newline="") as file:
        if table.suffix.lower() == ".csv":
            reader = csv.DictReader(file)
            for csv_row in reader:
                yield f"{table}: line {reader.line_num}", csv_row
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{table}: line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: expected one JSON object, got {line.strip()[:80]!r} ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: expected one JSON object, got {type(row).__name__}")
            yield place, row


def _image_and_captions(place: str, row: dict[str, Any]) -> tuple[str, list[str]]:
    if "image" not in row or "caption" not in row:
        raise ValueError(f"{place}: expected the columns 'image' and 'caption', got {[k for k in row if k]}")
    image = row["image"]
    if not isinstance(image, str) or not image.strip():
        raise ValueError(f"{place}: image: expected a path, got {image!r}")
    captions = parse_captions(row["caption"])
    if not captions:
        raise ValueError(f"{place}: caption: expected text or a list of texts, got {row['caption']!r}")
    return image.strip(), captions


def parse_captions(value: Any) -> list[str]:
    """One caption or several: a text, a list of texts, or a JSON list of texts as text. Blank ones are left out."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with contextlib.suppress(json.JSONDecodeError):  # then it is a caption that merely starts with a bracket
            value = json.loads(value)
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
