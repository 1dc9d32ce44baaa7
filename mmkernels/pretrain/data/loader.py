"""Training batches from any number of worker processes: the n-th depends on the data, the seed and n alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data.base import Source, TooManyBrokenError
from mmkernels.pretrain.data.collate import Collator

__all__ = ["Sampler", "TrainLoader"]


class Sampler(Protocol):
    """Endless batches of sample numbers, resumed from a JSON-serialisable state."""

    step: int

    def __next__(self) -> np.ndarray: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Turn(NamedTuple):
    """What a worker is told: which batch to build."""

    step: int
    items: np.ndarray
    state: dict[str, Any]  # of the sampler after it


class TrainLoader:
    """Endless `Batch`es. A state may be loaded with another number of workers.

    Args:
        source: the training data.
        sampler: which samples make a batch.
        collator: samples to batches.
        workers: processes that read ahead; 0 reads in this one.
        pin: keep batches in page-locked memory, for a GPU.
    """

    def __init__(
        self, source: Source, sampler: Sampler, collator: Collator, *, workers: int = 0, pin: bool = False
    ) -> None:
        self.source, self.sampler, self.workers, self.pin = source, sampler, workers, pin
        self._builder = _Builder(source, collator)
        self._state = sampler.state_dict()
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            turns: Any = _Turns(self.sampler)
            options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.pin, "collate_fn": _itself}
            if self.workers:  # forked unless you chose otherwise: such workers have what your own recipe's file defines
                options["multiprocessing_context"] = multiprocessing.get_start_method(allow_none=True) or "fork"
            # A generator of its own: DataLoader draws a seed from it, which must not come from the run's.
            loader: Any = DataLoader(self._builder, None, sampler=turns, generator=torch.Generator(), **options)
            self._batches = iter(loader)
        batch = next(self._batches)
        self._state = dict(batch.state)
        for name, reason in batch.broken.items():
            self.source.broken.add(name, reason)
        if not batch.samples:
            broken = len(self.source.broken)
            raise TooManyBrokenError(f"no sample of batch {batch.step} could be read; {broken} are broken")
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last yielded batch, however far workers have read ahead; JSON-serialisable."""
        return dict(self._state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the last batch yielded before `state_dict` was taken."""
        self.sampler.load_state_dict(state)
        self._state, self._batches = dict(state), None


class _Builder(Dataset[Batch]):
    """A data set whose index is a turn."""

    def __init__(self, source: Source, collator: Collator) -> None:
        self.source, self.collator = source, collator

    def __getitem__(self, turn: _Turn) -> Batch:
        read = self.source.read_some(turn.items)
        if not read.samples:
            nothing = torch.zeros(0, dtype=torch.int64)
            return Batch({}, {}, nothing, [], [], turn.step, turn.state, read.broken)
        batch = self.collator(read.samples, read.items, turn.step)
        return replace(batch, state=turn.state, broken=read.broken)


def _itself(batch: Batch) -> Batch:
    return batch


class _Turns:
    """The sampler inside the DataLoader, which runs ahead of the batches that the loader yields."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[_Turn]:
        while True:
            step, items = self.sampler.step, next(self.sampler)
            yield _Turn(step, items, self.sampler.state_dict())
