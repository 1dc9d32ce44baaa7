"""Co: two streams, each with weights of its own, that attend to each other.

Source: Lu et al. 2019 (ViLBERT, arXiv:1908.02265).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels import AttentionMask
from mmkernels.nn import CoAttention, FusedSelfAttention, Rotary
from mmkernels.pretrain.fusion.base import Fusion, Pairing, attention_of, paired
from mmkernels.pretrain.layers import FeedForward, start_as_identity
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Co"]


@dataclass(frozen=True)
class Co:
    """Layers of self-attention, attention to the other stream, and a feed-forward, for both streams at once."""

    a: str = "text"
    """One stream."""
    b: str = "regions"
    """The other stream."""
    layers: int = 2
    """Their number."""

    def build(self, facts: Facts) -> CoFusion:
        if self.a == self.b or not {self.a, self.b} <= set(facts.streams):
            known = ", ".join(facts.streams)
            raise ValueError(f"fusion.a, fusion.b: expected two different streams of {known}, got {self.a}, {self.b}")
        for name in (self.a, self.b):  # its later tokens would come back through the other stream
            if getattr(facts.streams[name].encoder, "causal", False):
                got = facts.streams[name].encoder
                raise ValueError(f"streams.{name}.encoder: expected one that is not causal, got {got}")
        return CoFusion(self, facts)


class CoFusion(Fusion):
    def __init__(self, part: Co, facts: Facts) -> None:
        super().__init__()
        self.part, self.recompute = part, facts.recompute
        self.joins = {part.a: (part.a, part.b), part.b: (part.b, part.a)}
        self.layers = nn.ModuleList(CoLayer(facts) for _ in range(part.layers))

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        a, b = paired(tokens[self.part.a], self.part.a, pairing), paired(tokens[self.part.b], self.part.b, pairing)
        cu_a, cu_b = a.cu_seqlens, b.cu_seqlens
        masks = (a.layout.mask(), b.layout.mask(), AttentionMask.packed(cu_a, cu_b), AttentionMask.packed(cu_b, cu_a))
        positions = [
            torch.arange(len(each.x), device=each.x.device) - each.cu_seqlens[:-1][each.layout.owners()]
            for each in (a, b)
        ]
        wide = torch.promote_types(a.x.dtype, b.x.dtype)  # autocast may mix them
        x = (a.x.to(wide), b.x.to(wide))
        for layer in list(self.layers)[: self.depth]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, *x, masks, positions, use_reentrant=False)
            else:
                x = layer(*x, masks, positions)
        return {self.part.a: a.with_x(x[0]), self.part.b: b.with_x(x[1])}

    def attention(self, tokens: Mapping[str, Tokens]) -> dict[tuple[str, str], Tensor]:
        used: list[Any] = list(self.layers)[: self.depth]
        if not used:
            return {}
        with attention_of(used[-1].co.a_from_b) as of_a, attention_of(used[-1].co.b_from_a) as of_b:
            self(tokens)
        return {(self.part.a, self.part.b): of_a[0], (self.part.b, self.part.a): of_b[0]}


class CoLayer(nn.Module):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        width, heads, backend = facts.shape.width, facts.shape.heads, facts.backend
        self.norms_self = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        own = [FusedSelfAttention(width, heads, rotary=Rotary(), qk_norm="rms", backend=backend) for _ in range(2)]
        self.attention = nn.ModuleList(own)
        self.norms_co = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.co = CoAttention(width, width, heads, backend=backend)
        self.feed_forward = nn.ModuleList(FeedForward(facts) for _ in range(2))
        self.dropout = nn.Dropout(facts.shape.dropout)
        start_as_identity(own[0].out_proj, own[1].out_proj, self.co.a_from_b.out_proj, self.co.b_from_a.out_proj)

    def forward(
        self, a: Tensor, b: Tensor, masks: tuple[AttentionMask, ...], positions: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """a [Ta, C], b [Tb, C]; masks of a, of b, of a over b and of b over a; positions [Ta], [Tb]."""
        x = [a, b]
        for i in range(2):
            x[i] = x[i] + self.dropout(self.attention[i](self.norms_self[i](x[i]), masks[i], positions=positions[i]))
        seen = self.co(self.norms_co[0](x[0]), self.norms_co[1](x[1]), masks[2], masks[3])
        for i in range(2):
            x[i] = x[i] + self.dropout(seen[i])
            x[i] = x[i] + self.feed_forward[i](x[i])
        return x[0], x[1]
