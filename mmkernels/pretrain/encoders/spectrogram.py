"""Recordings as log-mel frames, several to a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import AttentionMask, PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.encoders.visible import places_in, visible_of
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Spectrogram"]


@dataclass(frozen=True)
class Spectrogram:
    """One token per `frames` frames; recordings may differ in length. Zeros fill the last token."""

    layers: int = 2
    """Transformer blocks."""
    mels: int = 40
    """Mel bands of a frame."""
    frames: int = 4
    """Frames of a token."""
    max_frames: int = 256
    """Most frames of a recording; longer ones are cut."""

    def __post_init__(self) -> None:
        for name in ("mels", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_frames < 1 or self.max_frames % self.frames:
            raise ValueError(f"max_frames: expected a multiple of {self.frames} frames, got {self.max_frames}")

    @property
    def reads_text(self) -> bool:
        return False

    @property
    def places(self) -> int:
        """Most tokens of a recording."""
        return self.max_frames // self.frames

    @property
    def values(self) -> int:
        """Numbers of a token."""
        return self.frames * self.mels

    @property
    def may_hide(self) -> bool:
        """Whether hidden tokens can be left out."""
        return True

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Log-mel spectrograms float32 [F, mels] -> tokens [ceil(F / frames), frames * mels]."""
        return [Piece(torch.zeros((0, self.values)) if value is None else self._tokens(value)) for value in values]

    def _tokens(self, value: Any) -> Tensor:
        shape: Sequence[int] = getattr(value, "shape", ())
        dtype = getattr(value, "dtype", type(value))
        if len(shape) != 2 or shape[1] != self.mels or dtype not in (np.float32, torch.float32):
            raise ValueError(f"audio: expected [frames, {self.mels}] float32, got {list(shape)} {dtype}")
        frames = torch.as_tensor(value)[: self.max_frames]
        return F.pad(frames, (0, 0, 0, -len(frames) % self.frames)).reshape(-1, self.values)

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        if value is None:
            return 0
        return self.places if value is ... else -(-min(len(value), self.max_frames) // self.frames)

    def build(self, facts: Facts) -> EncoderModule:
        return SpectrogramEncoder(self, facts)


class SpectrogramEncoder(EncoderModule):
    def __init__(self, part: Spectrogram, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.stem = nn.Sequential(nn.Linear(part.values, width), nn.GELU(), nn.Linear(width, width))
        self.position = nn.Parameter(0.5 * torch.randn(part.places, width))
        self.blocks = Blocks(part.layers, facts)

    def forward(self, batch: PackedBatch) -> Tensor:
        seen = visible_of(batch)
        places = seen.of(places_in(batch.cu_seqlens, batch.num_tokens))
        x = self.stem(seen.of(batch.tokens)) + self.position[places]
        return self.blocks(x, AttentionMask.packed(seen.ends(batch.cu_seqlens)))

    def layout(self, batch: PackedBatch) -> Layout:
        return visible_of(batch).layout(batch)
