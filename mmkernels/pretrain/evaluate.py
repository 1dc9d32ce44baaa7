"""Held-out figures: every metric of a recipe on every held-out set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.figure import distinct

__all__ = ["evaluate", "evaluating"]


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
