"""Texts compared and judged: normal forms, near-duplicates by MinHash, boilerplate, scripts."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from html.entities import name2codepoint

import numpy as np
from datasketch import MinHash, MinHashLSH

__all__ = ["LEAST", "Texts", "alike", "boilerplate", "expected_script", "fits", "near_texts", "normalised", "script_of"]

JACCARD = 0.8  # of near-duplicates' shingles
SHINGLE = 5  # characters
LEAST = 60  # characters of a normalised text; in shorter ones a single word makes the difference
_PERMUTATIONS = 128

Texts = Mapping[str, str]  # field -> all of its text in a sample, in its normal form


# Unicode's Default_Ignorable_Code_Point, and the marks of ruby; the tags of a flag say whose it is.
_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007f]+)|[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff]"
)
_BLANK = "\u2800\ufffc"  # symbols by their category: no dots of Braille, and the place of an object


def normalised(text: str) -> str:
    """NFKC, case-folded, without invisible characters, punctuation as spaces, single spaces: texts that differ only
    there are the same."""
    folded = unicodedata.normalize("NFKC", _visible(text)).casefold()
    words = "".join(char if _counts(char) else " " for char in folded).split()
    return " ".join(word for word in words if not all(map(_joins, word)))


def _visible(text: str) -> str:
    return text if text.isascii() else _INVISIBLE.sub(lambda found: found[1] or "", text)


@cache
def _counts(char: str) -> bool:
    """Letters, marks, digits and symbols, among them emoji, and the tags of a flag."""
    return (unicodedata.category(char)[0] in "LMNS" and char not in _BLANK) or "\U000e0020" <= char <= "\U000e007f"


@cache
def _joins(char: str) -> bool:
    """A mark that says nothing without the letter that it belongs to."""
    return unicodedata.category(char) in ("Mn", "Mc")


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


_SUFFIX = (
    r"\.(?:jpe?g|jpe|jfif|jxl|png|gif|webp|avif|bmp|tiff?|hei[cf]|svg|ico|dng|cr2|nef|psd"
    r"|mp4|mov|avi|mkv|webm|wav|mp3|flac)"
)
# Words of sentences, and words after which a sentence may name a file: `a screenshot of image.png`.
_SENTENCE = r"is|are|was|were|has|have|shows?|see|seen|open|opens|click|view|please|this|that|it|i|you|we|they"
_BEFORE = (
    r"the|an?|of|in|on|from|to|as|by|with|for|and|or|file|named|called|titled|into|onto|using"
    r"|de|des|du|le|la|les|el|del|di|da|von|der|die|das|dem"
)
_SPACED = (
    rf"(?=[^\n]{{1,120}}$)(?!.*(?:\b(?:{_SENTENCE})\b|[.!?:;,]\s|://))(?!(?:.*\s)?(?:{_BEFORE})\s+\S+$)\S.*{_SUFFIX}"
)
_TIME = r"\d{4}-\d\d-\d\d(?:\s+at)?\s+[\d.:]+(?:\s*[ap]m)?"
_PATTERNS = (
    ("a file name", rf"\S+(?: ?\(\d+\))?{_SUFFIX}"),
    ("a file name", r"(?:img|dsc[nf]?|pxl|mvi|p|screenshot)[-_ ]?\d{3}[\d_\-: ]*(?:wa\d+)?|(?:19|20)\d{6}[-_]\d{4,9}"),
    ("a file name", rf"(?:whatsapp (?:image|video)|screen ?shot) {_TIME}"),
    ("a link", r".*(?:https?://|\bwww\.)\S.*"),
    ("a file name", _SPACED),
    ("markup", rf".*(?:<[a-z/!][^<>]*>|&(?:{'|'.join(name2codepoint)}|apos|#\d+|#x[\da-f]+);).*"),
    (
        "a phrase of picture agencies",
        r".*\b(?:stock (?:photo|image|picture|illustration|vector)s?|royalty[- ]free)\b.*",
    ),
    ("a phrase of picture agencies", r".*\b(?:shutterstock|getty ?images|istock|alamy|dreamstime|depositphotos)\b.*"),
    ("a phrase of web pages", r".*(?:click (?:here|to enlarge)|all rights reserved|©|\bcopyright \d{4}\b).*"),
    ("nothing said", r"(?:an? |the )?(?:image|picture|photo|photograph|figure|video|audio)(?: of| \d+)?\W*"),
    (
        "nothing said",
        r"(?:untitled(?:[-_ ]?\d+)?|unnamed|thumbnail|alt text|(?:no|image) description(?: available)?)\W*",
    ),
    ("nothing said", r"(?:no caption|caption|n/a|null|none|nan|undefined|placeholder|lorem ipsum.*)\W*"),
)
_BOILERPLATE = tuple((what, re.compile(pattern, re.IGNORECASE | re.DOTALL)) for what, pattern in _PATTERNS)
_OPENING, _CLOSING = "\"'`*“”„‘’‚«»‹›「『([{", "\"'`*“”‘’«»‹›」』)]}"


def boilerplate(text: str) -> str:
    """What a caption is instead of a caption, in quotes or brackets or not; empty if it may be one."""
    text = _visible(text).strip()
    said = [text]
    if text and text[0] in _OPENING and text[-1] in _CLOSING:
        said.append(text.lstrip(_OPENING).rstrip(_CLOSING).strip())
    return next((what for what, pattern in _BOILERPLATE if any(map(pattern.fullmatch, said))), "")


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
    """The script that 95% of a field's texts are in; empty if there is none. Kana, where they are in Kana and in Han,
    as Japanese is."""
    found = Counter({script: count for script, count in scripts.items() if script})
    if found["Kana"] > 0.05 * scripts.total():
        found["Kana"] += found["Han"]
    least = np.ceil(0.95 * scripts.total())
    return next((script for script, count in found.most_common(1) if count >= least), "")


def fits(script: str, expected: str) -> bool:
    """Whether a text of a script is in order where another one is expected: names in Han among Kana are."""
    return script == expected or (script, expected) == ("Han", "Kana")
