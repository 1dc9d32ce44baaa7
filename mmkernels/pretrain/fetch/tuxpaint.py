"""Tux Paint's stamps: pictures, captions in some eighty languages, and these spoken by people in a dozen of them.

A row of the table is a picture in one language:

| field | |
|---|---|
| image | the picture |
| caption | in English, whatever the language: samples with the same one are the same concept |
| audio | the caption, spoken in the language; English has few, others have nearly all |
| text_b | the caption in the language; rows in English have none |
| language | its code |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from mmkernels.pretrain.data.captions import caption_fault
from mmkernels.pretrain.fetch.apt import FetchError
from mmkernels.pretrain.fetch.deb import Deb
from mmkernels.pretrain.fetch.folder import DataFolder

__all__ = ["LANGUAGES", "PACKAGES", "README", "build"]

PACKAGES = ("tuxpaint-stamps-default",)
LANGUAGES = ("en", "es", "fr")

_STAMPS = "usr/share/tuxpaint/stamps/"
_SPOKEN = re.compile(r"(?P<stem>.+)_desc(?:_(?P<language>[A-Za-z]+(?:_[A-Z]+)?))?\.(?:ogg|wav)$")
_TRANSLATED = re.compile(r"(?P<language>[A-Za-z@_]+)\.utf8=(?P<text>.*)$")

README = """# Tux Paint's stamps

{images} pictures and {sounds} recordings in {rows} rows, from the Debian package {packages} by `mmkernels fetch
tuxpaint`. Copyright 2002-2022 by Bill Kendrick and the contributors of Tux Paint. Licence: GPL, version 2 (see
`LICENSES/`). **Modified:** pictures were shrunk to at most {side} pixels; recordings are as they were.

Left out: {left_out}.
"""


def build(debs: Mapping[str, Deb], folder: DataFolder, languages: Sequence[str]) -> None:
    """Unpack the pictures, and their captions and recordings in some languages.

    Args:
        debs: `PACKAGES`, by name.
        folder: where they go.
        languages: codes as the package has them, such as en, fr or pt_BR.

    Raises:
        FetchError: a language that the package does not have.
    """
    texts: dict[str, dict[str, str]] = {}  # by stem and language
    pictures: dict[str, str] = {}
    vectors: set[str] = set()
    spoken: dict[tuple[str, str], str] = {}
    known: set[str] = {"en"}
    for file in (file for deb in debs.values() for file in deb.files()):  # a picture may come before its captions
        name = file.path.removeprefix(_STAMPS)
        if file.path != name and not file.link and name.endswith(".txt") and not name.endswith("_mirror.txt"):
            texts[name.removesuffix(".txt")] = captions(file.content)
            known |= texts[name.removesuffix(".txt")].keys()
    for package, deb in debs.items():
        for file in deb.files():
            if file.path == f"usr/share/doc/{package}/copyright":
                folder.licence(package, file.content)
            if not file.path.startswith(_STAMPS) or not PurePosixPath(file.path.removeprefix(_STAMPS)).name:
                continue
            if file.link:
                folder.leave_out("links to other files")
                continue
            path = file.path.removeprefix(_STAMPS)
            stem, suffix = str(PurePosixPath(path).with_suffix("")), PurePosixPath(path).suffix
            if stem.endswith("_mirror"):
                if suffix == ".png":
                    folder.leave_out("mirrored pictures")
            elif suffix == ".png":
                if "en" not in texts.get(stem, {}):
                    folder.leave_out("pictures without a caption")
                elif place := folder.picture(path, file.content):
                    pictures[stem] = place
            elif suffix == ".svg":
                vectors.add(stem)
            elif found := _SPOKEN.match(path):
                language = found["language"] or "en"
                if (found["stem"], language) in spoken:
                    folder.leave_out("second recordings of a caption")
                elif language in languages and (place := folder.sound(path, file.content)):
                    spoken[found["stem"], language] = place
    if unknown := [language for language in languages if language not in known]:
        raise FetchError(f"languages: expected some of {', '.join(sorted(known))}, got {', '.join(unknown)}")
    folder.leave_out("pictures that are SVG alone, which Pillow does not read", len(vectors - pictures.keys()))
    for (stem, language), place in sorted(spoken.items()):
        if stem not in pictures:
            folder.drop(place, "recordings without a picture")
        elif language not in texts[stem]:
            folder.drop(place, "recordings of no caption")
            del spoken[stem, language]
    folder.rows += _rows(pictures, texts, spoken, languages)


def captions(content: bytes) -> dict[str, str]:
    """The captions of a stamp by language: the first line is English, each other one `de.utf8=Eine Blume.`. Those that
    are empty or not UTF-8 are not there.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(content.decode("utf-8-sig", "surrogateescape").splitlines()):
        translated = _TRANSLATED.match(line)
        language, text = (translated["language"], translated["text"]) if translated else ("en", line)
        text = " ".join(text.split())
        if text and (translated or number == 0) and not caption_fault(text):
            found.setdefault(language, text)
    return found


def _rows(
    pictures: Mapping[str, str],
    texts: Mapping[str, Mapping[str, str]],
    spoken: Mapping[tuple[str, str], str],
    languages: Sequence[str],
) -> list[dict[str, Any]]:
    rows = []
    for stem, place in sorted(pictures.items()):
        for language in dict.fromkeys(languages):
            if language not in texts[stem]:
                continue
            row: dict[str, Any] = {"image": place, "caption": texts[stem]["en"], "language": language}
            if language != "en":
                row["text_b"] = texts[stem][language]
            if (stem, language) in spoken:
                row["audio"] = spoken[stem, language]
            rows.append(row)
    return rows
