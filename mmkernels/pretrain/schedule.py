"""What holds at a step: weights of the objectives, what trains, how deep the fusion is. Functions of the step, and of
what a policy has measured before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mmkernels.pretrain.data.seeds import Stream, generator
from mmkernels.pretrain.policies import weighed
from mmkernels.pretrain.recipe import Ramp, Recipe, Stage

__all__ = [
    "at",
    "check_mixing",
    "check_policy",
    "check_stages",
    "data_shares",
    "drawn",
    "freeze",
    "had_steps",
    "in_use",
    "learning",
    "learning_rate",
    "learns",
    "reached",
    "rest",
    "samplings",
    "shares_at",
    "stage_at",
    "step_seed",
    "unreached",
    "weights_at",
]


def at(value: float | Ramp, step: int) -> float:
    """A number, or a ramp's value at a step."""
    if not isinstance(value, Ramp):
        return float(value)
    return value.start + (value.end - value.start) * min(1.0, step / max(1, value.steps))


def stage_at(recipe: Recipe, step: int) -> Stage:
    """The stage of a step; the last one lasts."""
    return next((stage for stage in recipe.stages if stage.until is None or step < stage.until), recipe.stages[-1])


def shares_at(recipe: Recipe, step: int, factors: Mapping[str, float] | None = None) -> dict[str, float]:
    """The weights of a step before one of them may be drawn: with `draw`, the odds.

    Args:
        recipe: of the run.
        step: of the run.
        factors: of a policy, for this step: logarithms.
    """
    names = stage_at(recipe, step).objectives
    weights = {
        name: at(part.weight, step) for name, part in recipe.objectives.items() if names is None or name in names
    }
    weights = {name: weight for name, weight in weights.items() if weight > 0}
    if not weights:
        raise ValueError(f"objectives: expected one with a weight above 0 at step {step}, got none")
    return weighed(weights, factors or {}, recipe.policy.floor)


def samplings(recipe: Recipe, usual: Sequence[Any]) -> list[tuple[int | None, int]]:
    """Where samples begin to be drawn otherwise: (the step before which that ends, number of the stage).

    Args:
        recipe: of the run.
        usual: what holds in stages that say nothing, as in `Stage.sampling`.
    """
    stages = recipe.stages
    ways = [[of if own is None else own for own, of in zip(stage.sampling, usual, strict=True)] for stage in stages]
    first = [i for i in range(len(stages)) if not i or ways[i] != ways[i - 1]]
    ends = [*(stages[after - 1].until for after in first[1:]), None]
    return list(zip(ends, first, strict=True))


def weights_at(recipe: Recipe, seed: int, step: int, factors: Mapping[str, float] | None = None) -> dict[str, float]:
    """The objectives in use at a step, with their weights; with `draw`, one of them, drawn by weight, with weight 1."""
    return drawn(recipe, seed, step, shares_at(recipe, step, factors))


def drawn(recipe: Recipe, seed: int, step: int, weights: dict[str, float]) -> dict[str, float]:
    """The weights themselves; with `draw`, one of the objectives, drawn by weight, with weight 1."""
    if recipe.draw and len(weights) > 1:
        chosen = generator(seed, step, Stream.OBJECTIVE).random() * math.fsum(weights.values())
        for name, weight in weights.items():
            chosen -= weight
            if chosen < 0:
                return {name: 1.0}
        return {name: 1.0}
    return weights


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of what encoders draw in a step, such as dropout: nothing to store, and other numbers on each rank."""
    return int(generator(seed, step, Stream.ENCODERS, rank).integers(2**63))


def in_use(recipe: Recipe, seed: int, step: int, factors: Mapping[str, float] | None = None) -> frozenset[str]:
    """The names of the objectives in use at a step."""
    return frozenset(weights_at(recipe, seed, step, factors))


def learns(name: str, patterns: Sequence[str]) -> bool:
    """Whether a parameter's name fits one of the patterns, and none of those that begin with "!"."""
    fits = [pattern for pattern in patterns if fnmatchcase(name, pattern.removeprefix("!"))]
    return bool(fits) and not any(pattern.startswith("!") for pattern in fits)


