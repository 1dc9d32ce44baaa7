"""Debian packages by the system's own client, into a cache: `apt-get download`, which needs no root and installs
nothing. A package whose file is there with the right hash is not loaded again.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmkernels.pretrain.fetch.deb import Deb, DebError, fields

__all__ = ["FetchError", "cache_folder", "download", "given", "own_folder"]


class FetchError(ValueError):
    """A data set that cannot be had; the message says what was tried and what to do."""


def cache_folder() -> Path:
    """Where packages are kept: `$XDG_CACHE_HOME/mmkernels/debs`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmkernels" / "debs"


@contextmanager
def own_folder(path: Path, busy: str) -> Iterator[Path]:
    """An empty folder that no other process has meanwhile; it may be moved, else it is removed at the end.

    Raises:
        FetchError: another process has it: `busy`.
    """
    path.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(lock), os.stat(path))  # not one that has just been moved
        except OSError:
            mine = False
        if not mine:
            raise FetchError(busy)
        for left in path.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)


def given(paths: Iterable[Path], packages: Sequence[str]) -> dict[str, Deb]:
    """The wanted packages among files that the user has.

    Raises:
        FetchError: one is missing, or a file is no package.
    """
    try:
        found = {deb.name: deb for deb in map(Deb, paths)}
    except DebError as error:
        raise FetchError(f"--from: {error}") from error
    missing = [name for name in packages if name not in found]
    if missing:
        raise FetchError(f"--from: expected the packages {', '.join(packages)}, got {', '.join(found) or 'none'}")
    return {name: found[name] for name in packages}


def download(packages: Sequence[str], cache: Path) -> dict[str, Deb]:
    """The wanted packages, each from the cache or downloaded into it.

    Args:
        packages: names.
        cache: a folder, made if missing.

    Raises:
        FetchError: no apt-get, no network, no such package, or a file with another hash than the package list has.
    """
    for tool in ("apt-get", "apt-cache"):
        if shutil.which(tool) is None:
            raise FetchError(
                f"expected {tool}, which downloads Debian packages, got none on this system. {_otherwise(packages)}"
            )
    return {name: _one(name, cache, packages) for name in packages}


def _one(name: str, cache: Path, packages: Sequence[str]) -> Deb:
    listed = _run(["apt-cache", "show", "--no-all-versions", name])
    about = fields(listed.stdout)
    lacking = [field for field in ("Version", "Size", "SHA256") if field not in about]
    if listed.returncode or lacking:
        raise FetchError(
            f"apt-cache show {name}: expected a package of this system's lists, got {_last(listed)}. Run "
            f"'apt-get update' as root if the lists are empty or old. {_otherwise(packages)}"
        )
    version, size, sha256 = about["Version"], int(about["Size"]), about["SHA256"]
    kept = cache / f"{name}_{version.replace(':', '%3a')}.deb"
    if kept.is_file():
        if _sha256(kept) == sha256:
            return _package(kept, name)
        print(f"{kept}: another hash than the package list has; downloading it again", file=sys.stderr)
    print(f"downloading {name} {version} ({size / 1e6:.0f} MB) into {cache}", file=sys.stderr)
    with own_folder(
        cache / f".{name}.partial", f"{name} is being downloaded by another process; wait for it"
    ) as partial:
        done = _run(["apt-get", "download", "--quiet", f"{name}={version}"], partial)
        files = list(partial.glob("*.deb"))
        if done.returncode or len(files) != 1:
            raise FetchError(
                f"apt-get download {name}={version} failed: {_last(done)}. It needs the network that this system's "
                f"package sources are on. {_otherwise(packages)}"
            )
        if (got := _sha256(files[0])) != sha256:
            raise FetchError(
                f"apt-get download {name}={version}: expected a file with SHA256 {sha256} as in the package list, got "
                f"{got}. Nothing of it was kept; run 'apt-get update' as root and try again"
            )
        os.replace(files[0], kept)
    return _package(kept, name)


def _package(path: Path, name: str) -> Deb:
    try:
        deb = Deb(path)
    except DebError as error:
        raise FetchError(str(error)) from error
    if deb.name != name:
        raise FetchError(f"{path}: expected the package {name}, got {deb.name}")
    return deb


def _run(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


def _last(done: subprocess.CompletedProcess[str]) -> str:
    """The errors of a command, else its status."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("E: ")] or done.stderr.splitlines()[-1:]
    return " ".join(lines) or f"nothing (status {done.returncode})"


def _otherwise(packages: Sequence[str]) -> str:
    return f"Or get the .deb files of {', '.join(packages)} from any mirror of Debian, and pass them with --from"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
