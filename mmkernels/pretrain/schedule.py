"""What holds at a step: weights of the objectives, what trains, how deep the fusion is. Functions of the step alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from mmkernels.pretrain.data.seeds import Stream, generator
from mmkernels.pretrain.recipe import Ramp, Recipe, Stage

__all__ = ["at", "freeze", "learning_rate", "stage_at", "weights_at"]


def at(value: float | Ramp, step: int) -> float:
    """A number, or a ramp's value at a step."""
    if not isinstance(value, Ramp):
        return float(value)
    return value.start + (value.end - value.start) * min(1.0, step / max(1, value.steps))


def stage_at(recipe: Recipe, step: int) -> Stage:
    """The stage of a step; the last one lasts."""
    return next((stage for stage in recipe.stages if stage.until is None or step < stage.until), recipe.stages[-1])


def weights_at(recipe: Recipe, seed: int, step: int) -> dict[str, float]:
    """The objectives in use at a step, with their weights; with `draw`, one of them, drawn by weight, with weight 1."""
    names = stage_at(recipe, step).objectives
    weights = {
        name: at(part.weight, step) for name, part in recipe.objectives.items() if names is None or name in names
    }
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if recipe.draw and len(weights) > 1:
        chosen = generator(seed, step, Stream.OBJECTIVE).random() * math.fsum(weights.values())
        for name, weight in weights.items():
            chosen -= weight
            if chosen < 0:
                return {name: 1.0}
        return {name: 1.0}
    return weights


def freeze(model: nn.Module, stage: Stage) -> int:
    """Let the parameters that match the stage's patterns learn, and no others; returns their number.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in stage.trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"stages: trainable: expected patterns of parameter names, got {pattern!r}, which fits none"
            )
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in stage.trainable))
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def learning_rate(lr: float, warmup: int, steps: int, step: int) -> float:
    """Linear warm-up, then cosine decay to zero at the last step."""
    if step < warmup:
        return lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def total(weights: Mapping[str, float], chances: Mapping[str, float | None]) -> float | None:
    """The loss at chance of all objectives together, if each has one."""
    values = [chances[name] for name in weights]
    if any(value is None for value in values):
        return None
    return math.fsum(weight * (chances[name] or 0.0) for name, weight in weights.items())
