"""Text without a vocabulary file: words and their character trigrams, hashed into two embedding tables.

A word's embedding is `words[word_id] + mean(grams[gram_ids])`: frequent words get their own row, rare and unseen ones
share their parts ("astronauts" shares most trigrams with "astronaut"). Works in any script.
"""

from __future__ import annotations

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

_SIGNS = frozenset("!?#*&%@/+")  # punctuation that carries meaning in captions; the rest only separates words
_CACHE_WORDS = 200_000


@dataclass(frozen=True)
class TextBatch:
    """Packed word tokens of B captions, T in all, G trigrams in all.

    `F.embedding_bag(gram_ids, table, gram_offsets, mode="mean")` gives one row per word token.
    """

    word_ids: Tensor  # int64 [T]
    gram_ids: Tensor  # int64 [G]
    gram_offsets: Tensor  # int64 [T]: where each word's trigrams start
    position_ids: Tensor  # int64 [T]: position of the word in its caption
    cu_seqlens: Tensor  # int32 [B+1]
    max_seqlen: int

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def to(self, device: torch.device | str) -> TextBatch:
        return replace(
            self,
            word_ids=self.word_ids.to(device),
            gram_ids=self.gram_ids.to(device),
            gram_offsets=self.gram_offsets.to(device),
            position_ids=self.position_ids.to(device),
            cu_seqlens=self.cu_seqlens.to(device),
        )

    def split(self, size: int) -> list[TextBatch]:
        """Batches of `size` captions, the last one possibly smaller; `GradCache` calls this."""
        return [self.slice(i, min(i + size, len(self))) for i in range(0, max(len(self), 1), size)]

    def slice(self, start: int, stop: int) -> TextBatch:
        """Captions start..stop as a batch."""
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start, stop: expected 0 <= start <= stop <= {len(self)}, got {start}, {stop}")
        bounds = self.cu_seqlens[start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        gram_first = int(self.gram_offsets[first]) if first < len(self.gram_offsets) else len(self.gram_ids)
        gram_last = int(self.gram_offsets[last]) if last < len(self.gram_offsets) else len(self.gram_ids)
        lengths = bounds.diff()
        return TextBatch(
            self.word_ids[first:last],
            self.gram_ids[gram_first:gram_last],
            self.gram_offsets[first:last] - gram_first,
            self.position_ids[first:last],
            bounds - bounds[0],
            int(lengths.max()) if len(lengths) else 0,
        )


class Tokenizer:
    """Captions to `TextBatch`.

    Ids are CRC-32 of the UTF-8 bytes modulo the table size, so they are the same in every process and on every
    machine. Id 0 of either table means a caption without words.

    Args:
        word_buckets, gram_buckets: rows of the two tables.
        max_words: maximum word tokens per caption; longer captions are truncated.
    """

    def __init__(self, word_buckets: int = 4096, gram_buckets: int = 8192, max_words: int = 16) -> None:
        for name, value in (("word_buckets", word_buckets), ("gram_buckets", gram_buckets)):
            if value < 2:
                raise ValueError(f"{name}: expected at least 2, got {value}")
        if max_words < 1:
            raise ValueError(f"max_words: expected at least 1, got {max_words}")
        self.word_buckets, self.gram_buckets, self.max_words = word_buckets, gram_buckets, max_words
        self._cache: dict[str, list[tuple[int, list[int]]]] = {}

    def __call__(self, captions: Sequence[str]) -> TextBatch:
        word_ids: list[int] = []
        gram_ids: list[int] = []
        gram_offsets: list[int] = []
        lengths: list[int] = []
        for caption in captions:
            words = self._words(caption)
            lengths.append(len(words))
            for word_id, grams in words:
                word_ids.append(word_id)
                gram_offsets.append(len(gram_ids))
                gram_ids.extend(grams)
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(len(word_ids)) - np.repeat(cu_seqlens[:-1], lengths)
        return TextBatch(
            torch.tensor(word_ids, dtype=torch.int64),
            torch.tensor(gram_ids, dtype=torch.int64),
            torch.tensor(gram_offsets, dtype=torch.int64),
            torch.from_numpy(positions.astype(np.int64)),
            torch.from_numpy(cu_seqlens),
            max(lengths, default=0),
        )

    def _words(self, caption: str) -> list[tuple[int, list[int]]]:
        words: list[tuple[int, list[int]]] = []
        for chunk in caption.split():
            if chunk not in self._cache:
                if len(self._cache) >= _CACHE_WORDS:
                    self._cache.clear()
                self._cache[chunk] = [self._ids(word) for word in split_words(chunk)]
            words += self._cache[chunk]
            if len(words) >= self.max_words:
                break
        return words[: self.max_words] or [(0, [0])]

    def _ids(self, word: str) -> tuple[int, list[int]]:
        grams = trigrams(word)
        return _bucket(word, self.word_buckets), [_bucket(gram, self.gram_buckets) for gram in grams]


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
