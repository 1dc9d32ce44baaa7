"""Subwords of the run's tokenizer, with rotary positions: for texts that are read, and for texts that are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule, text_of
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import BOS, EOS, TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Words"]


@dataclass(frozen=True)
class Words:
    """Byte-pair tokens between a begin and an end token."""

    layers: int = 2
    """Transformer blocks."""
    causal: bool = False
    """A token sees those before it alone: a language model."""
    max_tokens: int = 128
    """Most tokens of a text; longer ones are cut."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens: expected at least 2, got {self.max_tokens}")

    @property
    def reads_text(self) -> bool:
        return True

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Tokens [L] int64, which are their own labels."""
        pieces = []
        for value in values:
            ids = torch.tensor([] if value is None else self._ids(value, tokenizer), dtype=torch.int64)
            pieces.append(Piece(ids, ids))
        return pieces

    def _ids(self, value: Any, tokenizer: TextTokenizer) -> list[int]:
        return [BOS, *tokenizer.encode(text_of(value))[: self.max_tokens - 2], EOS]

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(self._ids(value, tokenizer))

    def build(self, facts: Facts) -> EncoderModule:
        return WordsEncoder(self, facts)


class WordsEncoder(EncoderModule):
    def __init__(self, part: Words, facts: Facts) -> None:
        super().__init__()
        self.causal = part.causal
        self.table = nn.Embedding(facts.vocabulary, facts.shape.width)
        nn.init.normal_(self.table.weight, std=0.02 if part.layers == 0 else 0.05)
        self.blocks = Blocks(part.layers, facts, rotary=True)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.blocks(self.table(batch.tokens), self.layout(batch).mask(), batch.position_ids)

    def layout(self, batch: PackedBatch) -> Layout:
        return Layout(batch.cu_seqlens, batch.cu_seqlens_host, self.causal)
