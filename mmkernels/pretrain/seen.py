"""What objectives see: the whole batch's embeddings and tokens, and one chunk of it after fusion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.roster import Roster
from mmkernels.pretrain.tokens import Tokens

__all__ = ["Chunk", "Seen"]


class Seen:
    """A whole batch as its encoders see it.

    Args:
        batch: S samples.
        rows: stream -> (its encoder, what it returned: tokens [T, C] or embeddings [S, E]).
        teacher: stream -> embeddings [S, E] of its momentum twin.
    """

    def __init__(
        self, batch: Batch, rows: Mapping[str, tuple[Any, Tensor]], teacher: Mapping[str, Tensor] | None = None
    ) -> None:
        self.batch, self.teacher = batch, teacher or {}
        self._rows = rows
        self._embeddings: dict[str, Tensor] = {}
        self._tokens: dict[str, Tokens] = {}

    @property
    def step(self) -> int:
        return self.batch.step

    @cached_property
    def roster(self) -> Roster:
        """The samples of all ranks."""
        return self.batch.roster

    def embedding(self, stream: str) -> Tensor:
        """Unit vectors [S, E]; zeros for samples without this stream."""
        if stream not in self._embeddings:
            encoder, x = self._rows[stream]
            self._embeddings[stream] = x if encoder.pooled else encoder.embed(self.tokens(stream))
        return self._embeddings[stream]

    def tokens(self, stream: str) -> Tokens:
        """Before fusion. A recipe without fusion and token objectives keeps none."""
        if stream not in self._tokens:
            encoder, x = self._rows[stream]
            self._tokens[stream] = Tokens(x, encoder.encoder.layout(self.batch[stream]))
        return self._tokens[stream]

    def present(self, *streams: str) -> Tensor:
        """bool [S]: the samples of this rank that have all of these streams."""
        return self.batch.present(*streams)

    def everyone(self, *streams: str) -> tuple[list[Tensor], Tensor]:
        """(the embeddings [B, E] of some streams on all ranks, bool [B]: the samples that have all of these), for a
        loss that every rank computes."""
        found = [self.roster.rows(self.embedding(stream)) for stream in streams]
        return found, self.roster.present(*streams).to(found[0].device)

    def chunks(self, size: int) -> list[Chunk]:
        """The samples in groups of `size`."""
        every = {name: self.tokens(name) for name in self._rows}
        return [
            Chunk(
                part,
                {name: tokens.between(first, first + part.samples) for name, tokens in every.items()},
                self,
                range(first, first + part.samples),
            )
            for first, part in zip(range(0, max(self.batch.samples, 1), size), self.batch.split(size), strict=True)
        ]


class Fuses(Protocol):
    """What a chunk knows of a fusion."""

    def __call__(
        self, tokens: Mapping[str, Tokens], pairing: Mapping[str, Tensor] | None = None
    ) -> Mapping[str, Tokens]: ...

    def told_by(self, stream: str) -> tuple[str, ...]: ...


@dataclass(eq=False)
class Chunk:
    """Some samples of a batch, with all their tokens."""

    batch: Batch  # of these samples
    tokens: Mapping[str, Tokens]  # by stream, before fusion
    whole: Seen
    samples: range  # their places in the whole batch
    fused: Mapping[str, Tokens] = field(default_factory=dict)  # by stream, after fusion
    fusion: Fuses | None = None

    def fuse(self, fusion: Fuses | None) -> None:
        """Run the fusion; without one, tokens stay as they are."""
        self.fusion = fusion
        self.fused = {**self.tokens, **(fusion(self.tokens) if fusion is not None else {})}
