"""What every encoder has: a host side that prepares values, and a module over packed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Encoder", "EncoderModule", "text_of"]


class Encoder(Protocol):
    """A frozen dataclass in a recipe: how values of a field become tokens, on the host, and features, in a module."""

    @property
    def reads_text(self) -> bool:
        """Whether its values are texts, which the tokenizer is trained on."""
        ...

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """The tokens of values of a field; None for a sample without it. Raises ValueError for a wrong value."""
        ...

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        """At most how many tokens `prepare` makes of a value; of a medium not yet decoded (`...`) too."""
        ...

    def build(self, facts: Facts) -> EncoderModule: ...


class EncoderModule(nn.Module):
    """Packed tokens of S samples -> features [T, C]."""

    causal = False

    def layout(self, batch: PackedBatch) -> Layout:
        """Where the samples lie in what `forward` returns."""
        return Layout(batch.cu_seqlens, batch.cu_seqlens_host, self.causal)

    def forward(self, batch: PackedBatch) -> Tensor:
        raise NotImplementedError


def text_of(value: Any) -> str:
    """A str, or the first caption of a `Text`."""
    if isinstance(value, str):
        return value
    captions = getattr(value, "captions", None)
    if not captions:
        raise ValueError(f"value: expected a str or a Text with captions, got {value!r}")
    return str(captions[0])


def no_tokens(*trailing: int) -> Piece:
    """Of a sample without the field."""
    return Piece(torch.zeros((0, *trailing), dtype=torch.int64))
