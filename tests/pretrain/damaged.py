"""Files that a disk has damaged."""

from __future__ import annotations

from pathlib import Path


def damage(path: Path, how: str) -> None:
    """`how`: gone, cut, empty, longer, or altered: one bit in the middle."""
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "altered":
        at = len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.write_bytes({"cut": content[:-20], "empty": b"", "longer": content + b" x"}[how])
