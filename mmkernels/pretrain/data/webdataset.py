"""WebDataset shards: uncompressed tar files in which `key.jpg` (or .png, ...) goes with `key.txt` or `key.json`.

The shards are indexed once by their headers, and samples are read by offset, so access is random as in a folder. The
text is all of `key.txt`, or `caption` (else `text`) of `key.json`, which may be a list.

As in WebDataset, a key ends at the first dot of the file name: `a/b.seg.png` is the `.seg.png` of the sample `a/b`. If
that leaves a key without an image or without a text, its files are split at their last dot instead: `IMG
2020.01.02.jpg` goes with `IMG 2020.01.02.txt`, while `x.input.jpg` and `x.outputs.txt` stay separate and are broken.
Every file belongs to a sample or is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path

import numpy as np

from mmkernels.pretrain.data.base import BrokenImageError, BrokenLog, DecodedDataset
from mmkernels.pretrain.data.captions import caption_fault, parse_captions
from mmkernels.pretrain.data.decode import IMAGE_SUFFIXES, decode_image
from mmkernels.pretrain.data.shards import Span, index_shard
from mmkernels.pretrain.data.unicode import printable

# WebDataset's own rule (base_plus_ext): the key is the folder and the name up to its first dot.
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
# Files that operating systems and WebDataset add to the data.
_METADATA = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)$|__[^/]*__($|/)", re.DOTALL)

_Files = dict[str, Span]  # of one sample, by suffix


class WebDataset(DecodedDataset):
    """Images with captions from tar shards.

    Args:
        path: a shard, a folder of `*.tar`, or a glob pattern.
        resolution: side in pixels at which images are kept.
        max_broken: fraction of samples that may be unreadable, or lack their image or text. A shard that is not a tar
            counts as one sample, and so does a file without a key.
        cache_bytes: memory for decoded images.

    Raises:
        ValueError: no shards, or no samples in them.
        TooManyBrokenError: more samples than allowed are known to be broken without decoding.
    """

    def __init__(
        self, path: str | Path, *, resolution: int = 48, max_broken: float = 0.05, cache_bytes: int = 1 << 30
    ) -> None:
        index = _Index()
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
            why = BrokenLog.listing(index.lost)
            raise ValueError(f"{path}: expected images with .txt or .json captions in the shards, got none{why}")
        for name, reason in index.lost.items():
            broken.add(name, reason)

        self._images: list[Span | None] = []
        captions: list[tuple[str, ...]] = []
        faults: dict[int, str] = {}
        for number, (name, members) in enumerate(index.samples.items()):
            image = _image(members)
            texts, fault = _captions(members)
            fault = fault or ("no image" if image is None else image.fault)
            if fault:
                faults[number] = fault
            captions.append(tuple(texts) or (name,))  # a sample without text is broken; the name only makes it unique
            self._images.append(image)
        super().__init__(
            list(index.samples), captions, faults=faults, broken=broken, resolution=resolution, cache_bytes=cache_bytes
        )

    def _decode(self, index: int) -> np.ndarray:
        span = self._images[index]
        assert span is not None, "a sample without an image is broken"
        return decode_image(span.read(), self.resolution)


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
            for stem, part in _samples(key, members).items():
                if _image(part) or _text(part):
                    again = f" (no. {turn} of this name)" if turn > 1 else ""
                    self.samples[_fresh(self.samples, f"{label}/{stem}{again}")] = part
                else:
                    for suffix in part:
                        self._leave_out(label, stem + suffix, "neither an image nor a text")

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


def _samples(key: str, members: _Files) -> dict[str, _Files]:
    """The samples of a key, by stem: normally one, else one per name up to its last dot."""
    if _image(members) and _text(members):
        return {key: members}
    parts: dict[str, _Files] = {}
    for suffix, span in members.items():
        stem, dot, last = suffix.rpartition(".")
        parts.setdefault(key + stem, {})[dot + last] = span
    return parts


def _image(members: _Files) -> Span | None:
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


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
        fault = caption_fault(text) if text else "an empty .txt"
        return ([], fault) if fault else ([text], "")
    value = table.get("caption", table.get("text")) if isinstance(table, dict) else None
    if value is None:
        return [], "no 'caption' or 'text' in the .json"
    return parse_captions(value)
