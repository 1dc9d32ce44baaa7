# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26"]
# ///
"""Build the embedded corpus: Jane Austen's six novels, cut into passages of at most 500 characters.

    python scripts/build_corpus.py                   # writes mmkernels/pretrain/data/corpus/
    python scripts/build_corpus.py --check           # rebuilds in memory and compares with the committed pack
    python scripts/build_corpus.py --package FILE    # from a package that is already here

Input: Debian's package of the R package janeaustenr, pinned by version and hash, fetched by `apt-get download` or given
as a file (a later Debian has a later version). Output: `corpus.npz` (passages, and a JSON table of books and chapters),
`LICENSES/`, `ATTRIBUTION.md`. Needs `dpkg-deb`, and neither R nor Debian's R.
"""

from __future__ import annotations

import hashlib
import re
import struct
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from pack_files import DATA, Pack, finish, json_array, parser_of, verified

PACKAGE, VERSION = "r-cran-janeaustenr", "1.0.0-1"
SHA256 = "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
BOOKS = {  # in the package's order, with the year of publication
    "Emma": 1815,
    "Mansfield Park": 1814,
    "Northanger Abbey": 1817,
    "Persuasion": 1817,
    "Pride and Prejudice": 1813,
    "Sense and Sensibility": 1811,
}
LONGEST, ENOUGH = 500, 240  # characters: no passage is longer; one this long ends with its paragraph
HELD_OUT = 0.05  # fraction of the chapters

_CHAPTER = re.compile(r"chapter (?:[ivxl]+|\d+)", re.IGNORECASE)
_END = "A NOTE ON THE TEXT"  # by a modern editor
# Volumes, endings, rows of stars, the one footnote, and notes such as "[At this point ..., Volume 1 ends.]".
_NOT_PROSE = re.compile(r"volume [ivx]+|finis|the end|\*.*|\[.*volume.*\]|\(end of volume.*\)|\W*", re.IGNORECASE)
_SENTENCE_END = re.compile(r"""(?:[.!?]|[.!?,;]--)["')]*\s+(?=["'(]*[A-Z])""")
_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Messrs|Dr|St|Capt|Col|Rev|Esq|[A-Z])\.\s+$")
_CLAUSE_ENDS = (re.compile(r"""[;:]["')]*\s+|--"""), re.compile(r"""[;:,]["')]*\s+|--"""))  # the better ones first

ATTRIBUTION = f"""# Attribution

`corpus.npz` contains the six novels of Jane Austen (1775-1817), which are in the public domain. The text is that of
Project Gutenberg without its header and licence, as collected in janeaustenr by Julia Silge (MIT,
`LICENSES/MIT-janeaustenr.txt`, https://github.com/juliasilge/janeaustenr), taken from Debian's package
`{PACKAGE}` {VERSION}. None of them endorses this project.

**Modified:** title pages, headings, one footnote and notes of editors were left out, and so were line breaks and the
underscores that mark italics; the text was cut into passages. The changes were made by `scripts/build_corpus.py`.
"""


def strings(data: bytes) -> list[str]:
    """A character vector in R's binary serialisation, version 3."""
    if data[:2] != b"X\n" or struct.unpack_from(">i", data, 2) != (3,):
        raise ValueError("strings: expected R's binary serialisation, version 3")
    place = 14  # after the versions of the format, the writer and the oldest reader
    place += 4 + struct.unpack_from(">i", data, place)[0]  # the native encoding
    flags, count = struct.unpack_from(">ii", data, place)
    if flags & 0xFF != 16:
        raise ValueError(f"strings: expected a character vector (16), got type {flags & 0xFF}")
    place += 8
    found = []
    for _ in range(count):
        _, size = struct.unpack_from(">ii", data, place)
        found.append(data[place + 8 : place + 8 + size].decode("utf-8"))
        place += 8 + size
    return found


def read_books(path: Path) -> Iterator[list[str]]:
    """The lines of each book of a lazy-load database: its objects follow each other, as a size and a zlib stream."""
    data = path.read_bytes()
    while data:
        stream = zlib.decompressobj()
        yield strings(stream.decompress(data[4:]) + stream.flush())
        data = stream.unused_data


