"""WebDataset shards: uncompressed tar files in which `key.jpg` (or .png, ...) goes with `key.txt` or `key.json`.

The shards are indexed once by their headers, and samples are then read by offset, so they are as random-access as a
folder. The text is all of `key.txt`, or `caption` (else `text`) of `key.json`, which may be a list.
"""

from __future__ import annotations

import json
import tarfile
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .base import BrokenImageError, DecodedDataset, log
from .decode import IMAGE_SUFFIXES, decode_image
from .folder import parse_captions


class _Span(NamedTuple):
    """A file inside a shard."""

    shard: Path
    offset: int  # bytes
    size: int  # bytes
    whole: bool  # False if the shard ends before the file does

    def read(self) -> bytes:
        if not self.whole:
            raise BrokenImageError(f"{self.shard.name} is truncated")
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class WebDataset(DecodedDataset):
    """Images with captions from tar shards.

    Args:
        path: a shard, a folder of `*.tar`, or a glob pattern.
        resolution: side in pixels at which images are kept.
        max_broken: share of samples that may be unreadable, or lack their image or text.
        cache_bytes: memory for decoded images.

    Raises:
        ValueError: no shards, a shard that is not an uncompressed tar, or no samples in them.
    """

    def __init__(
        self, path: str | Path, *, resolution: int = 48, max_broken: float = 0.05, cache_bytes: int = 1 << 30
    ) -> None:
        shards = find_shards(path)
        same_name = len({shard.name for shard in shards}) < len(shards)
        groups: dict[str, dict[str, _Span]] = {}
        for shard in shards:
            label = str(shard) if same_name else shard.name
            for name, span in _members(shard):
                key, suffix = _split(name)
                groups.setdefault(f"{label}/{key}", {})[suffix] = span
        samples = {key: files for key, files in groups.items() if _image(files) or _text(files)}
        if not samples:
            raise ValueError(f"{path}: expected images with .txt or .json captions in the shards, got none")
        self._images: list[_Span | None] = []
        self._faults: list[str] = []  # why a sample has no text; empty if it has
        captions: list[tuple[str, ...]] = []
        for key, files in samples.items():
            texts, fault = _captions(files)
            captions.append(tuple(texts) or (key,))  # a sample without text is broken: the key only keeps it apart
            self._faults.append(fault)
            self._images.append(_image(files))
        super().__init__(list(samples), captions, resolution=resolution, max_broken=max_broken, cache_bytes=cache_bytes)

    def _decode(self, index: int) -> np.ndarray:
        if self._faults[index]:
            raise BrokenImageError(self._faults[index])
        span = self._images[index]
        if span is None:
            raise BrokenImageError("no image")
        return decode_image(span.read(), self.resolution)


def find_shards(path: str | Path) -> list[Path]:
    """The shards meant by `path`, in the order of their names."""
    found = Path(path).glob("*.tar") if Path(path).is_dir() else map(Path, glob(str(path)))
    shards = sorted(found)
    if not shards:
        raise ValueError(f"{path}: expected a .tar shard, a folder of them or a glob pattern, got no such file")
    return shards


def _members(shard: Path) -> list[tuple[str, _Span]]:
    """The files in a shard. A truncated one gives what it still has, and is named in the log."""
    try:
        tar = tarfile.open(shard, "r:")  # noqa: SIM115  # closed below; only the opening is guarded here
    except tarfile.ReadError as error:
        raise ValueError(f"{shard}: expected an uncompressed tar, got something else ({error})") from error
    members: list[tuple[str, _Span]] = []
    length = shard.stat().st_size
    end = 0  # of the last file, in bytes
    with tar:
        try:
            for member in tar:
                end = member.offset_data + member.size
                if member.isreg():
                    members.append((member.name, _Span(shard, member.offset_data, member.size, end <= length)))
        except tarfile.ReadError:
            end = length  # a header or a file is cut off
    padded = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    if length - padded < tarfile.BLOCKSIZE:  # a whole tar closes with blocks of zeros
        log.warning("%s is truncated: what comes after its first %d files is lost", shard, len(members))
    return members


def _split(name: str) -> tuple[str, str]:
    """`a/b.seg.png` to (`a/b`, `.seg.png`): as WebDataset has it, the key ends at the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", f".{suffix.lower()}"


def _image(files: dict[str, _Span]) -> _Span | None:
    return next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)


def _text(files: dict[str, _Span]) -> _Span | None:
    return files.get(".txt") or files.get(".json")


def _captions(files: dict[str, _Span]) -> tuple[list[str], str]:
    """The captions of a sample, or why there are none."""
    span = _text(files)
    if span is None:
        return [], "no .txt or .json"
    try:
        text = span.read().decode("utf-8-sig")
        if ".txt" in files:
            return ([text.strip()], "") if text.strip() else ([], "an empty .txt")
        table = json.loads(text)
    except BrokenImageError as error:
        return [], str(error)
    except ValueError as error:  # not UTF-8, or not JSON
        return [], f"unreadable text: {error}"
    value = table.get("caption", table.get("text")) if isinstance(table, dict) else None
    captions = parse_captions(value)
    return captions, "" if captions else "no 'caption' or 'text' in the .json"
