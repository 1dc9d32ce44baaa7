"""Held-out figures: every metric of a recipe on every held-out set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.ranks import ALONE, Ranks

__all__ = ["distinct", "evaluate", "evaluating"]


def evaluate(
    model: nn.Module,
    metrics: Sequence[Any],
    held_out: Mapping[str, HeldOut],
    memory: dict[tuple[str, ...], Any] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, list[Figure]]:
    """Figures by split, in evaluation mode and without gradients; random state and mode stay as they were. No two of a
    split have one name.

    Args:
        model: to measure.
        metrics: parts of recipes.
        held_out: by split.
        memory: what metrics share (see `HeldOut.once`), to go on with in a further call for the same model.
        ranks: who share the work; each measures some of the metrics, those of a split next to each other.
    """
    memory = {} if memory is None else memory
    every = [(split, metric) for split in held_out for metric in metrics]
    first, last = (part * len(every) // ranks.size for part in (ranks.rank, ranks.rank + 1))

    def measured() -> list[list[Figure]]:
        with evaluating(model):
            return [
                metric.measure(model, replace(held_out[split], memory=memory)) for split, metric in every[first:last]
            ]

    mine = ranks.together(measured)
    found: dict[str, list[Figure]] = {split: [] for split in held_out}
    for (split, _), figures in zip(every, chain(*ranks.objects(mine)), strict=True):
        found[split] += figures
    for one in held_out.values() if ranks.group is not None else ():
        for source in (one.source, one.train):  # what one rank could not read, all know of
            for name, reason in {
                k: v for reasons in ranks.objects(dict(source.broken.reasons)) for k, v in reasons.items()
            }.items():
                source.broken.add(name, reason)
    return {split: distinct(figures) for split, figures in found.items()}


def distinct(figures: Iterable[Figure]) -> list[Figure]:
    """The same figures in the same order; the second of a name is "NAME (2)", as of two metrics that differ in how they
    measure."""
    met: Counter[str] = Counter()
    found = []
    for figure in figures:
        met[figure.name] += 1
        number = met[figure.name]
        found.append(figure if number == 1 else replace(figure, name=f"{figure.name} ({number})"))
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]  # what is frozen may rest
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
