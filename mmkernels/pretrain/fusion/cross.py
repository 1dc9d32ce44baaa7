"""Cross: the tokens of some streams attend to those of another.

Source: Li et al. 2021 (ALBEF, arXiv:2107.07651); with a causal stream, the decoder of Vaswani et al. 2017.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask
from mmkernels.nn import CrossModalAttention, FusedSelfAttention, Rotary
from mmkernels.pretrain.fusion.base import Fusion, Pairing, attention_of, paired
from mmkernels.pretrain.layers import FeedForward, start_as_identity
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Cross"]


@dataclass(frozen=True)
class Cross:
    """Layers of self-attention, attention to the context, and a feed-forward."""

    into: tuple[str, ...] = ("text",)
    """Streams that read; they share the layers, each by itself."""
    context: str = "image"
    """The stream that is read."""
    layers: int = 2
    """Their number."""

    def build(self, facts: Facts) -> CrossFusion:
        return CrossFusion(self, facts)


class CrossFusion(Fusion):
    def __init__(self, part: Cross, facts: Facts) -> None:
        super().__init__()
        self.part, self.joins = part, {name: (name, part.context) for name in part.into}
        self.layers = nn.ModuleList(CrossLayer(facts) for _ in range(part.layers))

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        context = tokens[self.part.context]
        partners = None if pairing is None else pairing[self.part.context]
        return {
            name: self._read(paired(tokens[name], name, pairing), context, partners)
            for name in self.part.into
            if pairing is None or name in pairing
        }

    def attention(self, tokens: Mapping[str, Tokens]) -> dict[tuple[str, str], Tensor]:
        used: list[Any] = list(self.layers)[: self.depth]
        if not used:
            return {}
        with attention_of(used[-1].cross) as found:
            read = self(tokens)
        return {(name, self.part.context): each for name, each in zip(read, found, strict=True)}

    def _read(self, tokens: Tokens, context: Tokens, partners: Tensor | None) -> Tokens:
        """Keys and values are projected once, and each sample sees its partner's where they are: nothing is copied."""
        owners = tokens.layout.owners()
        samples = owners if partners is None else partners[owners]  # of the context, for each token
        mask = AttentionMask.from_rows(context.cu_seqlens[samples], context.cu_seqlens[samples + 1])
        positions = torch.arange(len(owners), device=owners.device) - tokens.cu_seqlens[owners]
        x, own = tokens.x, tokens.layout.mask()
        for layer in list(self.layers)[: self.depth]:
            x = layer(x, context.x, own, mask, positions)
        return tokens.with_x(x)


class CrossLayer(nn.Module):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        width, heads, backend = facts.shape.width, facts.shape.heads, facts.backend
        self.norm_self, self.norm_cross = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_context = nn.LayerNorm(width)
        self.attention = FusedSelfAttention(width, heads, rotary=Rotary(), qk_norm="rms", backend=backend)
        self.cross = CrossModalAttention(width, heads, backend=backend)
        self.dropout = nn.Dropout(facts.shape.dropout)
        self.feed_forward = FeedForward(facts)
        start_as_identity(self.attention.out_proj, self.cross.out_proj)

    def forward(self, x: Tensor, context: Tensor, own: AttentionMask, mask: AttentionMask, positions: Tensor) -> Tensor:
        """x [T, C] reads itself by `own`, and context [Tk, C] by `mask`."""
        x = x + self.dropout(self.attention(self.norm_self(x), own, positions=positions))
        x = x + self.dropout(self.cross(self.norm_cross(x), self.norm_context(context), mask))
        return x + self.feed_forward(x)
