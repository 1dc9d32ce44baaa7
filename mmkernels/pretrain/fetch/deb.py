"""Read a Debian package without installing it: an ar archive of `control.tar.*` and `data.tar.*`.

    archive     !<arch>\\n, members
    member      name 16 bytes, time 12, owner 6, group 6, mode 8, size 10, "`\\n"; its content, padded to an even size

https://manpages.debian.org/deb.5
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

__all__ = ["Deb", "DebError", "File"]

_HEADER = 60  # bytes
_MAGIC = b"!<arch>\n"
MOST_BYTES = 1 << 28  # of one file, which is read into memory


class DebError(ValueError):
    """A file that is no Debian package, is damaged, or is packed in a way that cannot be read here."""


class File(NamedTuple):
    """A file of a package."""

    path: str  # as installed, without the leading slash
    content: bytes
    link: str = ""  # where a symbolic or hard link points to; it has no content


class Deb:
    """A package.

    Args:
        path: of the .deb.

    Attributes:
        control: the fields of its control file, such as Package, Version and Architecture.

    Raises:
        DebError: not a package, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members = self._index()
        about = {file.path: file.content.decode("utf-8", "surrogateescape") for file in self._tar("control.tar")}
        self.control = self._control(about)
        self._sums = _sums(about.get("md5sums", ""))

    @property
    def name(self) -> str:
        return self.control["Package"]

    def files(self) -> Iterator[File]:
        """The files and symbolic links of the package, in order, checked against its list of sums where it has one.

        Raises:
            DebError: it is damaged, or compressed by something that is not installed.
        """
        left = dict(self._sums)
        for file in self._tar("data.tar"):
            expected = left.pop(file.path, None)
            if expected and not file.link and expected != hashlib.md5(file.content, usedforsecurity=False).hexdigest():
                raise DebError(f"{self.path}: data.tar is damaged (the sum of {file.path})")
            yield file
        if left:
            raise DebError(
                f"{self.path}: data.tar is damaged ({len(left):,} files are missing, such as {next(iter(left))})"
            )

    def _index(self) -> dict[str, tuple[int, int]]:
        """(offset, size) of each member."""
        members: dict[str, tuple[int, int]] = {}
        try:
            length = self.path.stat().st_size
            with self.path.open("rb") as file:
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise DebError(f"{self.path}: expected a Debian package, got something else (no ar archive)")
                while header := file.read(_HEADER):
                    if len(header) < _HEADER or header[58:] != b"`\n" or not header[48:58].strip().isdigit():
                        raise DebError(f"{self.path}: expected a Debian package, got a damaged one (a bad header)")
                    size, offset = int(header[48:58]), file.tell()
                    if offset + size > length:
                        raise DebError(f"{self.path}: expected a Debian package, got a truncated one")
                    members[header[:16].decode("ascii", "replace").strip().rstrip("/")] = offset, size
                    file.seek(offset + size + size % 2)
        except OSError as error:
            raise DebError(f"{self.path}: expected a Debian package ({error.strerror or error})") from error
        for part in ("debian-binary", "control.tar", "data.tar"):
            if not any(name.startswith(part) for name in members):
                raise DebError(f"{self.path}: expected a Debian package, got an ar archive without {part}")
        return members

    def _control(self, about: dict[str, str]) -> dict[str, str]:
        if "control" not in about:
            raise DebError(f"{self.path}: expected a Debian package, got one without a control file")
        found = fields(about["control"])
        if lacking := [field for field in ("Package", "Version") if not found.get(field)]:
            raise DebError(f"{self.path}: expected a Debian package, got one without {' and '.join(lacking)}")
        return found

    def _tar(self, part: str) -> Iterator[File]:
        name = next(name for name in self._members if name.startswith(part))
        try:
            with self._unpacked(name) as stream, _opened(stream) as tar:
                for member in tar:
                    path = member.name.removeprefix("./")
                    if member.issym() or member.islnk():
                        yield File(path, b"", member.linkname)
                    elif member.isreg():
                        if member.size > MOST_BYTES:
                            limit = f"expected files of at most {MOST_BYTES:,} bytes"
                            raise DebError(f"{self.path}: {limit}, got {path} of {member.size:,}")
                        content = tar.extractfile(member)
                        assert content is not None, "a regular file"
                        yield File(path, content.read())
                while stream.read(1 << 20):  # to the checksum at the end: a bad header looks like the last one
                    pass
        except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, gzip.BadGzipFile, OSError) as error:
            raise DebError(f"{self.path}: {name} is damaged ({error or type(error).__name__})") from error

    @contextmanager
    def _unpacked(self, name: str) -> Iterator[IO[bytes]]:
        """A member, decompressed."""
        offset, size = self._members[name]
        with self.path.open("rb") as file, io.BufferedReader(_Slice(file, offset, size), 1 << 20) as raw:
            kind = name.rpartition(".tar")[2]
            plain: dict[str, Any] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
            if kind == "":
                yield raw
            elif kind in plain:
                with plain[kind](raw) as stream:
                    yield stream
            elif kind == ".zst":
                with self._zstandard(raw, name) as stream:
                    yield stream
            else:
                raise DebError(f"{self.path}: expected a member packed by xz, gz, bz2 or zst, got {name}")

    @contextmanager
    def _zstandard(self, raw: IO[bytes], name: str) -> Iterator[IO[bytes]]:
        try:
            import zstandard
        except ModuleNotFoundError:
            part = "--fsys-tarfile" if name.startswith("data") else "--ctrl-tarfile"
            tool = shutil.which("dpkg-deb")
            if tool is None:
                raise DebError(
                    f"{self.path}: {name} needs the package zstandard (pip install zstandard) or the program dpkg-deb"
                ) from None
            with subprocess.Popen([tool, part, str(self.path)], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None, "piped"
                yield process.stdout
                process.stdout.read()  # what follows the end of the archive
            if process.returncode:
                raise DebError(f"{self.path}: dpkg-deb could not unpack {name} (status {process.returncode})") from None
        else:
            try:
                with zstandard.ZstdDecompressor().stream_reader(raw) as stream:
                    yield stream
            except zstandard.ZstdError as error:
                raise DebError(f"{self.path}: {name} is damaged ({error})") from error


def fields(text: str) -> dict[str, str]:
    """The fields of a stanza, `Name: value`; further lines of a value begin with a space and are left out."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and not line.startswith((" ", "\t")):
            found.setdefault(name, value.strip())
    return found


def _sums(text: str) -> dict[str, str]:
    """Path -> MD5, of lines `sum  path`; those of escaped paths are left out."""
    found = {}
    for line in text.splitlines():
        digest, gap, path = line.partition("  ")
        if gap and len(digest) == 32:
            found[path.removeprefix("./")] = digest.lower()
    return found


def _opened(stream: IO[bytes]) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|", encoding="utf-8", errors="surrogateescape")


class _Slice(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        file.seek(offset)
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        chunk = self._file.read(min(len(buffer), self._left))
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)
