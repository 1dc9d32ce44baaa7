"""Held-out figures: every metric of a recipe on every held-out set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["distinct", "evaluate", "evaluating"]


def evaluate(
    model: nn.Module,
    metrics: Sequence[Any],
    held_out: Mapping[str, HeldOut],
    memory: dict[tuple[str, ...], Any] | None = None,
) -> dict[str, list[Figure]]:
    """Figures by split, in evaluation mode and without gradients; random state and mode stay as they were. No two of a
    split have one name.

    Args:
        model: to measure.
        metrics: parts of recipes.
        held_out: by split.
        memory: what metrics share (see `HeldOut.once`), to go on with in a further call for the same model.
    """
    memory = {} if memory is None else memory
    with evaluating(model):
        return {
            name: distinct(f for metric in metrics for f in metric.measure(model, replace(one, memory=memory)))
            for name, one in held_out.items()
        }


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
