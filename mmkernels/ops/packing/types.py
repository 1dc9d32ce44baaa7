"""What belongs together among the arguments of the packing ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["PatchSize", "Sources", "Spans"]


class Sources(NamedTuple):
    """Tensors [R_i, E] of one dtype whose rows are numbered end to end."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None
    fourth: Tensor | None = None

    def given(self) -> list[Tensor]:
        """Those that are there."""
        return [source for source in self if source is not None]


class PatchSize(NamedTuple):
    """A token's pixels: channels, pixels along a side, frames; and patches along a side of a block of tokens."""

    channels: int
    patch: int
    temporal: int
    merge: int

    @property
    def row(self) -> int:
        """Elements of a token."""
        return self.channels * self.temporal * self.patch**2


class Spans(NamedTuple):
    """N images and clips among packed tokens.

    Attributes:
        starts: [N] int64, ascending: each one's first token.
        extent: [N, 3] int64: its tokens in time, height and width.
        gained: [N+1] int64: by how much less or more than their tokens the spans before advance the position.
        time_step: [2, N] floating point or None: two factors whose product is the positions between two of its steps.
    """

    starts: Tensor
    extent: Tensor
    gained: Tensor
    time_step: Tensor | None
