"""The index of a tar shard: each file with its place, and an account of all that cannot be read.

tarfile alone stops without a word at a damaged header, at a block of zeros and at the end of the first of several
archives put together.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import NamedTuple

from .base import BrokenImageError

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
        except OSError as error:  # the shard was there when it was indexed
            raise BrokenImageError(f"{self.shard.name}: {error.strerror or error}") from error


class Shard(NamedTuple):
    """What a shard holds."""

    files: list[tuple[str, Span]]
    fault: str = ""  # why none of it can be read
    lost: str = ""  # what of it cannot be read


def index_shard(shard: Path) -> Shard:
    """The files in a shard, in order. One that is no tar at all, or damaged on the way, says so."""
    try:
        length = shard.stat().st_size
        tar = tarfile.open(shard, "r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115  # closed below
    except (tarfile.TarError, OSError) as error:
        what = "an empty file" if shard.is_file() and not length else f"something else ({error})"
        return Shard([], fault=f"expected an uncompressed tar, got {what}")
    files: list[tuple[str, Span]] = []
    end = 0  # of the last file with its padding, in bytes
    damaged = False
    with tar:
        try:
            for member in tar:
                if tar.offset <= end:  # a size below zero: it would go round for ever
                    damaged = True
                    break
                end = tar.offset
                if not member.isdir():
                    files.append((member.name, _span(shard, member, length)))
        except Exception:  # a cut or damaged header: tarfile raises whatever it likes
            damaged = True
    return Shard(files, lost=_lost(shard, end, length, damaged, len(files)))


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


def _lost(shard: Path, end: int, length: int, damaged: bool, files: int) -> str:
    """What comes after the last file that was found, if it is not the end of a whole tar: blocks of zeros alone."""
    after = f"what comes after its first {files} files is lost"
    if length - end < _BLOCK:
        return f"is truncated: {after}"
    with shard.open("rb") as file:
        file.seek(end)
        while chunk := file.read(_CHUNK):
            if chunk.strip(b"\0"):
                place = file.tell() - len(chunk.lstrip(b"\0"))
                return f"is cut or damaged at byte {place // _BLOCK * _BLOCK}, or several archives in one: {after}"
    return f"is damaged: {after}" if damaged else ""
