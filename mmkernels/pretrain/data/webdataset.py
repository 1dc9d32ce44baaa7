"""WebDataset shards: uncompressed tar files in which `key.jpg` (or .png, ...) goes with `key.txt` or `key.json`.

The shards are indexed once by their headers, and samples are read by offset, so access is random as in a folder. The
text is all of `key.txt`, or `caption` (else `text`) of `key.json`, which may be a list.

Asked for other fields than image and text, a sample may have `key.wav` (or .flac, ...) for audio, `key.gif` or
`key.webp` for video, and further keys of `key.json` (`cells.py` lists them); it may lack some, but not all.

As in WebDataset, a key ends at the first dot of the file name: `a/b.seg.png` is the `.seg.png` of the sample `a/b`. If
that leaves a key without an image or without a text, its files are split at their last dot instead: `IMG
2020.01.02.jpg` goes with `IMG 2020.01.02.txt`, while `x.input.jpg` and `x.outputs.txt` stay separate and are broken.
Every file belongs to a sample or is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from mmkernels.pretrain.data.audio import AUDIO_SUFFIXES
from mmkernels.pretrain.data.base import BrokenImageError, BrokenLog
from mmkernels.pretrain.data.captions import EMPTY_FILE, caption_fault, parse_captions
from mmkernels.pretrain.data.cells import PAIR, Cell, Reading
from mmkernels.pretrain.data.columns import ColumnSource, by_row, with_values
from mmkernels.pretrain.data.contents import HEAD, brief
from mmkernels.pretrain.data.decode import IMAGE_SUFFIXES
from mmkernels.pretrain.data.shards import Span, index_shard
from mmkernels.pretrain.data.unicode import printable

# WebDataset's own rule (base_plus_ext): the key is the folder and the name up to its first dot.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# Files that operating systems and WebDataset add to the data.
_METADATA = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$|__[^/]*__($|/)", re.DOTALL)

_ANIMATED = (".gif", ".webp")

_Named = Iterator[tuple[str, dict[str, Cell]]]  # the cells of each sample, by field
_Files = dict[str, Span]  # of one sample, by suffix


class WebDataset(ColumnSource):
    """The samples of tar shards.

    Args:
        path: a shard, a folder of `*.tar`, or a glob pattern.
        fields: those to read; None: image and text.
        labels: further keys of the .json files, whose values are classes.
        resolution: side in pixels at which images are kept.
        max_broken: fraction of samples that may be unreadable, or lack their image or text. A shard that is not a tar
            counts as one sample, and so does a file without a key.
        cache_bytes: memory for decoded images, clips and recordings.
        partial: leave out fields that no sample has, instead of refusing the data for them.

    Raises:
        ValueError: no shards, or no samples in them.
        TooManyBrokenError: more samples than allowed are known to be broken without decoding.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fields: Sequence[str] | None = None,
        labels: Sequence[str] = (),
        resolution: int = 48,
        max_broken: float = 0.05,
        cache_bytes: int = 1 << 30,
        partial: bool = False,
    ) -> None:
        if partial and fields is not None:
            fields = [field for field in fields if field != "document"]
        reading = Reading.of(("image", "caption"), fields, labels)
        index = _Index(reading)
        shards = find_shards(path)
        same_name = len({shard.name for shard in shards}) < len(shards)
        for shard in shards:
            index.add(str(shard) if same_name else shard.name, shard)
        broken = BrokenLog(len(index.samples) + len(index.lost), max_broken)
        for label, what in index.cut.items():
            broken.cut(label, what)
        for label, files in index.left_out.items():
            broken.leave_out(label, files)
        if not index.samples:
            what = "images with .txt or .json captions" if reading.pairs else f"samples with {reading.shown}"
            raise ValueError(f"{path}: expected {what} in the shards, got none{BrokenLog.listing(index.lost)}")
        for name, reason in index.lost.items():
            broken.add(name, reason)
        faults: dict[int, str] = {}
        rows = _pairs(index.samples, faults) if reading.pairs else _rows(index.samples, reading, faults)
        names, cells = by_row(rows, reading)
        options = {"resolution": resolution, "cache_bytes": cache_bytes}
        columns = with_values(path, cells, reading, partial)
        super().__init__(names, columns, reading, faults=faults, broken=broken, **options)

    def _file(self, cell: Cell) -> bytes:
        span: Span = cell
        return span.read()

    def _stored(self, cell: Cell) -> tuple[int, str]:
        span: Span = cell
        try:
            return span.size, brief(span._replace(size=min(span.size, HEAD)).read())
        except BrokenImageError as error:
            return span.size, str(error)


def _pairs(samples: dict[str, _Files], faults: dict[int, str]) -> _Named:
    """Images and texts by name; a sample that lacks one is broken."""
    for number, (name, members) in enumerate(samples.items()):
        image = _image(members)
        texts, fault = _captions(members)
        if fault := fault or ("no image" if image is None else image.fault):
            faults[number] = fault
        # A sample without text is broken; the name only makes it unique.
        yield name, dict(zip(PAIR, (image, tuple(texts) or (name,)), strict=True))


def _rows(samples: dict[str, _Files], reading: Reading, faults: dict[int, str]) -> _Named:
    """The cells of each sample, by name."""
    for number, (name, members) in enumerate(samples.items()):
        try:
            row = _columns(members, reading)
            cells, fault = reading.parse(row, lambda span: (span, "none" if span is None else span.fault))
        except BrokenImageError as error:
            cells, fault = {}, str(error)
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            cells, fault = {}, f"unreadable text: {error}"
        if fault:
            faults[number] = fault
        yield name, cells


