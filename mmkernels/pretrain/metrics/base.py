"""What every metric has, and the held-out data that it measures on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data.base import Source
from mmkernels.pretrain.data.collate import Collator, Mode
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.metrics.figure import Figure

__all__ = ["Each", "Figure", "HeldOut", "Metric"]

T = TypeVar("T")


class Metric(Protocol):
    """A frozen dataclass in a recipe."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        """The figures of a model, which is in evaluation mode, without gradients."""
        ...


@dataclass(frozen=True, eq=False)
class Each:
    """The values that a figure is the mean of. A metric with a method `each` can be split by groups (see `Groups`)."""

    name: str
    values: np.ndarray  # bool or float64 [n]
    items: np.ndarray  # int64 [n]: the number of the sample that each is about
    clusters: np.ndarray  # int64 [n]: those that are not independent share one: the concept of the sample
    targets: np.ndarray | None = None  # int64 [n]: what was to be guessed; chance is the share of the most frequent
    guess: float | None = None  # or chance itself

    @property
    def chance(self) -> float | None:
        if self.targets is None or not len(self.targets):
            return self.guess
        return float(np.unique(self.targets, return_counts=True)[1].max() / len(self.targets))

    def of(self, chosen: np.ndarray) -> Each:
        """Those of bool [n]."""
        targets = None if self.targets is None else self.targets[chosen]
        values, items, clusters = (x[chosen] for x in (self.values, self.items, self.clusters))
        return Each(self.name, values, items, clusters, targets, self.guess)

    def figure(self, **more: Any) -> Figure:
        return Figure.of_each(self.name, self.values, self.chance, clusters=self.clusters, **more)


@dataclass(frozen=True)
class HeldOut:
    """A held-out set, in batches.

    Args:
        name: of the split.
        source: its samples.
        collator: of the run.
        device: of the batches.
        train: the training data, for metrics that fit something to it.
        samples: at a time.
        limit: most samples, evenly spaced; None for all.
        memory: of one evaluation of one model, see `once`; None: nothing is remembered.
    """

    name: str
    source: Source
    collator: Collator
    device: torch.device
    train: Source
    samples: int = 128
    limit: int | None = None
    memory: dict[tuple[str, ...], Any] | None = None

    def once(self, key: tuple[str, ...], make: Callable[[], T]) -> T:
        """What `make` returns: made once in an evaluation, though several metrics and splits ask for it by its key."""
        if self.memory is None:
            return make()
        if key not in self.memory:
            self.memory[key] = make()
        found: T = self.memory[key]
        return found

    def items(self, most: int | None = None) -> list[int]:
        """The numbers of the samples in use, or of at most so many of them."""
        chosen = spaced(len(self.source), self.limit)
        return chosen[spaced(len(chosen), most)].tolist()

    def batches(
        self,
        mode: Mode = "plain",
        of: Source | None = None,
        items: Sequence[int] | None = None,
        objective: str = "",
    ) -> Iterator[Batch]:
        """Batches of the readable samples, in order, on the device.

        Args:
            mode: which views apply, see `Collator`.
            of: another source, such as `train`.
            items: numbers of its samples; None: those in use.
            objective: whose views apply, for mode loss; empty: those of all.
        """
        source, numbers = of or self.source, self.items() if items is None else list(items)
        for first in range(0, len(numbers), self.samples):
            read = source.read_some(numbers[first : first + self.samples])
            for name, reason in read.broken.items():
                source.broken.add(name, reason)
            if read.samples:
                yield self.collator(read.samples, read.items, mode=mode, objective=objective).to(self.device)
