"""Images as patches of any grid: a convolutional or linear stem, then transformer blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, Media, Modality, PackedBatch, patchify, unpatchify
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.encoders.visible import visible_of
from mmkernels.pretrain.layers import Blocks, convolutions
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Patches"]


@dataclass(frozen=True)
class Patches:
    """One token per patch, at most `size` pixels a side."""

    layers: int = 2
    """Transformer blocks."""
    size: int = 32
    """Side of the images that the model sees, in pixels."""
    patch: int = 8
    """Side of a patch, in pixels."""
    stem: Literal["convolutions", "linear"] = "convolutions"
    """Three strided convolutions (whose patches are 8 pixels), or one linear layer over each patch."""

    def __post_init__(self) -> None:
        if self.patch < 1 or self.size % self.patch:
            raise ValueError(f"size: expected a multiple of {self.patch} pixels, got {self.size}")
        if self.stem == "convolutions" and self.patch != 8:
            raise ValueError(f"patch: expected 8 pixels with convolutions, got {self.patch}")

    @property
    def reads_text(self) -> bool:
        return False

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def places(self) -> int:
        """Patches of an image."""
        return self.grid**2

    @property
    def values(self) -> int:
        """Numbers of a patch."""
        return 3 * self.patch**2

    @property
    def may_hide(self) -> bool:
        """Whether a token depends on its own patch alone before the blocks, so that hidden patches can be left out."""
        return self.stem == "linear"

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Images uint8 [H, W, 3 or 4], or tensors [3, size, size] in [-1, 1] that a view has made of them."""
        present = [value for value in values if value is not None]
        if not present:
            return [Piece([]) for _ in values]
        raw = [image for image in present if not isinstance(image, Tensor)]
        plain = iter(plain_images(raw, self.size) if raw else ())
        pixels = torch.stack([image if isinstance(image, Tensor) else next(plain) for image in present])
        patches, _ = patchify([pixels], self.patch)  # images as frames
        each = iter(patches.split(self.grid**2))
        grid = (1, self.grid, self.grid)
        return [Piece([] if v is None else [Media(Modality.IMAGE, next(each), grid)]) for v in values]

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else self.grid**2

    def build(self, facts: Facts) -> EncoderModule:
        return PatchesEncoder(self, facts)


class PatchesEncoder(EncoderModule):
    def __init__(self, part: Patches, facts: Facts) -> None:
        super().__init__()
        self.part, width = part, facts.shape.width
        convolutional = part.stem == "convolutions"
        self.stem = convolutions(width) if convolutional else nn.Linear(part.values, width)
        # On the scale of the tokens: otherwise the mean over tokens would hardly depend on position.
        self.position = nn.Parameter(0.5 * torch.randn(part.grid**2, width))
        self.blocks = Blocks(part.layers, facts)

    def embed(self, patches: Tensor, places: Tensor | None = None) -> Tensor:
        """Patches [V, 3 P P] -> tokens [V, C]: of whole images, or with a linear stem of the given places [V]."""
        part = self.part
        if part.stem == "convolutions":
            images = len(patches) // part.places
            (pixels,) = unpatchify(patches, [(images, part.grid, part.grid)], part.patch)  # images as frames
            x = self.stem(pixels).flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            x = self.stem(patches)
        return x + (self.position.repeat(len(x) // part.places, 1) if places is None else self.position[places])

    def forward(self, batch: PackedBatch) -> Tensor:
        media = batch.media.get(Modality.IMAGE)
        if media is None:
            return self.position[:0]
        seen = visible_of(batch)
        places = None if seen.rows is None else seen.rows % self.part.places
        # An image sees itself alone, also where a sample has several.
        x = self.embed(seen.of(media.values), places)
        return self.blocks(x, AttentionMask.packed(seen.ends(media.cu_values)))

    def layout(self, batch: PackedBatch) -> Layout:
        media = batch.media.get(Modality.IMAGE)
        several = media is not None and media.num_items > batch.num_samples
        return visible_of(batch).layout(batch, item_numbers(batch) if several else None)


def item_numbers(batch: PackedBatch) -> Tensor:
    """int32 [T]: the number of each token's item within its sample, from 0."""
    firsts = batch.cu_seqlens[:-1].long().clamp(max=max(batch.num_tokens - 1, 0))
    of_sample = batch.span_ids[firsts] if batch.num_tokens else batch.span_ids[:0]
    lengths = batch.cu_seqlens.diff().long()
    return batch.span_ids - of_sample.repeat_interleave(lengths, output_size=batch.num_tokens)
