"""Grouped arguments of the packing ops."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["PatchSize", "Sources", "Spans"]


class Sources(NamedTuple):
    """Tensors [R_i, E] of one dtype; rows are numbered consecutively across them."""

    first: Tensor
    second: Tensor | None = None
    third: Tensor | None = None
    fourth: Tensor | None = None

    def given(self) -> list[Tensor]:
        """The sources that are not None."""
        return [source for source in self if source is not None]


class PatchSize(NamedTuple):
    """Patch geometry: channels, patch side in pixels, frames, and block side in patches."""

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
        starts: [N] int64, ascending: first token of each.
        extent: [N, 3] int64: tokens in time, height and width.
        gained: [N+1] int64: position advance minus token count, accumulated over the previous spans.
        time_step: [2, N] floating point or None: two factors whose product is the positions per temporal step.
    """

    starts: Tensor
    extent: Tensor
    gained: Tensor
    time_step: Tensor | None
