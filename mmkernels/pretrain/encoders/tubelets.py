"""Clips as tubelets: patches that last several frames, which see each other over space and time.

Source: Arnab et al. 2021 (ViViT, arXiv:2103.15691), joint space-time attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, Media, Modality, PackedBatch, patchify
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.encoders.visible import places_in, visible_of
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Tubelets"]


@dataclass(frozen=True)
class Tubelets:
    """One token per patch of `tubelet` frames. Of a clip longer than `frames`, evenly spaced frames are read; the last
    frame is repeated to fill the last tubelet."""

    layers: int = 2
    """Transformer blocks."""
    size: int = 32
    """Side of the frames that the model sees, in pixels."""
    patch: int = 8
    """Side of a patch, in pixels."""
    frames: int = 8
    """Most frames of a clip."""
    tubelet: int = 2
    """Frames of a token."""

    def __post_init__(self) -> None:
        if self.patch < 1 or self.size < 1 or self.size % self.patch:
            raise ValueError(f"size: expected a multiple of {self.patch} pixels, got {self.size}")
        if self.tubelet < 1 or self.frames < 1 or self.frames % self.tubelet:
            raise ValueError(f"frames: expected a multiple of {self.tubelet} frames, got {self.frames}")

    @property
    def reads_text(self) -> bool:
        return False

    @property
    def grid(self) -> int:
        return self.size // self.patch

    @property
    def places(self) -> int:
        """Most tokens of a clip."""
        return self.frames // self.tubelet * self.grid**2

    @property
    def values(self) -> int:
        """Numbers of a tubelet."""
        return 3 * self.tubelet * self.patch**2

    @property
    def may_hide(self) -> bool:
        """Whether hidden tokens can be left out."""
        return True

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Clips uint8 [F, H, W, 3 or 4], or tensors [F, 3, size, size] in [-1, 1] that a view has made of them."""
        clips = [self._clip(value) for value in values if value is not None]
        if not clips:
            return [Piece([]) for _ in values]
        tubelets, _ = patchify(clips, self.patch, temporal_patch_size=self.tubelet)
        steps = [len(clip) // self.tubelet for clip in clips]
        parts = tubelets.split([step * self.grid**2 for step in steps])
        media = iter(
            Media(Modality.VIDEO, part, (step, self.grid, self.grid)) for part, step in zip(parts, steps, strict=True)
        )
        return [Piece([] if value is None else [next(media)]) for value in values]

    def _clip(self, value: Any) -> Tensor:
        """float32 [F', 3, size, size], F' a multiple of the tubelet's frames."""
        if getattr(value, "ndim", 0) != 4 or not len(value):
            shape = list(getattr(value, "shape", ()))
            raise ValueError(f"video: expected [frames, H, W, 3] uint8 with at least one frame, got {shape}")
        count = len(value)
        chosen = np.arange(count) if count <= self.frames else (np.arange(self.frames) + 0.5) * count / self.frames
        chosen = chosen.astype(np.int64)
        chosen = np.append(chosen, np.repeat(chosen[-1:], -len(chosen) % self.tubelet))
        return value[torch.from_numpy(chosen)] if isinstance(value, Tensor) else plain_images(value[chosen], self.size)

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        if value is None:
            return 0
        return self.places if value is ... else -(-min(len(value), self.frames) // self.tubelet) * self.grid**2

    def build(self, facts: Facts) -> EncoderModule:
        return TubeletsEncoder(self, facts)


class TubeletsEncoder(EncoderModule):
    def __init__(self, part: Tubelets, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.stem = nn.Linear(part.values, width)
        self.space = nn.Parameter(0.5 * torch.randn(part.grid**2, width))
        self.time = nn.Parameter(0.5 * torch.randn(part.frames // part.tubelet, width))
        self.blocks = Blocks(part.layers, facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        media = batch.media.get(Modality.VIDEO)
        if media is None:
            return self.space[:0]
        seen = visible_of(batch)
        places = seen.of(places_in(media.cu_values, len(media.values)))
        position = (self.time[:, None] + self.space).flatten(0, 1)  # [places, C]
        x = self.stem(seen.of(media.values)) + position[places]
        return self.blocks(x, AttentionMask.packed(seen.ends(media.cu_values)))  # a clip sees itself alone

    def layout(self, batch: PackedBatch) -> Layout:
        return visible_of(batch).layout(batch)
