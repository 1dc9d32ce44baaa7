"""The Open Clip Art Library, release 0.18: drawings with titles and tags, in the public domain.

The pictures are the package of PNGs; titles, tags and licences are in the SVGs that these were made of. A row of the
table is a picture with two captions: its title, and its title with its tags.

Most of the collection is icon themes whose title is that of the theme. A title that more than `SHARED` drawings have
names a series rather than what they show; those are left out. So is what a GPL is mentioned in, what is a symbolic
link to another, and what is too large.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from mmkernels.pretrain.data.captions import caption_fault
from mmkernels.pretrain.fetch.deb import Deb
from mmkernels.pretrain.fetch.folder import DataFolder

__all__ = ["PACKAGES", "README", "SHARED", "build"]

PACKAGES = ("openclipart-svg", "openclipart-png")  # in the order in which they are read
SHARED = 3

_SVG, _PNG = "usr/share/openclipart/svg/", "usr/share/openclipart/png/"
_EMBEDDED = re.compile(rb'href\s*=\s*(["\'])data:.*?\1', re.DOTALL)  # a bitmap, whose base64 may spell anything
_GPL = re.compile(rb"GPL|General Public Licen[cs]e")
_AUTHOR = re.compile(r"^clip ?art by .*? - ", re.IGNORECASE)
_NOT_TAGS = {"hash", "unsorted"}  # of the collection's own tools

README = """# Open Clip Art Library 0.18

{images} drawings from the Debian packages {packages} by `mmkernels fetch openclipart`. Public domain (see
`LICENSES/`). **Modified:** drawings were shrunk to at most {side} pixels; titles were tidied.

Left out: {left_out}.
"""


class Drawing(NamedTuple):
    """What the SVG of a drawing says of it."""

    title: str
    tags: tuple[str, ...]
    gpl: bool = False


def build(debs: Mapping[str, Deb], folder: DataFolder) -> None:
    """Unpack the pictures with usable titles.

    Args:
        debs: `PACKAGES`, by name.
        folder: where they go.
    """
    drawings: dict[str, Drawing] = {}
    rows = []
    for package in PACKAGES:
        usable: dict[str, str] | None = None  # by stem
        for file in debs[package].files():
            if file.path == f"usr/share/doc/{package}/copyright":
                folder.licence(package, file.content)
            elif file.path.startswith(_SVG) and file.path.endswith(".svg") and not file.link:
                drawings[file.path.removeprefix(_SVG).removesuffix(".svg")] = read(file.content)
            elif file.path.startswith(_PNG) and file.path.endswith(".png"):
                path = file.path.removeprefix(_PNG)
                usable = titles(drawings) if usable is None else usable
                drawing, title = drawings.get(path.removesuffix(".png")), usable.get(path.removesuffix(".png"), "")
                if file.link:
                    folder.leave_out("links to other pictures")
                elif drawing is not None and drawing.gpl:
                    folder.leave_out("pictures under the GPL")
                elif drawing is None or not title:
                    folder.leave_out("pictures without a title of their own")
                elif place := folder.picture(path, file.content):
                    with_tags = ", ".join([title, *drawing.tags])
                    rows.append({"image": place, "caption": list(dict.fromkeys([title, with_tags]))})
    folder.rows += sorted(rows, key=lambda row: str(row["image"]))


def read(svg: bytes) -> Drawing:
    """Title and tags of an SVG; none if it cannot be read."""
    gpl = _GPL.search(_EMBEDDED.sub(b"", svg)) is not None
    try:
        work = ET.fromstring(svg).find(".//{*}Work")
    except (ET.ParseError, LookupError, ValueError):  # of an unknown encoding, too
        work = None
    if work is None:
        return Drawing("", (), gpl)
    found = [" ".join((each.text or "").replace("_", " ").split()) for each in work.findall("{*}subject//{*}li")]
    tags = dict.fromkeys(tag.lower() for tag in found)
    title = " ".join((work.findtext("{*}title") or "").split())
    return Drawing(title, tuple(tag for tag in tags if tag and tag not in _NOT_TAGS and not caption_fault(tag)), gpl)


def titles(drawings: Mapping[str, Drawing]) -> dict[str, str]:
    """The tidied title of each drawing whose title is its own: without author, underscores and a number at the end."""
    counts = Counter(drawing.title for drawing in drawings.values())
    found = {}
    for stem, drawing in drawings.items():
        words = re.sub(r"[\s_]+", " ", _AUTHOR.sub("", drawing.title))
        words = re.sub(r"[\s-]*\d+$", "", words).strip(" -")
        if counts[drawing.title] <= SHARED and re.search(r"[^\W\d_]{2}", words) and not caption_fault(words):
            found[stem] = words
    return found
