"""Texts compared and judged: normal forms, near-duplicates by MinHash, boilerplate, scripts."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
from datasketch import MinHash, MinHashLSH

__all__ = ["LEAST", "Texts", "alike", "boilerplate", "expected_script", "near_texts", "normalised", "script_of"]

JACCARD = 0.8  # of near-duplicates' shingles
SHINGLE = 5  # characters
LEAST = 60  # characters of a normalised text; in shorter ones a single word makes the difference
_PERMUTATIONS = 128

Texts = Mapping[str, str]  # field -> all of its text in a sample, in its normal form


def normalised(text: str) -> str:
    """NFKC, case-folded, punctuation as spaces, single spaces: texts that differ only there are the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(char if _counts(char) else " " for char in folded).split())


@cache
def _counts(char: str) -> bool:
    """Letters, marks, digits and symbols, among them emoji."""
    return unicodedata.category(char)[0] in "LMNS"


def alike(a: Texts, b: Texts) -> bool:
    """Whether two samples' texts are near-duplicates, field by field: equal, or both long enough, with the same
    numbers, and with a Jaccard similarity of their shingles of at least JACCARD."""
    return a.keys() == b.keys() and all(_alike(text, b[field]) for field, text in a.items())


def _alike(a: str, b: str) -> bool:
    if a == b:
        return True
    if min(len(a), len(b)) < LEAST or _numbers(a) != _numbers(b):
        return False
    first, second = _shingles(a), _shingles(b)
    return len(first & second) >= JACCARD * len(first | second)


def near_texts(samples: Sequence[Texts]) -> list[tuple[int, int]]:
    """The pairs i < j of different texts that are `alike`, found by MinHash, then compared."""
    index = MinHashLSH(JACCARD - 0.1, _PERMUTATIONS)  # a lower bar for candidates: the estimate is noisy
    empty = MinHash(_PERMUTATIONS, hashfunc=zlib.crc32)
    pairs = []
    for j, sample in enumerate(samples):
        if max(map(len, sample.values()), default=0) < LEAST:
            continue
        shingles = sorted(f"{field} {each}" for field, text in sample.items() for each in _shingles(text))
        signature = empty.copy()
        signature.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in shingles])
        pairs += [(i, j) for i in sorted(index.query(signature)) if alike(samples[i], sample)]
        index.insert(j, signature)
    return pairs


def _shingles(text: str) -> set[str]:
    return {text[i : i + SHINGLE] for i in range(max(1, len(text) - SHINGLE + 1))}


def _numbers(text: str) -> Counter[str]:
    return Counter(re.findall(r"\d+", text))


_SUFFIX = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg)"
_PATTERNS = (
    ("a file name", rf"[^\s/\\]+(?: ?\(\d+\))?{_SUFFIX}|(?:img|dsc[nf]?|pxl|mvi|p|screenshot)[-_ ]?\d{{3}}[\d_\-: ]*"),
    ("a file name", rf"\S*[/\\]\S+{_SUFFIX}"),
    ("a link", r".*(?:https?://|\bwww\.)\S.*"),
    ("markup", r".*(?:<[a-z/!][^<>]*>|&(?:amp|nbsp|lt|gt|quot|#\d+);).*"),
    (
        "a phrase of picture agencies",
        r".*\b(?:stock (?:photo|image|picture|illustration|vector)s?|royalty[- ]free)\b.*",
    ),
    ("a phrase of picture agencies", r".*\b(?:shutterstock|getty ?images|istock|alamy|dreamstime|depositphotos)\b.*"),
    ("a phrase of web pages", r".*(?:click (?:here|to enlarge)|all rights reserved|©|\bcopyright \d{4}\b).*"),
    ("nothing said", r"(?:an? |the )?(?:image|picture|photo|photograph|figure|video|audio)(?: of| \d+)?\W*"),
    ("nothing said", r"(?:untitled|no caption|caption|n/a|null|none|nan|undefined|placeholder|lorem ipsum.*)\W*"),
)
_BOILERPLATE = tuple((what, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for what, pattern in _PATTERNS)


def boilerplate(text: str) -> str:
    """What a caption is instead of a caption; empty if it may be one."""
    return next((what for what, pattern in _BOILERPLATE if pattern.fullmatch(text.strip())), "")


_SCRIPTS = {"CJK": "Han", "HIRAGANA": "Kana", "KATAKANA": "Kana"}


def script_of(text: str, letters: int = 1) -> str:
    """The script of most letters, by Unicode's names of them; empty with fewer letters than this."""
    counts = Counter(script for char in text if (script := _script(char)))
    return max(counts, key=lambda script: (counts[script], script)) if counts.total() >= letters else ""


@cache
def _script(char: str) -> str:
    if unicodedata.category(char)[0] != "L" or unicodedata.category(char) == "Lm":
        return ""
    first = unicodedata.name(char, "").replace("FULLWIDTH ", "").replace("HALFWIDTH ", "").split(" ")[0]
    return _SCRIPTS.get(first, first.capitalize())


def expected_script(scripts: Counter[str]) -> str:
    """The script that 95% of a field's texts are in; empty if there is none."""
    total = sum(scripts.values())
    return next((script for script, count in scripts.most_common(1) if count >= np.ceil(0.95 * total) and script), "")
