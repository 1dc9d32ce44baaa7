"""What a sample holds, as short hashes: whether it is still as it was is told without decoding anything."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

__all__ = ["HEAD", "brief", "stored"]

HEAD = 1 << 14  # bytes of a file that are read


def brief(content: Any) -> str:
    """A hash of bytes, or of texts, numbers and tuples of them."""
    found = content if isinstance(content, bytes) else repr(content).encode()
    return hashlib.blake2b(found, digest_size=8).hexdigest()


def stored(path: Path) -> Any:
    """The size of a file and a hash of its first HEAD bytes; of a folder, the name and size of each file in it; None
    for what cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size, brief(file.read(HEAD))
    except IsADirectoryError:
        return _listing(path)
    except (OSError, ValueError):  # ValueError: a name that no file can have
        return None


def _listing(folder: Path) -> Any:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry.name, entry.stat().st_size) for entry in entries if entry.is_file())
    except OSError:
        return None
