"""The index of a tar shard: each file with its offset, and a record of what cannot be read.

tarfile alone stops silently at a damaged header, at a block of zeros, and after the first of several concatenated
archives. This index searches for the next intact header.
"""

from __future__ import annotations

import tarfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mmkernels.pretrain.data.base import BrokenImageError

__all__ = ["Shard", "Span", "index_shard"]

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 1 << 20  # bytes read at a time


class Span(NamedTuple):
    """A file inside a shard."""

    shard: Path
    offset: int  # bytes
    size: int  # bytes
    fault: str  # why it cannot be read; empty if it can

    def read(self) -> bytes:
        if self.fault:
            raise BrokenImageError(self.fault)
        try:
            with self.shard.open("rb") as file:
                file.seek(self.offset)
                return file.read(self.size)
        except OSError as error:  # the shard existed when it was indexed
            raise BrokenImageError(f"{self.shard.name}: {error.strerror or error}") from error


class Shard(NamedTuple):
    """The contents of a shard."""

    files: list[tuple[str, Span]]
    fault: str = ""  # why none of it can be read
    lost: str = ""  # which part cannot be read


def index_shard(shard: Path) -> Shard:
    """The files in a shard, in order. Damaged parts are skipped and reported; concatenated archives are all read."""
    try:
        length = shard.stat().st_size
        with shard.open("rb") as file:
            index = _index(file, shard, length)
    except OSError as error:
        return Shard([], fault=f"expected an uncompressed tar, got something else ({error.strerror or error})")
    if (index.lost and not index.files) or not length:
        what = "something else (no whole header)" if length else "an empty file"
        return Shard([], fault=f"expected an uncompressed tar, got {what}")
    return index


def _index(file: BinaryIO, shard: Path, length: int) -> Shard:
    files: list[tuple[str, Span]] = []
    lost: list[str] = []
    end = 0  # of what has been read, in bytes
    hole: int | None = None  # start of the damage being skipped
    while (place := _past_zeros(file, end)) is not None:
        start = _header(file, place)
        if start != place and hole is None:
            hole = place
        if start is None:
            break
        found, end = _archive(file, shard, start, length)
        if end == start:  # a header whose file is damaged
            hole, end = start if hole is None else hole, start + _BLOCK
            continue
        if hole is not None:
            lost.append(f"is damaged from byte {hole} to {start}: its content is lost")
            hole = None
        files += found
    if length - end < _BLOCK:  # a complete tar ends with blocks of zeros
        lost.append(f"is truncated: everything after its first {len(files)} files is lost")
    elif hole is not None:
        lost.append(f"is damaged from byte {hole} on: everything after its first {len(files)} files is lost")
    return Shard(files, lost="; ".join(lost))


def _archive(file: BinaryIO, shard: Path, start: int, length: int) -> tuple[list[tuple[str, Span]], int]:
    """The files from a header on, and the end of the last one with its padding (the header if there are none)."""
    files: list[tuple[str, Span]] = []
    end = start
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                if tar.offset <= end:  # a negative size would loop forever
                    break
                end = tar.offset
                if not member.isdir():
                    files.append((member.name, _span(shard, member, length)))
    except Exception:  # on a truncated or damaged header tarfile may raise anything
        pass
    return files, end


def _past_zeros(file: BinaryIO, place: int) -> int | None:
    """The first block at or after `place` that is not all zeros."""
    file.seek(place)
    while chunk := file.read(_CHUNK):
        if kept := len(chunk.lstrip(b"\0")):
            return (file.tell() - kept) // _BLOCK * _BLOCK
    return None


def _header(file: BinaryIO, place: int) -> int | None:
    """The first block at or after `place` that is an intact header. Except at byte 0 it must be marked `ustar`."""
    file.seek(place)
    while len(block := file.read(_BLOCK)) == _BLOCK:
        if block[257:262] == b"ustar" or place == 0:
            with suppress(tarfile.HeaderError):
                tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                return place
        place += _BLOCK
    return None


def _span(shard: Path, member: tarfile.TarInfo, length: int) -> Span:
    fault = ""
    if member.islnk() or member.issym():
        fault = f"{member.name} is a link to {member.linkname}, not a file"
    elif not member.isreg():
        fault = f"{member.name} is a special file"
    elif member.issparse():
        fault = f"{member.name} is stored as a sparse file"
    elif member.offset_data + member.size > length:
        fault = f"{shard.name} is truncated"
    return Span(shard, member.offset_data, member.size, fault)
