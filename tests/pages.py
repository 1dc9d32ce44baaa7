"""The Python blocks of a page of the docs: they run in order in one namespace, and print what the page says they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["ROOT", "Block", "python_blocks", "run"]

ROOT = Path(__file__).resolve().parents[1]
# A block, and the output that stands right after it.
_BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Its code, and what the page says it prints; None where the page does not say."""

    code: str
    output: str | None


def python_blocks(page: Path) -> list[Block]:
    return [Block(found[1], found[2]) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def run(page: Path, printed: Callable[[], str]) -> dict[str, Any]:
    """Run all blocks; `printed()` returns what was written to stdout since it was last called. Return the namespace."""
    space: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(python_blocks(page), 1):
        printed()
        exec(compile(block.code, f"{page.name}, block {number}", "exec"), space)
        if block.output is not None:
            assert printed() == block.output, f"{page.name}, block {number}"
    return space
