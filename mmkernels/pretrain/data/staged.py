"""Batches of a run whose stages draw samples in different ways."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from mmkernels.pretrain.data.sampler import BatchSampler, TokenSampler
from mmkernels.pretrain.data.windowed import WindowedSampler

__all__ = ["StagedSampler"]


class StagedSampler:
    """One sampler after another; each begins an epoch, since its batches are others.

    Args:
        parts: (the step before which it ends, sampler); the last one lasts. The samplers have the same seed.
    """

    def __init__(self, parts: Sequence[tuple[int | None, BatchSampler | TokenSampler | WindowedSampler]]) -> None:
        self.parts, self.part = list(parts), 0

    @property
    def now(self) -> BatchSampler | TokenSampler | WindowedSampler:
        """The one in use."""
        return self.parts[self.part][1]

    @property
    def step(self) -> int:
        return self.now.step

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        before = self.now
        while (until := self.parts[self.part][0]) is not None and before.step >= until:
            self.part += 1
        if self.now is not before:
            self.now.begin(before.epoch + 1, before.step)  # an order that has not been seen
        return next(self.now)

    def state_dict(self) -> dict[str, Any]:
        """The position in the sampler in use, and which one that is; JSON-serialisable."""
        return {**self.now.state_dict(), "part": self.part}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken. Stages, data and seed must be the same."""
        part = state.get("part", 0)
        if part >= len(self.parts):
            raise ValueError(f"state: expected one of {len(self.parts)} parts as in this run, got part {part}")
        self.parts[part][1].load_state_dict(state)
        self.part = part
