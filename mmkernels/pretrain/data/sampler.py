"""Batches of indices in which a concept occurs at most once, in an order that depends on (seed, epoch, step) alone."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from mmkernels.pretrain.data.seeds import Stream, generator


class BatchSampler:
    """Endless batches of `batch_size` indices into a data set, no two of the same concept.

    Each epoch is a fresh permutation, split into batches; a sample whose concept is already in the batch moves to the
    next. An incomplete batch at the end of an epoch is dropped.

    Args:
        concepts: int64 [n], the concept of each sample.
        batch_size: samples per batch; at most the number of distinct concepts.
        seed: of the permutations.
    """

    def __init__(self, concepts: np.ndarray, batch_size: int, seed: int = 0) -> None:
        distinct = len(np.unique(concepts))
        if not 1 <= batch_size <= distinct:
            raise ValueError(
                f"batch_size: expected 1 to {distinct} (the distinct concepts to train on), got {batch_size}"
            )
        self.concepts = np.asarray(concepts, np.int64)
        self.batch_size, self.seed = batch_size, seed
        self.epoch = 0
        self.position = 0  # batches yielded in this epoch
        self.step = 0  # batches yielded in total
        self._batches = self._deal(0)

    def __iter__(self) -> BatchSampler:
        return self

    def __next__(self) -> np.ndarray:
        """The next batch: int64 [batch_size]."""
        if self.position == len(self._batches):
            self.epoch, self.position = self.epoch + 1, 0
            self._batches = self._deal(self.epoch)
        batch = self._batches[self.position]
        self.position += 1
        self.step += 1
        return batch

    @property
    def batches_per_epoch(self) -> int:
        """In the current epoch; the number of dropped samples varies between epochs."""
        return len(self._batches)

    def _deal(self, epoch: int) -> np.ndarray:
        order = generator(self.seed, epoch, Stream.ORDER).permutation(len(self.concepts))
        concepts = self.concepts.tolist()
        fresh, waiting = deque(order.tolist()), deque[int]()
        batches: list[list[int]] = []
        while True:
            batch: list[int] = []
            seen: set[int] = set()
            deferred = deque[int]()
            while len(batch) < self.batch_size and (waiting or fresh):
                index = waiting.popleft() if waiting else fresh.popleft()
                if concepts[index] in seen:
                    deferred.append(index)
                else:
                    seen.add(concepts[index])
                    batch.append(index)
            waiting = deferred + waiting
            if len(batch) < self.batch_size:
                return np.array(batches, np.int64).reshape(-1, self.batch_size)
            batches.append(batch)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's position; JSON-serialisable."""
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": len(self.concepts),
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. The data, the seed and the batch size must be the same."""
        mine = self.state_dict()
        for name in ("seed", "batch_size", "samples"):
            if state[name] != mine[name]:
                raise ValueError(f"state: expected {name} {mine[name]} as in this run, got {state[name]}")
        self.epoch, self.position, self.step = int(state["epoch"]), int(state["position"]), int(state["step"])
        self._batches = self._deal(self.epoch)