def learning(model: nn.Module, stage: Stage) -> list[str]:
    """Names of the parameters that learn in a stage.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in stage.trainable:
        if not any(fnmatchcase(name, pattern.removeprefix("!")) for name in names):
            raise ValueError(
                f"stages: trainable: expected patterns of parameter names, got {pattern!r}, which fits none"
            )
    return [name for name in names if learns(name, stage.trainable)]


def freeze(model: nn.Module, stage: Stage) -> int:
    """Let the parameters that match the stage's patterns learn, and no others; returns their number. Raises as
    `learning` does."""
    names, count = set(learning(model, stage)), 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        count += parameter.numel() if parameter.requires_grad else 0
    return count


def rest(module: nn.Module, learns: bool = True) -> None:
    """Let each module in which nothing learns run as in evaluation: without dropout, its norms' statistics as they are.
    One without parameters does as what it belongs to, which `learns` or not."""
    own = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(own) if own else learns
    for child in module.children():
        rest(child, module.training)


def check_policy(recipe: Recipe, workers: int) -> None:
    """Raise ValueError if a policy has nothing to choose between, or cannot know the odds of batches that are read
    ahead: a DataLoader has two batches of each worker under way."""
    policy, ahead = recipe.policy, 2 * workers
    if policy.measures and len(recipe.objectives) < 2:
        only = ", ".join(recipe.objectives)
        raise ValueError(f"policy.kind: expected fixed, since {only} is the only objective, got {policy.kind}")
    if policy.measures and recipe.draw and policy.every < ahead:
        why = f"the batches that {workers} workers read ahead, since one objective a step is drawn"
        raise ValueError(f"policy.every: expected at least {ahead}, {why}, got {policy.every}")


def data_shares(recipe: Recipe, step: int, usual: Sequence[float]) -> list[float]:
    """The shares of a mixture's parts at a step, without what is measured: positive, they add up to 1.

    Args:
        recipe: of the run.
        step: of the run.
        usual: what holds in stages that say nothing.
    """
    mixing, now = recipe.mixing, stage_at(recipe, step).data_weights or usual
    found = [weight / math.fsum(now) for weight in now]
    if mixing.to is None:
        return found
    ends = [weight / math.fsum(mixing.to) for weight in mixing.to]
    return [at(Ramp(start, end, mixing.steps), step) for start, end in zip(found, ends, strict=True)]


def check_mixing(recipe: Recipe, parts: Sequence[str], workers: int) -> None:
    """Raise ValueError if shares are to change and there are no several parts, or those that are measured would have to
    be known of batches that are read ahead: two of each worker, which are dealt four at a time."""
    mixing, ahead = recipe.mixing, 2 * workers + 4
    if mixing.changes and len(parts) < 2:
        raise ValueError(f"mixing.kind: expected fixed, since the data are no mixture (A::B), got {mixing.kind}")
    if mixing.to is not None and not (len(mixing.to) == len(parts) and all(0 < w < math.inf for w in mixing.to)):
        got = " ".join(map(str, mixing.to))
        raise ValueError(f"mixing.to: expected a positive number for each of {', '.join(parts)}, got {got}")
    if mixing.measures and mixing.every < ahead:
        why = f"as many batches as may be dealt ahead of a step (--workers {workers})"
        raise ValueError(f"mixing.every: expected at least {ahead}, {why}, got {mixing.every}")


def check_stages(recipe: Recipe, model: nn.Module) -> None:
    """Raise ValueError if a stage is out of order, or names what there is not, so that no run stops in the middle."""
    before, layers = 0, len(getattr(getattr(model, "fusion", None), "layers", ()))
    for i, stage in enumerate(recipe.stages):
        where, until = f"stages[{i}]", stage.until
        if until is None and i + 1 < len(recipe.stages):
            raise ValueError(f"{where}: until: expected a step, since another stage follows, got None")
        if until is not None and until < before:
            raise ValueError(f"{where}: until: expected at least {before}, where the stage begins, got {until}")
        if not stage.lr_scale > 0:
            raise ValueError(f"{where}: lr_scale: expected a positive number, got {stage.lr_scale}")
        names = recipe.objectives if stage.objectives is None else stage.objectives
        if not names or set(names) - set(recipe.objectives):
            known = ", ".join(recipe.objectives)
            raise ValueError(f"{where}: objectives: expected some of {known}, got {', '.join(names) or 'none'}")
        if stage.fusion_depth is not None and not 0 <= stage.fusion_depth <= layers:
            raise ValueError(f"{where}: fusion_depth: expected 0 to {layers} layers, got {stage.fusion_depth}")
        for name in ("batch", "tokens", "chunk"):
            if (size := getattr(stage, name)) is not None and size < 1:
                raise ValueError(f"{where}: {name}: expected None or at least 1, got {size}")
        if not learning(model, stage):
            raise ValueError(f"{where}: trainable: expected something to learn, got {', '.join(stage.trainable)}")
        before = before if until is None else until


def _spans(recipe: Recipe, steps: int) -> list[tuple[Stage, int, int]]:
    """Each stage with the step it begins at and the one it ends before; the last one lasts."""
    ends = [stage.until or 0 for stage in recipe.stages[:-1]]
    return list(zip(recipe.stages, [0, *ends], [*ends, steps], strict=True))


def reached(recipe: Recipe, steps: int) -> tuple[Stage, ...]:
    """The stages that have some of a run's steps."""
    return tuple(stage for stage, begin, end in _spans(recipe, steps) if begin < min(end, steps))


def had_steps(recipe: Recipe, steps: int) -> set[str]:
    """The objectives whose weight is above 0 in some of the first steps."""
    return {
        name
        for stage, begin, end in _spans(recipe, steps)
        for name, part in recipe.objectives.items()
        if begin < (last := min(end, steps)) and (stage.objectives is None or name in stage.objectives)
        if max(at(part.weight, begin), at(part.weight, last - 1)) > 0
    }


def unreached(recipe: Recipe, steps: int) -> list[str]:
    """What to say of the stages that a run of some steps does not get to, and of shares that it does not measure."""
    every, late = len(recipe.stages), sum(begin >= steps for _, begin, _ in _spans(recipe, steps))
    mixing = recipe.mixing
    first = mixing.every * (1 if mixing.kind == "grad_norm" else 2)
    said = []
    if late:
        begins = "begins" if late == 1 else "begin"
        said.append(f"stages: the run ends at step {steps}, before {late} of its {every} stages {begins}")
    if mixing.measures and steps <= first:
        said.append(f"mixing.every: the run ends at step {steps}; what is measured changes shares from step {first} on")
    return said


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
