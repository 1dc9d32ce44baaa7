"""Words and their character trigrams, hashed into the rows of two embedding tables: text without a vocabulary.

Frequent words get a row of their own, rare and unseen ones share their parts ("astronauts" shares most trigrams with
"astronaut"). Works in any script. Ids are CRC-32 of the UTF-8 bytes modulo the table size, the same in every process
and on every machine.
"""

from __future__ import annotations

import unicodedata
import zlib
from functools import lru_cache

__all__ = ["split_words", "trigrams", "word_hashes"]

_SIGNS = frozenset("!?#*&%@/+")  # punctuation that carries meaning in captions; the rest only separates words


def word_hashes(text: str, words: int, grams: int, max_words: int) -> list[tuple[int, tuple[int, ...]]]:
    """Of each word of a text, its row among `words` and its trigrams' rows among `grams`.

    Row 0 of either table is never a word's; it stands for a text without words, which gives one such word.

    Args:
        text: any Unicode text.
        words, grams: rows of the tables.
        max_words: later words are left out.
    """
    found: list[tuple[int, tuple[int, ...]]] = []
    for chunk in text.split():
        found += _chunk_hashes(chunk, words, grams)
        if len(found) >= max_words:
            break
    return found[:max_words] or [(0, (0,))]


@lru_cache(200_000)
def _chunk_hashes(chunk: str, words: int, grams: int) -> list[tuple[int, tuple[int, ...]]]:
    split = split_words(chunk)
    return [(_bucket(word, words), tuple(_bucket(gram, grams) for gram in trigrams(word))) for word in split]


def split_words(text: str) -> list[str]:
    """Case-folded words: runs of letters, marks and digits; each symbol is a word, apostrophes are dropped."""
    words: list[str] = []
    run = ""
    for char in unicodedata.normalize("NFKC", text).casefold():
        kind = unicodedata.category(char)[0]
        if kind in "LMN":
            run += char
        elif char not in "'’":
            if run:
                words.append(run)
            run = ""
            if kind == "S" or char in _SIGNS:
                words.append(char)
    return [*words, run] if run else words


def trigrams(word: str) -> list[str]:
    """The character trigrams of `<word>`; the brackets mark its ends."""
    marked = f"<{word}>"
    return [marked[i : i + 3] for i in range(max(1, len(marked) - 2))]


def _bucket(text: str, buckets: int) -> int:
    return 1 + zlib.crc32(text.encode("utf-8")) % (buckets - 1)
