"""Merged: the tokens of several streams in one sequence, a single-stream transformer.

Source: Chen et al. 2020 (UNITER, arXiv:1909.11740); mask "cross_only": Ouyang et al. 2021 (ERNIE-M, arXiv:2012.15674);
"prefix": Wang et al. 2022 (SimVLM, arXiv:2108.10904); `everywhere`: Su et al. 2020 (VL-BERT, arXiv:1908.08530).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmkernels import AttentionMask, pack, segment_pool
from mmkernels.pretrain.fusion.base import Fusion, Pairing, attention_of
from mmkernels.pretrain.layers import Blocks
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokens import Layout, Tokens, joined, taken

__all__ = ["Merged"]


@dataclass(frozen=True)
class Merged:
    """Concatenate streams sample by sample, with an embedding of the stream added to each token. After the layers both
    the whole sequence and each stream's own part of it can be read."""

    streams: tuple[str, ...] = ("text", "regions")
    """In the order of the sequence."""
    into: str = "merged"
    """Name of the whole sequence."""
    layers: int = 3
    """Transformer blocks."""
    mask: Literal["all", "cross_only", "prefix"] = "all"
    """all: a token sees its whole sample. cross_only: the other streams of its sample alone. prefix: the last stream is
    causal; all see the others."""
    everywhere: str = ""
    """A stream, merged or not, whose mean token is added, projected, to each token of the other streams."""

    def build(self, facts: Facts) -> MergedFusion:
        known = ", ".join(facts.streams)
        wanted = (*self.streams, *([self.everywhere] if self.everywhere else []))
        if len(set(self.streams)) < 2 or len(set(self.streams)) < len(self.streams) or set(wanted) - set(facts.streams):
            raise ValueError(f"fusion.streams, everywhere: expected different ones of {known}, got {', '.join(wanted)}")
        if self.into in facts.streams:
            raise ValueError(f"fusion.into: expected a new name, got that of a stream, {self.into!r}")
        if self.mask not in ("all", "cross_only", "prefix"):
            raise ValueError(f"fusion.mask: expected 'all', 'cross_only' or 'prefix', got {self.mask!r}")
        for name in self.streams:  # a causal stream's later tokens would be seen through the others, and the reverse
            causal, last = bool(getattr(facts.streams[name].encoder, "causal", False)), name == self.streams[-1]
            if causal != (self.mask == "prefix" and last):
                expected = "a causal one, last with mask='prefix'" if not causal else "one that is not causal"
                raise ValueError(f"streams.{name}.encoder: expected {expected}, got {facts.streams[name].encoder}")
        return MergedFusion(self, facts)


class MergedFusion(Fusion):
    def __init__(self, part: Merged, facts: Facts) -> None:
        super().__init__()
        self.part, width = part, facts.shape.width
        every = tuple(dict.fromkeys((*part.streams, *filter(None, [part.everywhere]))))
        self.joins = {name: tuple(dict.fromkeys((name, *every))) for name in part.streams} | {part.into: every}
        self.kinds = nn.Embedding(len(part.streams), width)
        nn.init.normal_(self.kinds.weight, std=0.02)
        self.everywhere: nn.Sequential | None = None
        if part.everywhere:  # without biases: a sample without the stream gets nothing
            norm = nn.LayerNorm(width, bias=False)
            nn.init.zeros_(norm.weight)  # at full size it would drown the words, whose embeddings begin small
            project = nn.Linear(width, width, bias=False)
            self.everywhere = nn.Sequential(OrderedDict(project=project, norm=norm))
        self.blocks = Blocks(part.layers, facts, rotary=True)

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        """A stream that the pairing lacks stays out of the sequence."""
        names = [name for name in self.part.streams if pairing is None or name in pairing]
        rows, layouts = {}, {}
        for name in names:
            rows[name], layouts[name] = _paired(tokens[name].layout, None if pairing is None else pairing[name])
        whole, places = joined(list(layouts.values()))
        index = whole.cu_seqlens.new_empty(whole.cu_seqlens_host[-1], dtype=torch.int64)
        kinds, positions = torch.empty_like(index), torch.empty_like(index)
        begin = 0
        for name, place in zip(names, places, strict=True):
            layout = layouts[name]
            index[place] = begin + rows[name]
            kinds[place] = self.part.streams.index(name)
            positions[place] = torch.arange(len(place), device=place.device) - layout.cu_seqlens[layout.owners()]
            begin += len(tokens[name].x)
        wide = reduce(torch.promote_types, (tokens[name].x.dtype for name in names))  # autocast may mix them
        x = pack([tokens[name].x.to(wide) for name in names], index) + self.kinds(kinds)
        if self.everywhere is not None and (pairing is None or self.part.everywhere in pairing):
            x = x + self._seen_everywhere(tokens[self.part.everywhere], whole, kinds, pairing)
        x = self.blocks(x, self._mask(whole, layouts, kinds), positions, depth=self.depth)
        parts = {name: Tokens(pack(x, place), layouts[name]) for name, place in zip(names, places, strict=True)}
        return {self.part.into: Tokens(x, whole), **parts}

    def attention(self, tokens: Mapping[str, Tokens]) -> dict[tuple[str, str], Tensor]:
        """Each token attends to its own stream too, so that its row here adds up to less than 1."""
        used: list[Any] = list(self.blocks)[: self.depth]
        if not used:
            return {}
        with attention_of(used[-1].attention) as found:
            self(tokens)
        _, places = joined([tokens[name].layout for name in self.part.streams])
        pairs = permutations(zip(self.part.streams, places, strict=True), 2)
        return {(a, b): found[0][rows][:, columns] for (a, rows), (b, columns) in pairs}

    def _seen_everywhere(self, tokens: Tokens, whole: Layout, kinds: Tensor, pairing: Pairing | None) -> Tensor:
        """[T, C] what is added to each token: 0 for the stream's own."""
        name, streams = self.part.everywhere, self.part.streams
        assert self.everywhere is not None, "the part names a stream"
        mean = self.everywhere(segment_pool(tokens.x, tokens.cu_seqlens, mode="mean"))  # [S, C]
        owners = whole.owners() if pairing is None else pairing[name][whole.owners()]
        own = streams.index(name) if name in streams else -1
        return mean[owners] * (kinds != own)[:, None]

    def _mask(self, whole: Layout, layouts: Mapping[str, Layout], kinds: Tensor) -> AttentionMask:
        if self.part.mask == "cross_only":
            return AttentionMask.cross_only(whole.cu_seqlens, kinds.to(torch.uint8))
        last = layouts.get(self.part.streams[-1])
        if self.part.mask == "prefix" and last is not None:
            return AttentionMask.prefix(whole.cu_seqlens, whole.cu_seqlens.diff() - last.cu_seqlens.diff())
        return AttentionMask.packed(whole.cu_seqlens)


def _paired(layout: Layout, samples: Tensor | None) -> tuple[Tensor, Layout]:
    """(int64 [T] rows of a stream, their layout), for samples of a pairing; None: all, in order."""
    if samples is not None:
        return taken(layout, samples)
    return torch.arange(layout.cu_seqlens_host[-1], device=layout.cu_seqlens.device), layout
