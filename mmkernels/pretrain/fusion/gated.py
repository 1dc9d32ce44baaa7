"""Gated: a causal language model whose layers read images through gates that start shut.

Source: Alayrac et al. 2022 (Flamingo, arXiv:2204.14198).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, gated_residual
from mmkernels.nn import GatedCrossAttention
from mmkernels.pretrain.fusion.base import Fusion, Pairing, attention_of, paired
from mmkernels.pretrain.layers import Block, FeedForward
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Gated"]


@dataclass(frozen=True)
class Gated:
    """Transformer blocks over one stream; before some of them it reads another, through a gated attention and a gated
    feed-forward. With the gates shut, as at the start, the blocks are a model of the one stream alone."""

    into: str = "text"
    """The stream that reads."""
    context: str = "image"
    """The stream that is read."""
    layers: int = 4
    """Transformer blocks."""
    every: int = 1
    """Blocks from one gate to the next; the first block has one."""
    mode: Literal["last", "all_previous"] = "last"
    """Of the items before a token, it reads the last one, or all."""
    shut: bool = False
    """No gates at all, and the context is not read: the ablation."""

    def build(self, facts: Facts) -> GatedFusion:
        for name in (self.into, self.context):
            if name not in facts.streams:
                raise ValueError(f"fusion: Gated: expected one of the streams {', '.join(facts.streams)}, got {name!r}")
        if self.every < 1:
            raise ValueError(f"fusion.every: expected at least 1, got {self.every}")
        if self.mode not in ("last", "all_previous"):
            raise ValueError(f"fusion.mode: expected 'last' or 'all_previous', got {self.mode!r}")
        return GatedFusion(self, facts)


class GatedFusion(Fusion):
    """The module of `Gated`.

    Attributes:
        shut: the gates are passed by, as if they were still shut: what the blocks know without the context.
    """

    shut = False

    def __init__(self, part: Gated, facts: Facts) -> None:
        super().__init__()
        self.part, self.joins = part, {} if part.shut else {part.into: (part.into, part.context)}
        self.layers = nn.ModuleList(Block(facts, rotary=True) for _ in range(part.layers))
        places = () if part.shut else range(0, part.layers, part.every)
        self.gates = nn.ModuleDict({str(i): Gate(facts) for i in places})  # by the block that one precedes

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        context = paired(tokens[self.part.context], self.part.context, pairing)
        read = paired(tokens[self.part.into], self.part.into, pairing)
        mask, own = self._sees(read, context), read.layout.mask()
        owners = read.layout.owners()
        positions = torch.arange(len(owners), device=owners.device) - read.cu_seqlens[owners]
        x = read.x
        for i, block in list(enumerate(self.layers))[: self.depth]:
            if str(i) in self.gates and not self.shut:
                x = self.gates[str(i)](x, context.x, mask)
            x = block(x, own, positions)
        return {self.part.into: read.with_x(x)}

    def attention(self, tokens: Mapping[str, Tokens]) -> dict[tuple[str, str], Tensor]:
        used: list[Any] = [self.gates[str(i)] for i in range(len(self.layers))[: self.depth] if str(i) in self.gates]
        if not used:
            return {}
        with attention_of(used[-1].attention) as found:
            self(tokens)
        return {(self.part.into, self.part.context): found[0]}

    def _sees(self, read: Tokens, context: Tokens) -> AttentionMask:
        """Without numbers, a sample has one item, which comes first."""
        a, b = (t.cu_seqlens.new_zeros(len(t.x)) if t.layout.media is None else t.layout.media for t in (read, context))
        return AttentionMask.media(read.cu_seqlens, context.cu_seqlens, a, b, mode=self.part.mode)


class Gate(nn.Module):
    """x reads the context, then a feed-forward, each through a gate of its own."""

    def __init__(self, facts: Facts) -> None:
        super().__init__()
        width, self.backend = facts.shape.width, facts.backend
        self.norm_context = nn.LayerNorm(width)
        self.attention = GatedCrossAttention(width, facts.shape.heads, backend=facts.backend)
        self.feed_forward = FeedForward(facts)
        self.feed_forward.down.reset_parameters()  # its gate is what is shut
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, context: Tensor, mask: AttentionMask) -> Tensor:
        """[T, C], [Tk, C] -> [T, C]"""
        x = self.attention(x, self.norm_context(context), mask)
        return gated_residual(x, self.feed_forward(x), self.gate, backend=self.backend)
