"""One part of a report, and what parts are made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.report.shown import spread

Kind = type[Any] | tuple[type[Any], ...]

__all__ = ["Guess", "Run", "Section", "first_set", "guesses", "objectives_of", "some", "titled"]


@dataclass(frozen=True)
class Section:
    """A headline, a sentence below it, and what its template shows."""

    template: str  # its name in templates/
    title: str
    about: str
    content: Any


class Run(Protocol):
    """What examples are made of; a `Trainer` is one."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def trained(self) -> Any:
        """The model."""
        ...

    @property
    def held_out(self) -> Mapping[str, HeldOut]: ...


@dataclass(frozen=True)
class Guess:
    """One of several classes or tokens that a model may choose."""

    name: str
    probability: float
    right: bool


def guesses(logits: Tensor, target: int, names: Any, k: int = 3) -> list[Guess]:
    """The k likeliest of the classes, [K] logits; names: class -> its name."""
    likely = logits.float().softmax(-1).topk(min(k, len(logits)))
    pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    return [Guess(names(i), p, i == target) for i, p in pairs]


def objectives_of(run: Run, kind: Kind) -> Iterator[tuple[str, Any]]:
    """(name, module) of every objective of a kind."""
    for name, module in run.trained.objectives.items():
        if isinstance(module, kind):
            yield name, module


def titled(words: str, name: str, run: Run, kind: Kind) -> str:
    """The title of an objective's section; its name is said where there are several of the kind."""
    several = sum(1 for _ in objectives_of(run, kind)) > 1
    return f"{words}: {name}" if several else words


def first_set(run: Run) -> HeldOut | None:
    """The held-out set whose samples are shown: the first that has any."""
    return next((held_out for held_out in run.held_out.values() if len(held_out.source)), None)


def some(held_out: HeldOut, count: int, mode: Any = "plain", objective: str = "") -> Batch | None:
    """A batch of evenly spaced samples; None if none of them can be read."""
    items = held_out.items()
    chosen = [items[i] for i in spread(len(items), count)]
    return next(replace(held_out, samples=count).batches(mode, items=chosen, objective=objective), None)