def _columns(members: _Files, reading: Reading) -> dict[str, Any]:
    """A sample as a row of a table, in which media are spans."""
    found: dict[str, Any] = {}
    if ".json" in members:
        table = json.loads(members[".json"].read().decode("utf-8-sig"))
        if not isinstance(table, dict):
            raise BrokenImageError(f"expected one JSON object in the .json, got {type(table).__name__}")
        found |= table
    if ".txt" in members:
        found["caption"] = members[".txt"].read().decode("utf-8-sig")
    media = {field: _first(members, suffixes) for field, suffixes in _media(reading).items()}
    return found | {field: span for field, span in media.items() if span is not None or field in found}


def _media(reading: Reading) -> dict[str, tuple[str, ...]]:
    """Medium -> the suffixes of its files."""
    animated = _ANIMATED if "video" in reading.columns else ()
    images = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in animated)
    found = {"image": images, "video": animated, "audio": AUDIO_SUFFIXES}
    regions = any(reading.kind(field) == "regions" for field in reading.columns)
    return {field: each for field, each in found.items() if field in reading.columns or (field == "image" and regions)}


def find_shards(path: str | Path) -> list[Path]:
    """The shards that `path` refers to, sorted by name."""
    found = Path(path).glob("*.tar") if Path(path).is_dir() else map(Path, glob(str(path)))
    shards = sorted(found)
    if not shards:
        raise ValueError(f"{path}: expected a .tar shard, a folder of them or a glob pattern, got no such file")
    return shards


@dataclass
class _Index:
    """Every file of the shards, in a sample or listed as unused. Names are printable."""

    reading: Reading
    samples: dict[str, _Files] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)  # broken would-be samples, with the reason
    left_out: dict[str, dict[str, str]] = field(default_factory=dict)  # files that belong to no sample, by shard
    cut: dict[str, str] = field(default_factory=dict)  # shards that are read only in part

    def add(self, label: str, shard: Path) -> None:
        files, fault, lost = index_shard(shard)
        if fault:
            self.lost[_fresh(self.lost, label)] = fault
        if lost:
            self.cut[label] = lost
        groups: dict[tuple[str, int], _Files] = {}
        turns: dict[str, int] = {}  # of a key whose suffix recurs: another sample, or a new version
        for name, span in files:
            split = _NAME.match(name)
            if _METADATA.match(name):
                self._leave_out(label, name, "metadata")
            elif split is None:
                place = _fresh(self.lost, f"{label}/{name}")
                self.lost[place] = "expected a name of the form key.jpg, key.txt or key.json"
            else:
                key, suffix = split[1], _suffix(split[2])
                turn = turns.setdefault(key, 1)
                if suffix in groups.get((key, turn), ()):
                    turn = turns[key] = turn + 1
                groups.setdefault((key, turn), {})[suffix] = span
        for (key, turn), members in groups.items():
            whole = not self.reading.pairs or (_image(members) and _text(members))
            for stem, part in ({key: members} if whole else _by_name(key, members)).items():
                if self._used(part):
                    again = f" (no. {turn} of this name)" if turn > 1 else ""
                    self.samples[_fresh(self.samples, f"{label}/{stem}{again}")] = part
                else:
                    for suffix in part:
                        what = "neither an image nor a text" if self.reading.pairs else "of no field that is read"
                        self._leave_out(label, stem + suffix, what)

    def _used(self, members: _Files) -> bool:
        if _text(members) or self.reading.pairs:
            return bool(_text(members) or _image(members))
        return any(_first(members, suffixes) for suffixes in _media(self.reading).values())

    def _leave_out(self, label: str, name: str, reason: str) -> None:
        files = self.left_out.setdefault(label, {})
        files[_fresh(files, f"{label}/{name}")] = reason


def _fresh(names: Container[str], name: str) -> str:
    """A printable, unused name."""
    name = printable(name)
    while name in names:
        name += " (again)"
    return name


def _suffix(extension: str) -> str:
    """`seg.PNG` to `.seg.png`: the last part after the key in lower case."""
    parts, dot, last = extension.rpartition(".")
    return f".{parts}{dot}{last.lower()}"


def _by_name(key: str, members: _Files) -> dict[str, _Files]:
    """The samples of a key that lacks an image or a text: one per name up to its last dot."""
    parts: dict[str, _Files] = {}
    for suffix, span in members.items():
        stem, dot, last = suffix.rpartition(".")
        parts.setdefault(key + stem, {})[dot + last] = span
    return parts


def _first(members: _Files, suffixes: Sequence[str]) -> Span | None:
    return next((members[suffix] for suffix in suffixes if suffix in members), None)


def _image(members: _Files) -> Span | None:
    return _first(members, IMAGE_SUFFIXES)


def _text(members: _Files) -> Span | None:
    return members.get(".txt") or members.get(".json")


def _captions(members: _Files) -> tuple[list[str], str]:
    """The captions of a sample, or the reason why there are none."""
    span = _text(members)
    if span is None:
        return [], "no .txt or .json"
    try:
        text = span.read().decode("utf-8-sig")
        table = None if ".txt" in members else json.loads(text)
    except BrokenImageError as error:
        return [], str(error)
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        return [], f"unreadable text: {error}"
    if ".txt" in members:
        text = text.strip()
        fault = caption_fault(text) if text else EMPTY_FILE
        return ([], fault) if fault else ([text], "")
    value = table.get("caption", table.get("text")) if isinstance(table, dict) else None
    if value is None:
        return [], "no 'caption' or 'text' in the .json"
    return parse_captions(value)
