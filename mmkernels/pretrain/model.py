"""The dual encoder: an image tower and a text tower over packed tokens, meeting in one space.

Both towers run the same blocks over tokens [T, C] with `cu_seqlens` [S+1]: 16 tokens per image, one token per word of a
caption, no padding.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import AttentionMask, attention, segment_pool
from mmkernels.pretrain.config import ModelConfig
from mmkernels.pretrain.data import TextBatch

__all__ = ["DualEncoder", "ImageTower", "TextTower"]


class Block(nn.Module):
    """A pre-norm transformer block over packed tokens."""

    def __init__(self, config: ModelConfig, backend: str | None) -> None:
        super().__init__()
        C = config.width
        self.heads, self.backend = config.heads, backend
        self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)
        self.up, self.down = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
        self.dropout = nn.Dropout(config.dropout)
        for last in (self.out, self.down):  # a block starts as the identity
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """x [T, C] -> [T, C]; the mask determines which tokens see each other."""
        q, k, v = self.qkv(self.norm1(x)).view(len(x), 3, self.heads, -1).unbind(1)  # each [T, H, D]
        mixed = cast(Tensor, attention(q, k, v, mask, backend=self.backend))
        x = x + self.dropout(self.out(mixed.flatten(1)))
        hidden = F.gelu(self.up(self.norm2(x)), approximate="tanh")  # [T, 4 C]
        return x + self.dropout(self.down(hidden))


class Tower(nn.Module):
    """Blocks, pooling and projection: what both towers share."""

    def __init__(self, config: ModelConfig, layers: int, backend: str | None) -> None:
        super().__init__()
        self.backend = backend
        self.blocks = nn.ModuleList(Block(config, backend) for _ in range(layers))
        self.norm = nn.LayerNorm(config.width)
        self.project = nn.Linear(config.width, config.embed_dim, bias=False)

    def encode(self, x: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tokens [T, C] of S segments -> unit vectors [S, E]."""
        mask = AttentionMask.packed(cu_seqlens)
        for block in self.blocks:
            x = block(x, mask)
        pooled = segment_pool(self.norm(x), cu_seqlens, mode="mean", backend=self.backend)  # [S, C]
        return F.normalize(self.project(pooled), dim=-1)


class ImageTower(Tower):
    """Images to unit vectors: three strided convolutions to one token per 8 x 8 pixels, then blocks."""

    def __init__(self, config: ModelConfig, backend: str | None = None) -> None:
        super().__init__(config, config.image_layers, backend)
        C = config.width
        self.tokens = (config.image_size // 8) ** 2
        self.stem = nn.Sequential(
            *_halving(3, C // 4), *_halving(C // 4, C // 2), nn.Conv2d(C // 2, C, 3, stride=2, padding=1)
        )
        # On the scale of the tokens: otherwise the mean over tokens would hardly depend on position.
        self.position = nn.Parameter(0.5 * torch.randn(self.tokens, C))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] in [-1, 1] -> [B, E]."""
        x = self.stem(images).flatten(2).transpose(1, 2) + self.position  # [B, tokens, C]
        cu_seqlens = torch.arange(len(images) + 1, dtype=torch.int32, device=images.device) * self.tokens
        return self.encode(x.flatten(0, 1), cu_seqlens)


def _halving(channels_in: int, channels: int) -> tuple[nn.Module, ...]:
    """Half the side, `channels` channels."""
    convolution = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
    return convolution, nn.GroupNorm(math.gcd(8, channels), channels), nn.GELU(approximate="tanh")


class TextTower(Tower):
    """Captions to unit vectors: a word is its row of one table plus the mean of its trigrams' rows of another."""

    def __init__(self, config: ModelConfig, backend: str | None = None) -> None:
        super().__init__(config, config.text_layers, backend)
        C = config.width
        self.words, self.position = nn.Embedding(config.word_buckets, C), nn.Embedding(config.max_words, C)
        self.grams = nn.EmbeddingBag(config.gram_buckets, C, mode="mean")
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.normal_(self.grams.weight, std=0.5)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, text: TextBatch) -> Tensor:
        """B captions of T words in all, on any device -> [B, E]."""
        text = text.to(self.words.weight.device)
        x = self.words(text.word_ids) + self.grams(text.gram_ids, text.gram_offsets) + self.position(text.position_ids)
        return self.encode(x, text.cu_seqlens)


class DualEncoder(nn.Module):
    """Both towers."""

    def __init__(self, config: ModelConfig, backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.image = ImageTower(config, backend)
        self.text = TextTower(config, backend)
