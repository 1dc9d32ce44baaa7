"""A schedule of unfreezing in words, `head:100,fusion:300,all`, to the stages of a recipe.

    schedule   item,item,...      in the order in which parts begin to learn; what learns goes on learning
    item       parts[:step]       until this step no further parts learn; the last item lasts, so it has none
    parts      part+part+...      head, fusion, all, the name of a stream, or a pattern of parameter names with a "*"

Source: Howard and Ruder 2018 (arXiv:1801.06146), gradual unfreezing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmkernels.pretrain.recipe import Stage

__all__ = ["EVERYTHING", "stages_of"]

EVERYTHING = ("*",)


def stages_of(schedule: str, named: Mapping[str, Sequence[str]]) -> tuple[Stage, ...]:
    """The stages of a schedule.

    Args:
        schedule: see above.
        named: part -> the patterns of its parameters' names; "all" is known besides.

    Raises:
        ValueError: an unknown part, a step that is missing, misplaced, or not later than the one before.
    """
    items = [item.strip() for item in schedule.split(",")]
    stages: list[Stage] = []
    learns: dict[str, None] = {}
    before = 0
    for i, item in enumerate(items):
        parts, colon, step = (each.strip() for each in item.partition(":"))
        last = i == len(items) - 1
        if last and colon:
            raise ValueError(f"unfreeze: expected the last item without a step, since it lasts, got {item!r}")
        if not last and not (step.isascii() and step.isdecimal() and int(step) > before):
            raise ValueError(f"unfreeze: expected PARTS:STEP with a step after {before}, got {item!r} in {schedule!r}")
        for part in parts.split("+"):
            learns |= dict.fromkeys(_patterns(part.strip(), named))
        before = before if last else int(step)
        stages.append(Stage(until=None if last else before, trainable=tuple(learns)))
    return tuple(stages)


def _patterns(part: str, named: Mapping[str, Sequence[str]]) -> Sequence[str]:
    if "*" in part:
        return (part,)
    if part != "all" and part not in named:
        known = ", ".join([*named, "all"])
        raise ValueError(f'unfreeze: expected one of {known}, or a pattern with a "*", got {part!r}')
    return EVERYTHING if part == "all" else named[part]
