"""Documents of images and texts: their texts as one stream, their images as another.

    document   picture, "a cat", picture, "two dogs"
    text       [BOS] [IMAGE] a cat [EOS] [IMAGE] two dogs [EOS]
    media        -1     0    0  0    0      1     1   1    1      the last image up to here

Source: Alayrac et al. 2022 (Flamingo, arXiv:2204.14198).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.encoders.words import Words
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import BOS, EOS, IMAGE, TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["DocumentImages", "DocumentWords"]


@dataclass(frozen=True)
class DocumentWords:
    """The texts of a `Document`, each with an end token, and an image token where an image stands, which is not to be
    predicted."""

    words: Words
    """How tokens become features, and how many there are at most."""

    @property
    def reads_text(self) -> bool:
        return True

    @property
    def causal(self) -> bool:
        return self.words.causal

    @property
    def max_tokens(self) -> int:
        return self.words.max_tokens

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Tokens [L] int64, cut at the words' `max_tokens`; labels [L], -100 at images."""
        pieces = []
        for value in values:
            ids = torch.tensor([] if value is None else self._ids(value, tokenizer), dtype=torch.int64)
            pieces.append(Piece(ids, torch.where(ids == IMAGE, -100, ids)))
        return pieces

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(self._ids(value, tokenizer))

    def _ids(self, value: Any, tokenizer: TextTokenizer) -> list[int]:
        ids = [BOS]
        for part in _parts(value):
            ids += [*tokenizer.encode(part), EOS] if isinstance(part, str) else [IMAGE]
        return ids[: self.words.max_tokens]

    def build(self, facts: Facts) -> EncoderModule:
        return DocumentWordsEncoder(self, facts)


class DocumentWordsEncoder(EncoderModule):
    def __init__(self, part: DocumentWords, facts: Facts) -> None:
        super().__init__()
        self.words = part.words.build(facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.words(batch)

    def layout(self, batch: PackedBatch) -> Layout:
        """With the number of images up to each token, less one: -1 before the first."""
        layout = self.words.layout(batch)
        before = torch.cat([batch.tokens.new_zeros(1), (batch.tokens == IMAGE).cumsum(0)])  # [T+1]
        media = before[1:] - before[batch.cu_seqlens[:-1].long()][layout.owners()] - 1
        return replace(layout, media=media.int())


@dataclass(frozen=True)
class DocumentImages:
    """The images of a `Document`, each of which sees itself alone."""

    images: Any
    """How one image becomes tokens: an encoder of images, such as `Patches`."""

    @property
    def reads_text(self) -> bool:
        return False

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """The images' media in reading order."""
        images = [[] if value is None else [p for p in _parts(value) if not isinstance(p, str)] for value in values]
        pieces = iter(self.images.prepare([image for each in images for image in each], tokenizer))
        return [Piece([media for _ in each for media in next(pieces).tokens]) for each in images]

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        parts = () if value is None else _parts(value)
        return sum(self.images.length(part, tokenizer) for part in parts if not isinstance(part, str))

    def build(self, facts: Facts) -> EncoderModule:
        return DocumentImagesEncoder(self, facts)


class DocumentImagesEncoder(EncoderModule):
    def __init__(self, part: DocumentImages, facts: Facts) -> None:
        super().__init__()
        self.images = part.images.build(facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.images(batch)

    def layout(self, batch: PackedBatch) -> Layout:
        """With the number of each token's image in its document, from 0."""
        layout = self.images.layout(batch)
        first = batch.cu_seqlens[:-1].long().clamp(max=max(batch.num_tokens - 1, 0))
        media = batch.span_ids - batch.span_ids[first][layout.owners()] if batch.num_tokens else batch.span_ids
        return replace(layout, media=media)


def _parts(value: Any) -> tuple[Any, ...]:
    parts = getattr(value, "parts", None)
    if parts is None:
        raise ValueError(f"value: expected a Document, got {value!r}")
    return tuple(parts)
