"""The site that `make docs` has built: nothing is fetched from elsewhere, links lead somewhere, names are there, and a
page has the structure that a code host shows."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest
from blocks import PAGES, ROOT
from markdown_it import MarkdownIt
from test_reference import entries

pytestmark = pytest.mark.site

SITE = ROOT / "build/site"
# Without the page for what is not found, whose links begin at the root of a host.
HTML = sorted(str(path.relative_to(SITE)) for path in SITE.rglob("*.html") if path.name != "404.html")
_FETCHES = {"script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset")}
_FETCHES |= {"link": ("href",), "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "use": ("href",)}


class Page(HTMLParser):
    """What a page fetches, where its links lead, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in _FETCHES.get(tag, ()):
                self.fetched.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")
            elif name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value or "")


@cache
def read(name: str) -> Page:
    return Page((SITE / name).read_text(encoding="utf-8"))


def from_elsewhere(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"\s*(?:https?:)?//", address)]


def broken(name: str, links: list[str]) -> list[str]:
    """Links of a page that lead to no file, or to no anchor in it; those to other hosts that have no proper address."""
    found = []
    for link in links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            if parts.scheme not in ("https", "http") or "." not in parts.netloc or " " in link:
                found.append(link)
            continue
        target = (SITE / name).parent / unquote(parts.path) if parts.path else SITE / name
        is_page = target.is_file() and target.suffix == ".html"
        anchors = read(str(target.resolve().relative_to(SITE.resolve()))).anchors if is_page else set()
        if not target.exists() or (is_page and parts.fragment and unquote(parts.fragment) not in anchors):
            found.append(link)
    return found


def test_the_site_is_built() -> None:
    assert len(HTML) > 40, "make docs builds it"


@pytest.mark.parametrize("name", HTML)
def test_nothing_comes_from_elsewhere(name: str) -> None:
    assert from_elsewhere(read(name).fetched) == []
    text = (SITE / name).read_text(encoding="utf-8")
    assert 'class="mermaid"' not in text, "the theme fetches what draws these"


def test_no_style_sheet_or_picture_fetches_from_elsewhere() -> None:
    for path in [*SITE.rglob("*.css"), *SITE.rglob("*.svg")]:
        text = path.read_text(encoding="utf-8")
        found = re.findall(r"""(?:url\(|@import|href=)\s*["']?((?:https?:)?//[^"')\s]+)""", text)
        assert found == [], path


@pytest.mark.parametrize("name", HTML)
def test_links_lead_somewhere(name: str) -> None:
    assert broken(name, read(name).links) == []


def test_what_is_broken_is_seen() -> None:
    wrong = ["no-page.html", "#no-anchor", "concepts.html#no-anchor", "https://", "http://nohost/x", "file:///etc"]
    assert broken("index.html", [*wrong, "concepts.html", "#install", "https://example.org/x#y"]) == wrong
    page = Page(
        '<img src="//host/x.png"><script src="https://host/x.js"></script><link href="a.css"><a href="https://h">'
    )
    assert from_elsewhere(page.fetched) == ["//host/x.png", "https://host/x.js"]


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/reference/*.md")), ids=lambda path: path.stem)
def test_every_name_is_on_its_page_and_can_be_searched(path: Path) -> None:
    name = f"reference/{path.stem}.html"
    wanted = set(entries(path.read_text(encoding="utf-8")))
    index = json.loads((SITE / "search/search_index.json").read_text(encoding="utf-8"))
    found = {entry["location"].partition("#")[2] for entry in index["docs"] if entry["location"].startswith(name)}
    assert wanted - read(name).anchors == set()
    assert wanted - found == set()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_reads_as_on_a_code_host(page: str) -> None:
    """Lists, tables, code and headings of CommonMark and of the site's Markdown are as many."""
    text = (ROOT / page).read_text(encoding="utf-8")
    theirs = MarkdownIt("commonmark").enable("table").render(text)
    extensions = ["attr_list", "md_in_html", "tables", "sane_lists", "pymdownx.superfences"]
    ours = markdown.markdown(text, extensions=extensions)
    counts = [Counter(re.findall(r"<(li|ul|ol|pre|table|tr|th|td|img|a|h\d)\b", html)) for html in (theirs, ours)]
    assert counts[0] == counts[1]
