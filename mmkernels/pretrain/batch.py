"""A batch of the loop: packed tokens of every stream, labels of the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels import PackedBatch
from mmkernels.pretrain.ranks import ALONE, Ranks
from mmkernels.pretrain.roster import Roster

__all__ = ["Batch", "Piece"]


@dataclass(frozen=True)
class Piece:
    """One value, prepared for `PackedBatch.from_samples`."""

    tokens: Any  # [L, ...], or a list of parts (token ids, `Media`); an empty list for a sample without this field
    labels: Tensor | None = None  # int64 [L], -100 for none


@dataclass(frozen=True, eq=False)
class Batch:
    """S samples: stream -> its packed tokens. A sample without a stream's field has an empty segment there."""

    streams: Mapping[str, PackedBatch]
    labels: Mapping[str, Tensor]  # label field -> int64 [S], -100 where a sample has none
    concepts: Tensor  # int64 [S]: samples with the same concept are positives of each other
    names: list[str]
    numbers: list[int]  # of the samples in their data set
    step: int  # which batch of the run this is, from 0
    state: Mapping[str, Any] = field(default_factory=dict)  # of the sampler after this batch
    broken: Mapping[str, str] = field(default_factory=dict)  # why samples could not be read, by name
    places: tuple[int, ...] | None = None  # of the samples in the batch of all ranks; -1 for one that only fills it
    among: Roster | None = None  # the samples of all ranks, once these have said what they have

    def __getitem__(self, stream: str) -> PackedBatch:
        return self.streams[stream]

    @property
    def samples(self) -> int:
        return len(self.names)

    @property
    def tokens(self) -> int:
        """Of all streams."""
        return sum(packed.num_tokens for packed in self.streams.values())

    @property
    def padding_saved(self) -> float:
        """The share of tokens that padding every stream to its longest sample would have added."""
        padded = sum(packed.num_samples * packed.max_seqlen for packed in self.streams.values())
        return 1 - self.tokens / padded if padded else 0.0

    def present(self, *streams: str) -> Tensor:
        """bool [S]: the samples of this rank that have all of these streams."""
        return torch.stack([self.streams[stream].cu_seqlens.diff() > 0 for stream in streams]).all(0)

    @property
    def roster(self) -> Roster:
        """The samples of all ranks; those of this batch alone as long as no other rank is known."""
        return self.among or self._called(ALONE)

    def called(self, ranks: Ranks, counts: Sequence[int]) -> Batch:
        """With the samples of all ranks known, of which each has so many."""
        return replace(self, among=self._called(ranks, counts))

    def _called(self, ranks: Ranks, counts: Sequence[int] | None = None) -> Roster:
        lengths = {name: torch.tensor(packed.cu_seqlens_host).diff() for name, packed in self.streams.items()}
        return Roster.of(self.concepts, lengths, self.places, ranks, counts)

    def _map(self, packed: Callable[[PackedBatch], PackedBatch], tensor: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            streams={name: packed(each) for name, each in self.streams.items()},
            labels={name: tensor(each) for name, each in self.labels.items()},
            concepts=tensor(self.concepts),
        )

    def to(self, device: torch.device | str) -> Batch:
        return self._map(lambda p: p.to(device, non_blocking=True), lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(PackedBatch.pin_memory, Tensor.pin_memory)

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` samples, the last one possibly smaller."""
        parts = {name: packed.split(size) for name, packed in self.streams.items()}
        firsts = range(0, max(self.samples, 1), size)
        return [
            replace(
                self,
                streams={name: each[i] for name, each in parts.items()},
                labels={name: each[first : first + size] for name, each in self.labels.items()},
                concepts=self.concepts[first : first + size],
                names=self.names[first : first + size],
                places=None if self.places is None else self.places[first : first + size],
                numbers=self.numbers[first : first + size],
            )
            for i, first in enumerate(firsts)
        ]
