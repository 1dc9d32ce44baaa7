"""Words without a vocabulary: a word is its row of one table plus the mean of its trigrams' rows of another.

The first may begin as word vectors, see `cooccurrence.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.cooccurrence import together, vectors_of
from mmkernels.pretrain.encoders.base import EncoderModule, no_tokens, text_of
from mmkernels.pretrain.hashing import word_hashes
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["HashedWords"]

_GRAMS = 16  # trigrams of a word that count
_STD = 0.5  # of both tables
_LONGEST = 32  # words of a training text whose company counts


@dataclass(frozen=True)
class HashedWords:
    """Frequent words get a row of their own, rare and unseen ones share their parts. For any script, and for inputs
    alone: hashes cannot be predicted (`Words` can)."""

    layers: int = 2
    """Transformer blocks."""
    words: int = 4096
    """Rows of the word table."""
    grams: int = 8192
    """Rows of the trigram table."""
    max_words: int = 16
    """Most words of a text; longer ones are cut."""
    vectors: bool = False
    """The word table begins as vectors made of which words of the training texts occur together, so that words alike
    are near each other before the first step. A word that is always alone begins at random, as all do with False, and
    one that does not occur as zeros."""

    def __post_init__(self) -> None:
        for name in ("words", "grams"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: expected at least 2, got {getattr(self, name)}")
        if self.max_words < 1:
            raise ValueError(f"max_words: expected at least 1, got {self.max_words}")

    @property
    def reads_text(self) -> bool:
        return False  # needs no trained tokenizer

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Tokens [L, 1 + 16] int64: the word's row, then its trigrams' rows, 0 for none."""
        pieces = []
        for value in values:
            if value is None:
                pieces.append(no_tokens(1 + _GRAMS))
                continue
            rows = word_hashes(text_of(value), self.words, self.grams, self.max_words)
            table = torch.zeros((len(rows), 1 + _GRAMS), dtype=torch.int64)
            for row, (word, grams) in zip(table, rows, strict=True):
                kept = [word, *grams[:_GRAMS]]
                row[: len(kept)] = torch.tensor(kept)
            pieces.append(Piece(table))
        return pieces

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(word_hashes(text_of(value), self.words, self.grams, self.max_words))

    def build(self, facts: Facts) -> EncoderModule:
        return HashedWordsEncoder(self, facts)


class HashedWordsEncoder(EncoderModule):
    def __init__(self, part: HashedWords, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.part, self.seed = part, facts.seed
        self.words, self.position = nn.Embedding(part.words, width), nn.Embedding(part.max_words, width)
        self.grams = nn.Embedding(part.grams, width)
        nn.init.normal_(self.words.weight, std=_STD)
        nn.init.normal_(self.grams.weight, std=_STD)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = Blocks(part.layers, facts)

    def learn(self, texts: Iterable[str], tokenizer: TextTokenizer) -> None:
        """Make the word vectors that the table begins with, if any. `Trainer` calls it before the first step.

        Args:
            texts: of the training data; words of one text occur together.
            tokenizer: of the run; not used.
        """
        if not self.part.vectors:
            return
        rows, width = self.words.weight.shape
        ids = [sorted({row for row, _ in word_hashes(text, rows, 2, _LONGEST)}) for text in texts]
        vectors = vectors_of(together(ids, rows), width, self.seed)
        # As long as random rows, and turned: their first channels would be the largest.
        length = vectors.norm(dim=1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed % 2**63)
        turn = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
        vectors = vectors / length * _STD * width**0.5 @ turn
        occurs = torch.zeros((rows, 1), dtype=torch.bool)
        occurs[list(chain.from_iterable(ids))] = True
        with torch.no_grad():
            random = torch.where(occurs, self.words.weight.cpu(), 0.0)
            self.words.weight.copy_(torch.where(length > 1e-6, vectors, random))

    def forward(self, batch: PackedBatch) -> Tensor:
        word, grams = batch.tokens[:, 0], batch.tokens[:, 1:]
        mean = F.embedding_bag(grams, self.grams.weight, mode="mean", padding_idx=0)  # of the trigrams there are
        x = self.words(word) + mean + self.position(batch.position_ids)
        return self.blocks(x, self.layout(batch).mask())
