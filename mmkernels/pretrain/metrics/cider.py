"""CIDEr-D: how much a caption shares with what people say of the same sample and seldom of others.

    CIDEr-D(c, S) = 10 / (4 |S|) sum_n sum_{r in S} exp(-(l_c - l_r)^2 / (2 6^2)) <min(c_n, r_n), r_n> / (|c_n| |r_n|)

c_n, r_n: the n-grams of a text, n = 1 ... 4, each with its count times idf, log(samples / samples in one of whose
references it occurs); l: words of a text, or characters where words are not told apart by spaces.

Source: Vedantam et al. 2015 (arXiv:1411.5726), as in the evaluation of COCO captions.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["Cider", "words"]

_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # words by which lengths may differ


# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Kana and Han.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff"
_UNSPACED += "\U00020000-\U0003ffff"
_PIECES = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Those between spaces, case-folded, without punctuation at their ends. Of scripts that have no spaces between
    words, each character, with the marks above and below it."""
    found: list[str] = []
    for each in unicodedata.normalize("NFKC", text).casefold().split():
        begins = True
        for piece in _PIECES.findall(each):
            if not begins and unicodedata.category(piece[0]).startswith("M"):
                found[-1] += piece
            elif bare := _bare(piece):
                found.append(bare)
                begins = False
    return found


def _bare(word: str) -> str:
    begin, end = 0, len(word)
    while begin < end and unicodedata.category(word[begin]).startswith("P"):
        begin += 1
    while begin < end and unicodedata.category(word[end - 1]).startswith("P"):
        end -= 1
    return word[begin:end]


class Cider:
    """Scores against the references of some samples, which also say how frequent an n-gram is.

    Args:
        references: of N samples, at least one each. A single sample gives 0 to every caption: all its n-grams occur in
            every sample.
    """

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        for i, each in enumerate(references):
            if isinstance(each, str) or not each:
                raise ValueError(f"references[{i}]: expected a list of at least one text, got {each!r}")
        counted = [[_grams(text) for text in each] for each in references]
        within = Counter(gram for each in counted for gram in {gram for one in each for gram in one})
        self._seldom = {gram: math.log(len(counted) / count) for gram, count in within.items()}
        self._unseen = math.log(len(counted)) if counted else 0.0
        self._owners = np.repeat(np.arange(len(counted)), [len(each) for each in counted])  # [R]
        self._shares = 1 / np.array([len(each) for each in counted], np.float64)  # [N]
        self._lengths = np.array([_length(text) for each in references for text in each], np.float64)  # [R]
        self._norms = np.zeros((_LONGEST, len(self._owners)))
        found: dict[tuple[str, ...], list[tuple[int, float]]] = defaultdict(list)
        for row, one in enumerate(grams for each in counted for grams in each):
            for gram, weight in self._weights(one):
                found[gram].append((row, weight))
                self._norms[len(gram) - 1, row] += weight**2
        self._norms = np.sqrt(self._norms)
        self._found = {g: (np.array([r for r, _ in at]), np.array([w for _, w in at])) for g, at in found.items()}
        self._memory: dict[str, np.ndarray] = {}

    def each(self, texts: Sequence[str]) -> np.ndarray:
        """float64 [N]: of each sample's own text."""
        if len(texts) != len(self._shares):
            raise ValueError(f"texts: expected {len(self._shares)}, one for each sample, got {len(texts)}")
        return np.array([self.everywhere(text)[i] for i, text in enumerate(texts)], np.float64)

    def everywhere(self, text: str) -> np.ndarray:
        """float64 [N]: of one text for every sample."""
        if text not in self._memory:
            self._memory[text] = self._scores(text)
        return self._memory[text]

    def _scores(self, text: str) -> np.ndarray:
        shared, squares = np.zeros_like(self._norms), np.zeros((_LONGEST, 1))
        for gram, weight in self._weights(_grams(text)):
            n = len(gram) - 1
            squares[n] += weight**2
            if gram in self._found:
                rows, theirs = self._found[gram]
                shared[n, rows] += np.minimum(weight, theirs) * theirs
        scale = np.sqrt(squares) * self._norms
        cosine = np.divide(shared, scale, out=np.zeros_like(shared), where=scale > 0).sum(0)  # [R]
        near = np.exp(-((self._lengths - _length(text)) ** 2) / (2 * _SIGMA**2))
        of_sample = np.bincount(self._owners, cosine * near, minlength=len(self._shares))
        return np.asarray(10 / _LONGEST * of_sample * self._shares)

    def _weights(self, grams: Counter[tuple[str, ...]]) -> Iterator[tuple[tuple[str, ...], float]]:
        for gram, count in grams.items():
            yield gram, count * self._seldom.get(gram, self._unseen)


def _grams(text: str) -> Counter[tuple[str, ...]]:
    found = words(text)
    return Counter(tuple(found[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(found) - n + 1))


def _length(text: str) -> int:
    """Of pairs of words, as in the evaluation of COCO captions: a text of one word is as long as one of none."""
    return max(len(words(text)) - 1, 0)
