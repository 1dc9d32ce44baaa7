"""Packed features: what encoders return, fusions mix and objectives read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mmkernels import AttentionMask, pack

__all__ = ["Layout", "Tokens", "joined", "taken"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the S samples lie in T tokens."""

    cu_seqlens: Tensor  # int32 [S+1]
    cu_seqlens_host: tuple[int, ...]
    causal: bool = False  # a token sees those before it alone
    media: Tensor | None = None  # int32 [T]: which of its sample's items (images, ...) a token belongs to or follows

    @property
    def samples(self) -> int:
        return len(self.cu_seqlens_host) - 1

    def mask(self) -> AttentionMask:
        """Of self-attention."""
        return AttentionMask.packed(self.cu_seqlens, causal=self.causal)

    def owners(self) -> Tensor:
        """int64 [T]: the sample of each token."""
        lengths = self.cu_seqlens.diff().long()
        samples = torch.arange(self.samples, device=lengths.device)
        return samples.repeat_interleave(lengths, output_size=self.cu_seqlens_host[-1])


@dataclass(frozen=True, eq=False)
class Tokens:
    """Features of S samples, back to back, without padding."""

    x: Tensor  # [T, C]
    layout: Layout

    @property
    def samples(self) -> int:
        return self.layout.samples

    @property
    def cu_seqlens(self) -> Tensor:
        return self.layout.cu_seqlens

    def with_x(self, x: Tensor) -> Tokens:
        """Other features in the same places."""
        return replace(self, x=x)

    def emptied(self) -> Tokens:
        """As many samples, each without tokens."""
        media = None if self.layout.media is None else self.layout.media[:0]
        cu_seqlens, host = torch.zeros_like(self.cu_seqlens), (0,) * (self.samples + 1)
        return Tokens(self.x[:0], replace(self.layout, cu_seqlens=cu_seqlens, cu_seqlens_host=host, media=media))

    def between(self, first: int, last: int) -> Tokens:
        """Samples [first, last): views."""
        ends = self.layout.cu_seqlens_host[first : last + 1]
        begin, end = ends[0], ends[-1]
        media = self.layout.media
        layout = replace(
            self.layout,
            cu_seqlens=self.cu_seqlens[first : last + 1] - begin,
            cu_seqlens_host=tuple(each - begin for each in ends),
            media=None if media is None else media[begin:end],
        )
        return Tokens(self.x[begin:end], layout)

    def take(self, samples: Tensor) -> Tokens:
        """The given samples, in their order; one may occur several times.

        Args:
            samples: int64 [n].
        """
        index, layout = taken(self.layout, samples)
        return Tokens(pack(self.x, index), layout)


def taken(layout: Layout, samples: Tensor) -> tuple[Tensor, Layout]:
    """(int64 [T'] the tokens of some samples, their layout)."""
    host = layout.cu_seqlens_host
    lengths_host = [host[i + 1] - host[i] for i in samples.tolist()]
    ends = (0, *accumulate(lengths_host))
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=layout.cu_seqlens.device)
    lengths = cu_seqlens.diff().long()
    shift = (layout.cu_seqlens[samples].long() - cu_seqlens[:-1]).repeat_interleave(lengths, output_size=ends[-1])
    index = torch.arange(ends[-1], device=shift.device) + shift
    media = None if layout.media is None else layout.media[index]
    return index, replace(layout, cu_seqlens=cu_seqlens, cu_seqlens_host=ends, media=media)


def joined(layouts: Sequence[Layout]) -> tuple[Layout, list[Tensor]]:
    """Several streams of the same S samples, one after the other in each sample.

    Returns:
        the layout of the whole, and for each stream where its tokens are in it: int64 [T_i].
    """
    lengths = [[end - begin for begin, end in pairwise(layout.cu_seqlens_host)] for layout in layouts]
    host = (0, *accumulate(map(sum, zip(*lengths, strict=True))))
    cu_seqlens = torch.tensor(host, dtype=torch.int32, device=layouts[0].cu_seqlens.device)
    begins, places = cu_seqlens[:-1].long(), []
    for layout in layouts:
        owners = layout.owners()
        shift = begins - layout.cu_seqlens[:-1]
        places.append(torch.arange(len(owners), device=owners.device) + shift[owners])
        begins = begins + layout.cu_seqlens.diff()
    return Layout(cu_seqlens, host), places
