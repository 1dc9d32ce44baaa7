"""Word vectors made once, from which words of the training texts occur together; nothing of them learns by gradients.

    those of `cooccurrence.py`, times a / (a + share of the token)

Source: of the weights, Arora et al. 2017, A Simple but Tough-to-Beat Baseline for Sentence Embeddings.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.cooccurrence import together, vectors_of
from mmkernels.pretrain.encoders.base import EncoderModule, no_tokens, text_of
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["WordVectors"]

_WEIGHT = 1e-3  # a


@dataclass(frozen=True)
class WordVectors:
    """The frozen vectors of a text's tokens, as many numbers as the model is wide. With the stream's project="none",
    the mean over them is a target that the other stream learns to reach."""

    max_tokens: int = 64
    """Most tokens of a text; longer ones are cut."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {self.max_tokens}")

    @property
    def reads_text(self) -> bool:
        return True

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Tokens [L] int64."""
        return [no_tokens() if value is None else Piece(torch.tensor(self._ids(value, tokenizer))) for value in values]

    def _ids(self, value: Any, tokenizer: TextTokenizer) -> list[int]:
        return list(tokenizer.encode(text_of(value))[: self.max_tokens])

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(self._ids(value, tokenizer))

    def build(self, facts: Facts) -> EncoderModule:
        return WordVectorsEncoder(facts)


class WordVectorsEncoder(EncoderModule):
    table: Tensor

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        self.seed = facts.seed
        self.register_buffer("table", torch.zeros(facts.vocabulary, facts.shape.width))

    def learn(self, texts: Iterable[str], tokenizer: TextTokenizer) -> None:
        """Make the vectors. `Trainer` calls it before the first step, and a checkpoint keeps what it made.

        Args:
            texts: of the training data; tokens of one text occur together.
            tokenizer: of the run.
        """
        ids = [sorted(set(tokenizer.encode(text))) for text in texts]
        vocabulary, size = self.table.shape
        vectors = vectors_of(together(ids, vocabulary), size, self.seed)
        every = torch.tensor(list(chain.from_iterable(ids)), dtype=torch.int64)
        shares = torch.bincount(every, minlength=vocabulary).double()
        weight = _WEIGHT / (_WEIGHT + shares / shares.sum().clamp(min=1))
        self.table.copy_(vectors * weight[:, None])

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.table[batch.tokens]
