"""Words without a vocabulary: a word is its row of one table plus the mean of its trigrams' rows of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule, no_tokens, text_of
from mmkernels.pretrain.hashing import word_hashes
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["HashedWords"]

_GRAMS = 16  # trigrams of a word that count


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
        self.words, self.position = nn.Embedding(part.words, width), nn.Embedding(part.max_words, width)
        self.grams = nn.Embedding(part.grams, width)
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.normal_(self.grams.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = Blocks(part.layers, facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        word, grams = batch.tokens[:, 0], batch.tokens[:, 1:]
        mean = F.embedding_bag(grams, self.grams.weight, mode="mean", padding_idx=0)  # of the trigrams there are
        x = self.words(word) + mean + self.position(batch.position_ids)
        return self.blocks(x, self.layout(batch).mask())
