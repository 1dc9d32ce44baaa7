"""Code blocks of Markdown pages: which there are, what each is, and running a page's Python in order.

A block that does not run has a comment right before it: `<!-- not run: REASON -->`, with one of REASONS. A block of
text right after a Python block is what that prints.
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = [
    "CLIENTS",
    "PAGES",
    "REASONS",
    "ROOT",
    "Block",
    "blocks_of",
    "needs",
    "problems",
    "python_blocks",
    "run",
]

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "CONTRIBUTING.md", "docs/**/*.md", "mmkernels/**/README.md", "examples/README.md")
    for path in ROOT.glob(pattern)
)
REASONS = (
    "DeepSpeed needs a GPU",
    "downloads a model",
    "needs GPUs on two nodes",
    "shows signatures, not statements",
)
# Libraries of the extra `clients`: blocks that import one run where the newest of each is installed.
CLIENTS = {
    "accelerate": "accelerate", "datasets": "datasets", "lightning": "lightning", "megatron": "megatron.energon",
    "open_clip": "open_clip", "sentence_transformers": "sentence_transformers", "transformers": "transformers",
    "trl": "trl",
}  # fmt: skip
_INTEGRATIONS = {"energon": "megatron"} | {name: name for name in CLIENTS}
_PROGRAMS = ("make", "mmkernels", "pip", "pytest", "python", "srun", "torchrun")
_SHELL = ("bash", "console", "sh", "shell")
_STATEMENT = re.compile(
    r"^(?:import \w|from [\w.]+ import |def \w+\(|class \w+.*:$|for .* in .*:$|with .*:$)", re.MULTILINE
)
_MODULE = "page_of_the_docs"
_NOT_RUN = re.compile(r"<!-- not run: (.*) -->\s*")


@dataclass(frozen=True)
class Block:
    """One block: the line of its first row of code, its language, its code; what the page says it prints, and why it
    does not run, or None."""

    page: str
    line: int
    language: str
    code: str
    prints: str | None = None
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str, text: str | None = None) -> list[Block]:
    """The blocks of a page, in order; `text` instead of the file's."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    tokens = [token for token in MarkdownIt("commonmark").enable("table").parse(text) if token.map is not None]
    found = []
    for i, token in enumerate(tokens):
        if token.type not in ("fence", "code_block"):
            continue
        before = _NOT_RUN.fullmatch(tokens[i - 1].content) if i and tokens[i - 1].type == "html_block" else None
        language = _language(token)
        after = tokens[i + 1] if i + 1 < len(tokens) else None
        printed = after is not None and after.type == "fence" and after.info.strip() == "text" and language == "python"
        assert token.map is not None
        found.append(
            Block(
                page,
                token.map[0] + (2 if token.type == "fence" else 1),
                language,
                token.content,
                after.content if printed and after is not None else None,
                None if before is None else before[1],
            )
        )
    return found


def _language(token: Token) -> str:
    """python, shell or text: what the page says, and where it says nothing shell if the first word is a program."""
    said = token.info.strip() if token.type == "fence" else ""
    if said:
        return "shell" if said in _SHELL else said
    return "shell" if token.content.removeprefix("$ ").split(" ")[0] in _PROGRAMS else "text"


def problems(page: str, text: str | None = None) -> list[str]:
    """Blocks that would go unseen: Python without its name, comments that belong to no block, unknown reasons."""
    text = (ROOT / page).read_text(encoding="utf-8") if text is None else text
    blocks = blocks_of(page, text)
    found = [
        f"{block}: looks like Python; name the language"
        for block in blocks
        if block.language == "text" and _STATEMENT.search(block.code)
    ]
    reasons = [block.not_run for block in blocks if block.not_run is not None]
    found += [f"{page}: no reason of tests/blocks.py: {reason!r}" for reason in reasons if reason not in REASONS]
    if len(re.findall("^<!-- not run", text, re.MULTILINE)) != len(reasons):
        found.append(f"{page}: a comment about a block that does not run is not right before one")
    return found


def needs(block: Block) -> set[str]:
    """Libraries of CLIENTS that a Python block imports, itself or through an integration."""
    names = set()
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    own = {_INTEGRATIONS.get(name.split(".")[2]) for name in names if name.startswith("mmkernels.integrations.")}
    return {name.split(".")[0] for name in names} & set(CLIENTS) | {name for name in own if name is not None}


def run(blocks: list[Block], given: Mapping[str, Any], alone: bool = False) -> None:
    """Run Python blocks in order in one namespace that begins with `given`, or each in its own.

    Raises:
        AssertionError: a block has not printed what its page says.
    """
    try:
        for i, block in enumerate(blocks):
            if alone or i == 0:
                sys.modules[_MODULE] = ModuleType(_MODULE)  # dataclasses look up the module that they are in
                vars(sys.modules[_MODULE]).update({**given, "__name__": _MODULE})
            code = "\n" * (block.line - 1) + block.code  # errors have the page's lines
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(code, block.page, "exec", dont_inherit=True), vars(sys.modules[_MODULE]))
            assert block.prints is None or printed.getvalue() == block.prints, str(block)
    finally:
        sys.modules.pop(_MODULE, None)


def python_blocks(page: str) -> list[Block]:
    """Those of a page that run."""
    return [block for block in blocks_of(page) if block.language == "python" and block.not_run is None]