def chapters(lines: list[str]) -> list[list[str]]:
    """The paragraphs of each chapter, without line breaks."""
    found: list[list[str]] = []
    for block in "\n".join(lines).split(_END)[0].split("\n\n"):
        paragraph = " ".join(block.replace("_", "").split())
        if _CHAPTER.fullmatch(paragraph):
            found.append([])
        elif found and not _NOT_PROSE.fullmatch(paragraph):
            found[-1].append(paragraph.replace("*", ""))
    return found


def pieces(text: str, ends: re.Pattern[str]) -> Iterator[str]:
    """The text cut after each match that is not an abbreviation."""
    start = 0
    for match in ends.finditer(text):
        if not _ABBREVIATION.search(text, start, match.end()):
            yield text[start : match.end()].strip()
            start = match.end()
    if text[start:].strip():
        yield text[start:].strip()


def passages(paragraphs: list[str]) -> list[str]:
    """Consecutive sentences, as many as fit; a passage of `ENOUGH` characters ends with its paragraph.

    A sentence that is longer than a passage is cut between clauses.
    """
    done, current = [], ""
    for paragraph in paragraphs:
        parts = [p for s in pieces(paragraph, _SENTENCE_END) for p in ([s] if len(s) <= LONGEST else clauses(s))]
        for part in parts:
            if current and len(current) + 1 + len(part) > LONGEST:
                done.append(current)
                current = ""
            current = f"{current} {part}".strip()
        if len(current) >= ENOUGH:
            done.append(current)
            current = ""
    return [*done, current] if current else done


def clauses(sentence: str) -> list[str]:
    """A long sentence in parts of at most `LONGEST` characters and of about the same length."""
    count = -(-len(sentence) // LONGEST)
    for pattern in _CLAUSE_ENDS:
        ends = [match.end() for match in pattern.finditer(sentence)]
        cuts = [min(ends, key=lambda end: abs(end - len(sentence) * i / count)) for i in range(1, count) if ends]
        bounds = sorted({0, *cuts, len(sentence)})
        parts = [sentence[a:b].strip() for a, b in pairwise(bounds)]
        if max(map(len, parts)) <= LONGEST:
            return parts
    if len(parts) == 1:
        raise ValueError(f"clauses: expected a sentence with clauses, got {sentence!r}")
    return [short for part in parts for short in ([part] if len(part) <= LONGEST else clauses(part))]


def held_out(names: list[str]) -> list[int]:
    """The first 5% of the chapters, ordered by blake2b digest of `book/number`."""
    order = sorted(range(len(names)), key=lambda i: hashlib.blake2b(names[i].encode()).digest())
    return sorted(order[: round(HELD_OUT * len(names))])


def build(package: Path | None) -> Pack:
    with tempfile.TemporaryDirectory() as folder:
        if package is None:
            subprocess.run(["apt-get", "download", f"{PACKAGE}={VERSION}"], cwd=folder, check=True, capture_output=True)
            (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(verified(package, SHA256)), folder], check=True)
        books = list(read_books(Path(folder, "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")))
        licence = Path(folder, "usr/share/doc", PACKAGE, "copyright").read_text(encoding="utf-8")
    for title, lines in zip(BOOKS, books, strict=True):
        if lines[0].casefold() != title.casefold():
            raise ValueError(f"{PACKAGE}: expected {title}, got {lines[0]}")
    parts = [[passages(paragraphs) for paragraphs in chapters(lines)] for lines in books]
    names = [f"{title}/{i}" for title, of_book in zip(BOOKS, parts, strict=True) for i in range(1, len(of_book) + 1)]
    table = {
        "books": BOOKS,
        "chapters": names,
        "passages": [len(chapter) for of_book in parts for chapter in of_book],
        "held_out": held_out(names),
    }
    text = "\n".join(passage for of_book in parts for chapter in of_book for passage in chapter)
    arrays = {"table": json_array(table), "text": np.frombuffer(text.encode("utf-8"), np.uint8)}
    # bzip2: 0.99 MB, where deflate needs 1.4 MB.
    return Pack(arrays, ATTRIBUTION, {"MIT-janeaustenr.txt": licence}, zipfile.ZIP_BZIP2)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--package", type=Path, help=f"the file of {PACKAGE} {VERSION}; default: fetch it")
    args = parser.parse_args()
    finish(partial(build, args.package), DATA / "corpus" / "corpus.npz", args.check)


if __name__ == "__main__":
    main()
