"""The wiring of a recipe as a picture in text."""

from __future__ import annotations

import dataclasses
from typing import Any

from mmkernels.pretrain.recipe import Ramp, Recipe, Stream

__all__ = ["picture"]


def picture(name: str, recipe: Recipe) -> str:
    """Streams, fusion and objectives, top to bottom, then what holds during the run."""
    lines = [f"{name}: {recipe.summary}", f"{recipe.source}; data: {recipe.data}", ""]
    widest = max(len(stream) for stream in recipe.streams)
    for i, (stream, part) in enumerate(recipe.streams.items()):
        lines.append(f"  {stream:<{widest}} {_chain(stream, part)} ─{_joint(i, len(recipe.streams))}")
    column = max(len(line) for line in lines[3:]) - 1
    lines[3:] = [line[:-2] + "─" * (column - len(line) + 1) + line[-2:] for line in lines[3:]]
    meets = f"{_call(recipe.fusion)}" if recipe.fusion is not None else "(no fusion)"
    lines += [" " * column + "│", " " * max(0, column - len(meets) // 2) + meets]
    rule = "one a step, drawn by weight:" if recipe.draw else "objectives:"
    lines += ["", f"  {rule}"]
    lines += [
        f"    {key:<{max(map(len, recipe.objectives))}}  {_call(part)}" for key, part in recipe.objectives.items()
    ]
    if len(recipe.stages) > 1:
        lines += ["", "  stages:", *(f"    {_call(stage)}" for stage in recipe.stages)]
    if recipe.policy.measures:
        lines += ["", f"  weights follow: {_call(recipe.policy)}"]
    if recipe.mixing.measures:
        lines += ["", f"  shares of the data follow: {_call(recipe.mixing)}"]
    if recipe.metrics:
        lines += ["", f"  measured by: {', '.join(_call(metric) for metric in recipe.metrics)}"]
    return "\n".join(lines)


def _chain(name: str, stream: Stream) -> str:
    """Field, views, encoder, and what follows the encoder."""
    parts = [f"({stream.field})"] if stream.field and stream.field != name else []
    parts += [_call(view) for view in stream.views]
    parts.append(f"as {stream.tied}" if stream.tied else _call(stream.encoder))
    parts += [f"twin {stream.teacher.decay}"] if stream.teacher is not None else []
    return " → ".join(parts)


def _joint(i: int, count: int) -> str:
    if count == 1:
        return "┐"
    return "┐" if i == 0 else "┤"


def _call(part: Any) -> str:
    """A part with the settings that differ from its defaults."""
    shown = []
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if value != field.default:
            shown.append(f"{field.name}={_value(value)}")
    return f"{type(part).__name__}({', '.join(shown)})"


def _value(value: Any) -> str:
    if isinstance(value, Ramp):
        return f"{value.start}→{value.end} in {value.steps}"
    if dataclasses.is_dataclass(value):
        return _call(value)
    return repr(value) if not isinstance(value, tuple) else "+".join(map(str, value))
