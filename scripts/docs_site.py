"""The documentation site, as hooks of mkdocs (mkdocs.yml): pages from outside docs/, patterns in the navigation, links
between files of the repository, and links from the names of functions and classes to the reference.

A page reads the same on a code host: it links to other files of the repository by their paths there.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parents[1]
# Pages of the repository outside docs/, and where they are on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
    "mmkernels/batch/README.md": "families/batch.md",
    "mmkernels/planning/README.md": "families/planning.md",
    **{f"mmkernels/ops/{f}/README.md": f"families/{f}.md" for f in ("attention", "contrastive", "packing")},
}
_SOURCES = {page: source for source, page in ELSEWHERE.items()}
_LISTS = ("changelog.md", "verified.md")  # they name everything: last among what a search finds
_LINK = re.compile(r"(?<!!)\[(?P<text>(?:[^][]|\[[^][]*\])*)\]\((?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")
_FENCE = re.compile(r"^ *(`{3,}).*?^ *\1`*$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> None:
    """Expand the navigation, leave out what is not written yet, and give headings a code host's anchors."""
    pages = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    pages |= set(ELSEWHERE.values())
    assert config.nav is not None
    named = {entry for entry in _entries(config.nav) if "*" not in entry}
    config.nav = _expanded(config.nav, sorted(pages), named)
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    config.markdown_extensions.append(_NamesAsLinks(_public_names()))  # type: ignore[arg-type]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for path in sorted(ROOT.glob("examples/*.py")):  # a reader of the site has no checkout
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between files of the repository to their pages; of a file that is not on the site, keep the text."""
    site = page.file.src_uri
    page.meta["search"] = {"boost": 4 if site.startswith("reference/") else 0.2 if site in _LISTS else 1}
    source = Path(_SOURCES.get(site, f"docs/{site}"))

    def led(found: re.Match[str]) -> str:
        path = os.path.normpath(source.parent / found["path"])
        if not (ROOT / path).exists():
            return found[0]  # the strict build reports it
        target = ELSEWHERE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(target) is None:
            return found["text"]
        return f"[{found['text']}]({os.path.relpath(target, Path(site).parent)}{found['anchor'] or ''})"

    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [_LINK.sub(led, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, _LINK.sub(led, markdown[end:])])


def _entries(nav: Any) -> Iterator[str]:
    """The pages that a navigation names."""
    for each in nav if isinstance(nav, list) else nav.values():
        if isinstance(each, str):
            yield each
        else:
            yield from _entries(each)


def _expanded(nav: list[Any], pages: list[str], named: set[str]) -> list[Any]:
    """Patterns become the pages that are named nowhere; sections and pages that are not written are left out."""
    found: list[Any] = []
    for each in nav:
        if isinstance(each, str) and "*" in each:
            found += [page for page in pages if fnmatch(page, each) and page not in named]
        elif isinstance(each, str):
            found += [each] if each in pages else []
        else:
            (title, inner), *_ = each.items()
            if isinstance(inner, str):
                found += [each] if inner in pages else []
            elif section := _expanded(inner, pages, named):
                found.append({title: section})
    return found


def _public_names() -> dict[str, str]:
    """Name as the docs write it -> its full name, of what `mmkernels` and `mmkernels.nn` export."""
    names = {}
    for module in ("mmkernels", "mmkernels.nn"):
        tree = ast.parse(ROOT.joinpath(*module.split("."), "__init__.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names |= {name: f"{module}.{name}" for name in ast.literal_eval(node.value)}
    return names


class _Linker(Treeprocessor):
    """`infonce`, `PackedBatch.split` or `mmkernels.nn.Rotary` in code type, outside headings and links, is a link."""

    def __init__(self, md: Markdown, names: dict[str, str]) -> None:
        super().__init__(md)
        self.names = names

    def run(self, root: ElementTree.Element) -> None:
        for parent in list(root.iter()):
            if re.fullmatch("h[1-6]|a|pre|code", parent.tag):
                continue
            for place, child in enumerate(parent):
                target = self._target(child)
                if target is not None:
                    link = ElementTree.Element("autoref", {"identifier": target, "optional": ""})
                    link.tail, child.tail = child.tail, None
                    parent[place] = link
                    link.append(child)

    def _target(self, element: ElementTree.Element) -> str | None:
        if element.tag != "code" or len(element):
            return None
        text = str(element.text or "").removesuffix("()")
        head, _, rest = text.removeprefix("mmkernels.").removeprefix("nn.").partition(".")
        if head not in self.names or not re.fullmatch(r"[\w.]*", rest):
            return None
        return f"{self.names[head]}.{rest}" if rest else self.names[head]


class _NamesAsLinks(Extension):
    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802  Markdown's name
        md.treeprocessors.register(_Linker(md, self.names), "mmkernels_names", 5)
