"""`mmkernels fetch`: from a name to a folder of data."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mmkernels.pretrain.fetch import openclipart, tuxpaint
from mmkernels.pretrain.fetch.apt import FetchError, cache_folder, download, given
from mmkernels.pretrain.fetch.deb import DebError
from mmkernels.pretrain.fetch.folder import DataFolder, finished

__all__ = ["Fetch", "fetch", "main"]

INTERRUPTED = 130  # the exit status by convention after Ctrl-C


@dataclass(frozen=True)
class Fetch:
    """Download a data set as Debian packages, or read packages that you have, and unpack it into a folder for --data.
    Nothing is installed.
    """

    name: tyro.conf.Positional[Literal["tuxpaint", "openclipart"]]
    """tuxpaint: pictures with captions, spoken by people (161 MB, GPL-2). openclipart: drawings with titles and tags
    (156 MB, public domain)."""
    out: Path | None = None
    """Folder that is made; default: the name."""
    from_: Annotated[tuple[Path, ...], tyro.conf.arg(name="from")] = ()
    """Package files (.deb) to read, instead of downloading them."""
    languages: tuple[str, ...] = ()
    """Of tuxpaint: languages of the captions and recordings, such as en es fr, which is the default."""
    size: int = 256
    """Longer side of a picture, at most, in pixels."""
    cache: Path | None = None
    """Folder of downloaded packages; default: mmkernels/debs in the user's cache folder."""

    def __post_init__(self) -> None:
        if self.cache is not None and self.from_:
            raise ValueError("cache: expected none beside --from, with which nothing is downloaded")
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")
        if self.languages and self.name != "tuxpaint":
            raise ValueError(f"languages: expected none for {self.name}, got {' '.join(self.languages)}")


def fetch(wanted: Fetch) -> dict[str, Any]:
    """Make the folder, unless it is there already; returns what it holds.

    Raises:
        FetchError: the packages cannot be had or read, or the folder is in use.
    """
    module: Any = {"tuxpaint": tuxpaint, "openclipart": openclipart}[wanted.name]
    place = _place(wanted)
    languages = wanted.languages or tuxpaint.LANGUAGES
    settings: dict[str, Any] = {"name": wanted.name, "size": wanted.size}
    settings |= {"languages": list(languages)} if wanted.name == "tuxpaint" else {}
    if (there := finished(place, settings)) is not None:
        print(f"{place} is there already, from {', '.join(there['packages'])}: nothing was read", file=sys.stderr)
        return there
    debs = (
        given(wanted.from_, module.PACKAGES)
        if wanted.from_
        else download(module.PACKAGES, wanted.cache or cache_folder())
    )
    print(f"unpacking into {place}", file=sys.stderr)
    with DataFolder(place, wanted.size) as folder:
        try:
            module.build(debs, folder, **({"languages": languages} if wanted.name == "tuxpaint" else {}))
        except DebError as error:
            raise FetchError(str(error)) from error
        return folder.finish(module.README, settings, debs)


def _place(wanted: Fetch) -> Path:
    """Where the folder is made, links followed. Raise FetchError if nothing can be made there."""
    asked = wanted.out or Path(wanted.name)
    place = Path(os.path.realpath(asked))
    above = next((each for each in place.parents if each.exists()), place)
    here = Path.cwd()
    if not above.is_dir() or place in (here, *here.parents):  # which moving it into its place would replace
        raise FetchError(f"--out: expected a folder that can be made, got {asked}")
    return place if asked.is_symlink() else asked


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels fetch`; returns the exit status."""
    wanted = tyro.cli(Fetch, prog="mmkernels fetch", args=None if argv is None else list(argv))
    try:
        about = fetch(wanted)
    except (FetchError, OSError) as error:
        print(f"mmkernels fetch: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmkernels fetch: stopped; what was downloaded whole is kept", file=sys.stderr)
        return INTERRUPTED
    place = _place(wanted)
    sounds = f" and {about['sounds']:,} recordings" if about["sounds"] else ""
    print(f"{place}: {about['images']:,} pictures{sounds} in {about['rows']:,} rows")
    for reason, count in about["left_out"].items():
        print(f"  left out: {count:,} {reason}")
    print(f"train on it with: mmkernels pretrain --data folder:{place}")
    return 0
