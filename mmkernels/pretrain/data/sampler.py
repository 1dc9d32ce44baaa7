"""Batches of sample numbers, by count or by tokens, in an order that depends on (seed, epoch, step) alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mmkernels import plan_packing
from mmkernels.pretrain.blending import capped
from mmkernels.pretrain.data.seeds import Stream, generator
from mmkernels.pretrain.data.shares import Shares

__all__ = ["BatchSampler", "TokenSampler"]

_HALVINGS = 30  # of an interval that is searched


class _Dealt(ABC):
    """Endless batches, dealt anew in each epoch."""

    def __init__(self, samples: int, seed: int, shares: Shares | None = None) -> None:
        if shares is not None and len(shares) != samples:
            raise ValueError(f"shares: expected those of {samples} samples, got of {len(shares)}")
        self.samples, self.seed, self.shares = samples, seed, shares
        self.epoch = 0
        self.position = 0  # batches yielded in this epoch
        self.step = 0  # batches yielded in total
        self._batches = self._deal(0)
        if not self._batches:  # of a mixture alone: it may deal fewer concepts than it has
            raise ValueError(f"batch: expected at most the distinct concepts of an epoch, got {self._size()}")

    @abstractmethod
    def _deal(self, epoch: int) -> Sequence[np.ndarray]:
        """The batches of an epoch."""

    @abstractmethod
    def cut(self, order: np.ndarray, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Samples in order, int64 [n], as full batches; and those that are left over, to go on with."""

    @abstractmethod
    def size_of(self, shares: Sequence[float] | np.ndarray) -> float:
        """Samples of a batch, about, if the parts of the mixture have these shares."""

    @abstractmethod
    def possible(self, shares: Sequence[float]) -> list[float]:
        """Shares of the mixture's parts as near as batches, which have a sample or concept once, can come to these."""

    @abstractmethod
    def _size(self) -> int:
        """What bounds a batch."""

    def begin(self, epoch: int, step: int) -> None:
        """Go to the first batch of an epoch, after so many batches in total."""
        self.epoch, self.position, self.step = epoch, 0, step
        self._batches = self._deal(epoch)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch: int64, sample numbers."""
        while self.position == len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._deal(self.epoch)
        batch = self._batches[self.position]
        self.position += 1
        self.step += 1
        return batch

    @property
    def batches_per_epoch(self) -> int:
        """In the current epoch; it may vary between epochs."""
        return len(self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position; JSON-serialisable."""
        fixed: dict[str, Any] = {"seed": self.seed, "batch": self._size(), "samples": self.samples}
        if self.shares is not None:
            fixed["shares"] = self.shares.described()
        return {**fixed, "epoch": self.epoch, "position": self.position, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Data, seed, batch size and shares must be the same."""
        self.expect(state)
        if "mix" in state:
            raise ValueError("state: expected that of a run with fixed shares, got one whose shares change")
        self.epoch, self.position, self.step = int(state["epoch"]), int(state["position"]), int(state["step"])
        self._batches = self._deal(self.epoch)

    def expect(self, state: dict[str, Any]) -> None:
        """Raise ValueError unless a state is of the same data, seed, batch size and shares."""
        mine = self.state_dict()
        for name in ("seed", "batch", "samples", "shares"):
            if state.get(name) != mine.get(name):
                raise ValueError(f"state: expected {name} {mine.get(name)} as in this run, got {state.get(name)}")

    def _order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch: each once, or those that the shares deal."""
        if self.shares is not None:
            return self.shares.order(self.seed, epoch)
        return generator(self.seed, epoch, Stream.ORDER).permutation(self.samples)


class BatchSampler(_Dealt):
    """Endless batches of `batch` indices into a data set, no two of the same concept.

    Each epoch is a fresh permutation, or what the shares deal, split into batches; a sample whose concept is already in
    the batch moves to the next. An incomplete batch at the end of an epoch is dropped.

    Args:
        concepts: int64 [n], the concept of each sample.
        batch: samples per batch; at most the number of distinct concepts.
        seed: of the permutations.
        shares: of the parts of a mixture.

    Raises:
        ValueError: too few distinct concepts for a batch, or for a part's share of it.
    """

    def __init__(self, concepts: np.ndarray, batch: int, seed: int = 0, shares: Shares | None = None) -> None:
        distinct = len(np.unique(concepts))
        if not 1 <= batch <= distinct:
            raise ValueError(f"batch: expected 1 to {distinct} (the distinct concepts to train on), got {batch}")
        if shares is not None:
            shares.fit(concepts, batch)
        self.concepts, self.batch = np.asarray(concepts, np.int64), batch
        super().__init__(len(concepts), seed, shares)

    def _size(self) -> int:
        return self.batch

    def _deal(self, epoch: int) -> list[np.ndarray]:
        return self.cut(self._order(epoch), epoch)[0]

    def cut(self, order: np.ndarray, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        concepts = self.concepts.tolist()
        fresh, waiting = deque(order.tolist()), deque[int]()
        batches: list[list[int]] = []
        while True:
            batch: list[int] = []
            seen: set[int] = set()
            deferred = deque[int]()
            while len(batch) < self.batch and (waiting or fresh):
                index = waiting.popleft() if waiting else fresh.popleft()
                if concepts[index] in seen:
                    deferred.append(index)
                else:
                    seen.add(concepts[index])
                    batch.append(index)
            waiting = deferred + waiting
            if len(batch) < self.batch:
                return [np.array(each, np.int64) for each in batches], np.array([*batch, *waiting], np.int64)
            batches.append(batch)

    def size_of(self, shares: Sequence[float] | np.ndarray) -> float:
        return self.batch

    def possible(self, shares: Sequence[float]) -> list[float]:
        return capped(shares, self._most)

    @cached_property
    def _most(self) -> list[float]:
        assert self.shares is not None
        return self.shares.most(self.concepts, self.batch)


class TokenSampler(_Dealt):
    """Endless batches of at most `tokens` tokens, planned by `plan_packing`; every sample occurs once in an epoch, or
    as often as the shares deal it.

    Args:
        lengths: int [n], tokens of each sample.
        tokens: most in a batch.
        max_samples: most samples in a batch; None for no bound.
        seed: of the order.
        shares: of the parts of a mixture.

    Raises:
        ValueError: a sample is longer than a batch; no samples.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        tokens: int,
        max_samples: int | None = None,
        seed: int = 0,
        shares: Shares | None = None,
    ) -> None:
        self.lengths, self.tokens, self.max_samples = np.asarray(lengths, np.int64), tokens, max_samples
        if not len(self.lengths):
            raise ValueError("lengths: expected at least one sample, got none")
        if self.lengths.max() > tokens:
            longest = f"sample {self.lengths.argmax()} has {self.lengths.max()}"
            raise ValueError(f"tokens: expected at least the longest sample's, got {tokens}, but {longest}")
        super().__init__(len(self.lengths), seed, shares)

    def _size(self) -> int:
        return self.tokens

    def _deal(self, epoch: int) -> list[np.ndarray]:
        dealt = np.arange(self.samples) if self.shares is None else self._order(epoch)
        packs = self._packs(dealt, (self.seed << 32) + epoch + 1)
        # Best-fit leaves the emptiest packs last; a batch must not depend on the place in the epoch.
        return [packs[i] for i in generator(self.seed, epoch, Stream.ORDER).permutation(len(packs))]

    def _packs(self, order: np.ndarray, seed: int) -> list[np.ndarray]:
        plan = plan_packing(self.lengths[order], self.tokens, max_samples=self.max_samples, seed=seed)
        return self._apart([order[np.asarray(plan[i])] for i in range(plan.num_packs)])

    def cut(self, order: np.ndarray, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The emptiest is not full."""
        packs = self._packs(order, seed)
        emptiest = min(range(len(packs)), key=lambda i: int(self.lengths[packs[i]].sum()), default=None)
        return packs, order if emptiest is None else packs.pop(emptiest)

    def size_of(self, shares: Sequence[float] | np.ndarray) -> float:
        assert self.shares is not None
        mean = math.fsum(share * of for share, of in zip(shares, self._means, strict=True)) / math.fsum(shares)
        return min(self.tokens / max(mean, 1e-9), self.max_samples or self.samples, self.samples)

    @cached_property
    def _means(self) -> list[float]:
        """Tokens of a sample of each part."""
        assert self.shares is not None
        return [float(part.mean()) for part in np.split(self.lengths, np.cumsum(self.shares.sizes)[:-1])]

    def possible(self, shares: Sequence[float]) -> list[float]:
        """On the way from shares by size, of which a batch never has a sample twice. How many samples it has depends on
        the shares."""
        assert self.shares is not None
        sizes, wanted = np.array(self.shares.sizes), np.array(shares) / math.fsum(shares)

        def mixed(far: float) -> np.ndarray:
            found: np.ndarray = (1 - far) * sizes / sizes.sum() + far * wanted
            return found

        def fits(far: float) -> bool:
            return bool((mixed(far) * self.size_of(mixed(far)) <= sizes * (1 + 1e-9)).all())

        if fits(1.0):
            return [float(share) for share in wanted]
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return [float(share) for share in mixed(low)]

    def _apart(self, packs: list[np.ndarray]) -> list[np.ndarray]:
        """A sample that is dealt twice, in different batches: its second occurrence moves where there is room."""
        apart = [list(dict.fromkeys(pack.tolist())) for pack in packs]
        moved = [i for pack in packs for i, n in Counter(pack.tolist()).items() for _ in range(n - 1)]
        free = [self.tokens - int(self.lengths[pack].sum()) for pack in apart]
        for index in moved:
            needs = int(self.lengths[index])
            room = (
                i
                for i, pack in enumerate(apart)
                if free[i] >= needs and index not in pack and len(pack) < (self.max_samples or len(pack) + 1)
            )
            place = next(room, len(apart))
            if place == len(apart):
                apart.append([])
                free.append(self.tokens)
            apart[place].append(index)
            free[place] -= needs
        return [np.array(pack, np.int64) for pack in apart]
