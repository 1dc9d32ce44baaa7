"""Invalid text, such as names that are not UTF-8 and lone surrogates: what is accepted, and how it is shown.

A byte that is not UTF-8 comes as a lone surrogate, U+DC80 to U+DCFF, from tar archives, directories, tables and the
command line (Python's "surrogateescape"). JSON can hold any escaped surrogate. Neither can be encoded, so neither may
reach the tokenizer, and both are escaped before they are written anywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["file_in", "printable", "unicode_fault"]

_LONE = re.compile("[\ud800-\udfff]")
_BYTES = re.compile("[\udc80-\udcff]+")


def unicode_fault(text: str) -> str:
    """Why a text is not valid Unicode; empty if it is."""
    lone = None if text.isascii() else _LONE.search(text)
    if lone is None:
        return ""
    place, code = f"at character {lone.start() + 1}", ord(lone[0])
    if _BYTES.match(lone[0]):
        return f"not UTF-8: byte 0x{code - 0xDC00:02x} {place}"
    return f"not Unicode: lone surrogate \\u{code:04x} {place}"


def printable(text: str) -> str:
    """The text, with bytes decoded if they are UTF-8 after all, and other bytes and lone surrogates escaped."""
    if text.isascii() or _LONE.search(text) is None:
        return text
    text = _BYTES.sub(lambda run: run[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_in(folder: Path, name: str) -> Path:
    """The file that a UTF-8 table calls `name`, whatever the locale's file name encoding is.

    Raises:
        UnicodeEncodeError: a lone surrogate, which no name can hold.
    """
    return Path(os.fsdecode(os.path.join(os.fsencode(folder), name.encode("utf-8", "surrogateescape"))))
