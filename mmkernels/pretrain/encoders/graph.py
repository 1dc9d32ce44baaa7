"""Graph: the regions of an image as nodes, which attend to the regions near them with an additive score.

    s_ij = <w, tanh(L x_i + R x_j)>    x_i += O sum_j softmax_j(s_ij) R x_j    over the neighbours j of i, and i itself

Source: Brody et al. 2022 (GATv2, arXiv:2105.14491), whose leaky rectifier is a tanh here, as in Bahdanau et al. 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, PackedBatch, additive_attention
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.encoders.regions import Regions, RegionsEncoder
from mmkernels.pretrain.layers import FeedForward, start_as_identity
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.region_columns import BOX
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Graph"]

_MOST = 32  # nodes of a sample: the bits of a row of its adjacency


@dataclass(frozen=True)
class Graph(Regions):
    """One token per region, then graph attention between regions that overlap or are near each other. At most 32
    regions an image."""

    layers: int = 2
    """Graph attention layers, each with a feed-forward."""
    near: float = 0.1
    """Largest gap between neighbours, as a fraction of the image; 0: they touch; at least 1.42: all are neighbours."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.near >= 0:
            raise ValueError(f"near: expected at least 0, got {self.near}")

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        found = super().length(value, tokenizer)
        if found > _MOST:
            raise ValueError(f"value: expected at most {_MOST} regions, got {found}")
        return found

    def prepare(self, values: Any, tokenizer: TextTokenizer) -> list[Any]:
        """As `Regions`."""
        for value in values:
            self.length(value, tokenizer)
        return super().prepare(values, tokenizer)

    def build(self, facts: Facts) -> EncoderModule:
        return GraphEncoder(self, facts)


class GraphEncoder(EncoderModule):
    def __init__(self, part: Graph, facts: Facts) -> None:
        super().__init__()
        self.near = part.near
        self.nodes = RegionsEncoder(Regions(layers=0, side=part.side), facts)
        self.layers = nn.ModuleList(GraphLayer(facts) for _ in range(part.layers))

    def forward(self, batch: PackedBatch) -> Tensor:
        mask = neighbours(batch.tokens[:, BOX][:, :4], self.layout(batch), self.near)
        x = self.nodes(batch)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class GraphLayer(nn.Module):
    def __init__(self, facts: Facts) -> None:
        super().__init__()
        width, self.heads, self.backend = facts.shape.width, facts.shape.heads, facts.backend
        self.norm = nn.LayerNorm(width)
        self.left, self.right = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.score = nn.Parameter(torch.randn(self.heads, width // self.heads) * (width // self.heads) ** -0.5)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(facts.shape.dropout)
        self.feed_forward = FeedForward(facts)
        start_as_identity(self.out)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        """[T, C] -> [T, C]"""
        normed = self.norm(x)
        q, k = (layer(normed).unflatten(-1, (self.heads, -1)) for layer in (self.left, self.right))
        found: Any = additive_attention(q, k, k, self.score, mask, backend=self.backend)
        x = x + self.dropout(self.out(found.flatten(1)))
        return x + self.feed_forward(x)


def neighbours(boxes: Tensor, layout: Layout, near: float) -> AttentionMask:
    """A node sees itself, and those of its sample whose boxes are at most `near` away.

    Args:
        boxes: float [T, 4]: left, top, right, bottom.
        layout: of the samples, at most 32 nodes each.
        near: largest distance between two boxes.
    """
    owners, first = layout.owners(), layout.cu_seqlens[:-1].long()
    place = torch.arange(len(boxes), device=boxes.device) - first[owners]  # within its sample
    padded = boxes.new_full((layout.samples, _MOST, 4), torch.nan)  # NaN is near nothing
    padded[owners, place] = boxes
    low, high = padded[owners][..., :2], padded[owners][..., 2:]  # [T, 32, 2]: the nodes of each node's sample
    gap = torch.maximum(low - boxes[:, None, 2:], boxes[:, None, :2] - high).clamp(min=0)
    edges = (gap.norm(dim=-1) <= near) | (place[:, None] == torch.arange(_MOST, device=boxes.device))
    bits = (edges.long() << torch.arange(_MOST, device=boxes.device)).sum(1)
    allow = torch.where(bits >= 2**31, bits - 2**32, bits).int()  # the 32nd bit is the sign
    lo, hi = layout.cu_seqlens[:-1][owners], layout.cu_seqlens[1:][owners]
    return AttentionMask.from_rows(lo, hi, allow_q=allow, class_k=place.to(torch.uint8))
