"""Training batches from any number of worker processes: the n-th depends on the data, the seed and n alone."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data.base import Sample, Source, TooManyBrokenError
from mmkernels.pretrain.data.collate import Collator, Others
from mmkernels.pretrain.data.dealing import Dealer, Hand
from mmkernels.pretrain.ranks import ALONE, PeerError

__all__ = ["Sampler", "TrainLoader"]


class Sampler(Protocol):
    """Endless batches of sample numbers, resumed from a JSON-serialisable state."""

    @property
    def step(self) -> int: ...

    def __next__(self) -> np.ndarray: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


_AHEAD = 4  # batches that are dealt at a time
_NEVER = 2**40  # the number of a step


class _Turn(NamedTuple):
    """What a worker is told: which batch to build."""

    step: int
    items: np.ndarray  # of the whole batch
    hand: Hand  # this rank's part
    state: dict[str, Any]  # of the sampler after it
    used: frozenset[str] | None  # the objectives in use, for views that belong to some; None: all


class TrainLoader:
    """Endless `Batch`es. A state may be loaded with another number of workers.

    Args:
        source: the training data.
        sampler: which samples make a batch.
        collator: samples to batches.
        dealer: which samples of a batch this rank reads; None: all.
        workers: processes that read ahead; 0 reads in this one.
        pin: keep batches in page-locked memory, for a GPU.
        in_use: step -> the objectives in use, for views that belong to some of them; None: all. It is asked in this
            process, when a batch is begun: with workers, two batches of each before it is yielded.

    Attributes:
        waited, waited_for_peers: seconds that the last batch took to come, and other ranks' parts of it after that.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        collator: Collator,
        *,
        dealer: Dealer | None = None,
        workers: int = 0,
        pin: bool = False,
        in_use: Callable[[int], frozenset[str]] | None = None,
    ) -> None:
        self.in_use = in_use
        self.source, self.sampler, self.workers, self.pin = source, sampler, workers, pin
        self.dealer, self.ranks = dealer, ALONE if dealer is None else dealer.ranks
        self.waited = self.waited_for_peers = 0.0
        self._builder = _Builder(source, collator)
        self._state = sampler.state_dict()
        self._batches: Iterator[Batch] | None = None

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            turns: Any = _Turns(self.sampler, self.dealer, self.in_use)
            options: dict[str, Any] = {"num_workers": self.workers, "pin_memory": self.pin, "collate_fn": _itself}
            if self.workers:  # forked unless you chose otherwise: such workers have what your own recipe's file defines
                options["multiprocessing_context"] = multiprocessing.get_start_method(allow_none=True) or "fork"
            # A generator of its own: DataLoader draws a seed from it, which must not come from the run's.
            loader: Any = DataLoader(self._builder, None, sampler=turns, generator=torch.Generator(), **options)
            self._batches = iter(loader)
        self.ranks.at("reading data")
        began, batch, failed = time.perf_counter(), None, None
        try:
            batch = next(self._batches)
        except Exception as error:
            failed = error
        read = time.perf_counter()
        self.ranks.at("waiting for the data of other ranks")
        batch = self._met(batch, failed)
        self.waited, self.waited_for_peers = read - began, time.perf_counter() - read
        self._state = dict(batch.state)
        if not batch.roster.samples:
            broken = len(self.source.broken)
            raise TooManyBrokenError(f"no sample of batch {batch.step} could be read; {broken} are broken")
        return batch

    def _met(self, batch: Batch | None, failed: Exception | None) -> Batch:
        """The batch, once all ranks have theirs and have said what they could not read."""
        mine = [failed is not None, bool(batch and batch.broken), batch.samples if batch else 0]
        table = self.ranks.table(mine)
        found = table[:, :2].any(0).tolist()
        if found[0]:
            errors = self.ranks.objects("" if failed is None else f"{type(failed).__name__}: {failed}")
            rank, error = next((rank, error) for rank, error in enumerate(errors) if error)
            raise failed or PeerError(f"rank {rank} could not read its part of a batch: {error}")
        assert batch is not None
        for broken in self.ranks.objects(dict(batch.broken)) if found[1] else ():
            for name, reason in broken.items():
                self.source.broken.add(name, reason)
        return batch.called(self.ranks, table[:, 2].long().tolist())

    def built(self, items: np.ndarray, used: frozenset[str]) -> Batch:
        """A batch of some samples, int64 [n], with the views of a step that never comes, for objectives in use: always
        the same. It is read in this process, and does not change which batch is the next."""
        hands = [Hand(np.arange(len(items)), {})] if self.dealer is None else self.dealer.hands([items])
        turn = _Turn(_NEVER, items, hands[0], {}, used)
        batch, failed = None, None
        try:
            batch = self._builder[turn]
        except Exception as error:
            failed = error
        return self._met(batch, failed)

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
        items, places = turn.items[turn.hand.places], turn.hand.places.tolist()
        read = self.source.read_some(items)
        if read.samples:
            others = Others(self.source, turn.items, turn.hand.present)
            batch = self.collator(read.samples, read.items, turn.step, used=turn.used, others=others)
            at = dict(zip(items.tolist(), places, strict=True))
            places = [at[number] for number in batch.numbers]
        else:  # a rank without samples takes part all the same
            batch = self.collator([Sample({}, -1, "")], [0], turn.step, used=turn.used)
            places = [-1]
        return replace(batch, state=turn.state, broken=read.broken, places=tuple(places))


def _itself(batch: Batch) -> Batch:
    return batch


class _Turns:
    """The sampler inside the DataLoader, which runs ahead of the batches that the loader yields."""

    def __init__(self, sampler: Sampler, dealer: Dealer | None, in_use: Callable[[int], frozenset[str]] | None) -> None:
        self.sampler, self.dealer, self.in_use = sampler, dealer, in_use

    def __iter__(self) -> Iterator[_Turn]:
        while True:
            ahead = []
            for _ in range(1 if self.dealer is None else _AHEAD):
                step, items = self.sampler.step, next(self.sampler)
                ahead.append((step, items, self.sampler.state_dict()))
            batches = [items for _, items, _ in ahead]
            every = [Hand(np.arange(len(batch)), {}) for batch in batches]
            hands = every if self.dealer is None else self.dealer.hands(batches)
            for (step, items, state), hand in zip(ahead, hands, strict=True):
                yield _Turn(step, items, hand, state, None if self.in_use is None else self.in_use(step))
