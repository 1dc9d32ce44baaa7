"""Batches of a mixture whose shares change while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmkernels.pretrain.data.sampler import BatchSampler, TokenSampler
from mmkernels.pretrain.data.seeds import Stream, generator

__all__ = ["WindowedSampler"]

_WAITING = 8  # batches' worth of samples that may wait for the next window
_SPREAD = 1  # block of counters of the order within a window; that of an epoch is 0


class _Place(NamedTuple):
    """How far the parts of a mixture have been dealt."""

    dealt: list[int]  # samples of each part's endless passes
    owed: list[float]  # what is left of its share: less than a sample or so
    waiting: list[int]  # samples that were dealt and are in no batch yet

    def further(self, count: int, shares: Sequence[float]) -> _Place:
        """After so many samples more: the parts get whole numbers of them, and what is left is owed."""
        owed = [has + share * count for has, share in zip(self.owed, shares, strict=True)]
        counts = [max(0, math.floor(each)) for each in owed]
        while (left := count - sum(counts)) != 0:  # largest remainder; of ties the first
            part = max(range(len(owed)), key=lambda i: (owed[i] - counts[i]) * left if counts[i] or left > 0 else -1e9)
            counts[part] += 1 if left > 0 else -1
        dealt = [has + n for has, n in zip(self.dealt, counts, strict=True)]
        return _Place(dealt, [has - n for has, n in zip(owed, counts, strict=True)], self.waiting)


class WindowedSampler:
    """Endless batches, dealt anew in each window of steps, by the shares that hold in it.

    Each part goes on where it was, pass after pass, so all of it is seen as long as it has a share. What does not fit
    into the batches of a window is the first of the next, up to some batches' worth: more of a concept than batches can
    have is left out of a pass, as at the end of an epoch. Shares are exact over the windows, to within a sample.

    Args:
        base: how samples make a batch; it has the parts.
        shares_at: step -> shares of the parts in its window, positive; those that batches cannot have are bounded. It
            is asked when the first batch of a window is, which may be long before that step.
        every: steps of a window; windows begin at multiples of it.
    """

    def __init__(
        self, base: BatchSampler | TokenSampler, shares_at: Callable[[int], Sequence[float]], every: int
    ) -> None:
        assert base.shares is not None
        self.base, self.shares_at, self.every, self.parts = base, shares_at, every, base.shares
        self.begin(0, 0)

    def begin(self, epoch: int, step: int) -> None:
        """Begin with the pass of that number of every part, after so many batches in total."""
        self.step = step
        self._shares: list[float] = []  # of this window; empty: none has begun
        self._batches: list[np.ndarray] = []  # of this window
        self._place = 0  # batches of it that were yielded
        # Before and after this window:
        self._begun = self._ended = _Place([epoch * n for n in self.parts.sizes], [0.0] * len(self.parts.sizes), [])

    @property
    def epoch(self) -> int:
        """How many passes the part that is furthest has begun."""
        return max(-(-dealt // size) for dealt, size in zip(self._ended.dealt, self.parts.sizes, strict=True))

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch: int64, sample numbers."""
        if self._place == len(self._batches):
            self._begun, self._place = self._ended, 0
            self._deal(self.base.possible(self.shares_at(self.step)))
        batch = self._batches[self._place]
        self._place += 1
        self.step += 1
        return batch

    def _deal(self, shares: list[float]) -> None:
        """The batches of the window that has begun `_place` steps ago."""
        first = self.step - self._place
        wanted, base, seed = self.every - first % self.every, self.base, (self.base.seed << 32) + first + 1
        spread, size = generator(base.seed, first, Stream.ORDER, _SPREAD), base.size_of(shares)
        bound = math.ceil(_WAITING * size)
        now, rest, batches = self._begun, np.array(self._begun.waiting, np.int64), list[np.ndarray]()
        missing, least = wanted * size - len(rest), size / 2
        while len(batches) < wanted:
            then = now.further(max(1, math.ceil(missing)), shares)
            order = np.concatenate([rest, self.parts.between(base.seed, now.dealt, then.dealt, spread)])
            (new, rest), now = base.cut(order, seed), then
            batches, rest = [*batches, *new], rest[:bound]
            least = min(1.5 * least, wanted * size)  # so that even of one concept in all, a few others are soon found
            missing = max(size * (wanted - len(batches)) - len(rest), least)
        waited = set(self._begun.waiting)  # they come first, so that none waits for long
        batches.sort(key=lambda batch: waited.isdisjoint(batch.tolist()))
        self._batches = [batches[i] for i in spread.permutation(wanted)]
        left = [*rest.tolist(), *(index for batch in batches[wanted:] for index in batch.tolist())]
        self._shares, self._ended = shares, now._replace(waiting=left[:bound])

    def state_dict(self) -> dict[str, Any]:
        """The position, and what the window's batches follow from; JSON-serialisable."""
        fixed = {name: value for name, value in self.base.state_dict().items() if name not in ("epoch", "position")}
        return {**fixed, **self._begun._asdict(), "mix": self._shares, "step": self.step, "position": self._place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Data, seed, batch size and shares must be the same."""
        self.base.expect(state)
        if "mix" not in state:
            raise ValueError("state: expected that of a run whose shares change, got one with fixed shares")
        self.step, self._place = int(state["step"]), int(state["position"])
        self._begun = self._ended = _Place(*(list(state[name]) for name in _Place._fields))
        self._shares, self._batches = [], []
        if state["mix"]:
            self._deal(list(state["mix"]))
