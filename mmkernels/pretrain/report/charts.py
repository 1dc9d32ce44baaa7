"""The curves of a report, as SVG that inherits the page's font."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from mmkernels.pretrain.plotting import COLOURS, INK, drawing, svg

__all__ = ["RUN_COLOURS", "curve_chart", "figure_chart", "loss_chart", "overlaid"]

RUN_COLOURS = (*COLOURS, "#0891b2", "#be185d", "#4d7c0f", "#475569", "#b45309")
_DASHED: Any = (0, (4, 3))
_MARKED: dict[str, Any] = {"marker": "o", "markersize": 4}
_MOST = 500  # points of a curve; more are averaged in groups


def loss_chart(steps: Sequence[Mapping[str, Any]], loss: str = "loss", chance: str = "chance") -> str:
    """A loss and its running mean, with the loss at chance where there is one.

    Args:
        steps: records of the log; those without this loss are left out, and some must have it.
        loss, chance: names of the values in them.
    """
    seen = [record for record in steps if loss in record]
    at, losses = _thinned([record["step"] for record in seen], [record[loss] for record in seen])
    known = [(record["step"], record[chance]) for record in seen if record.get(chance) is not None]
    at_chance, expected = _thinned([step for step, _ in known], [value for _, value in known])
    with drawing() as (figure, axes):
        axes.plot(at, losses, color=COLOURS[0], alpha=0.25, linewidth=1)
        axes.plot(at, smoothed(losses), color=COLOURS[0], linewidth=2, **_marks(losses))
        if len({value for _, value in known}) == 1:
            axes.axhline(expected[0], color=INK, linewidth=1, linestyle=_DASHED)
        else:  # other objectives in another stage, weights that change, batches that differ
            axes.plot(at_chance, smoothed(expected), color=INK, linewidth=1, linestyle=_DASHED)
        top = max(*smoothed(losses), *smoothed(expected), 0.0)  # single spikes may leave the picture
        if min(losses) >= 0 < top < math.inf:
            axes.set_ylim(bottom=0, top=1.15 * top)
        axes.set_xlabel("step")
        return svg(figure)


def curve_chart(points: Sequence[tuple[int, float]], shown: Callable[[float], str] | None = None) -> str:
    """A small curve.

    Args:
        points: (step, value), at least one.
        shown: how a value is written at the axis; None: as it is. With it, the axis begins at 0.
    """
    at, values = _thinned([step for step, _ in points], [value for _, value in points])
    with drawing(1.7) as (figure, axes):
        axes.plot(at, values, color=COLOURS[0], linewidth=1.2, **_marks(values))
        if shown is not None:
            axes.yaxis.set_major_formatter(lambda value, _: shown(value))
            axes.set_ylim(bottom=0, top=1.1 * max(values) or 1.0)
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        return svg(figure)


def figure_chart(evals: Sequence[Mapping[str, Any]], splits: Sequence[str], name: str) -> str:
    """One figure of every split over the steps; chance is a dashed line of the same colour. Of more splits than there
    are colours, the mean and the range."""
    lines: dict[str, dict[int, float]] = {split: {} for split in splits}
    chances: dict[str, float] = {}
    percent = False
    for record in (r for r in evals if r["split"] in lines):
        for found in (f for f in record["figures"] if f["name"] == name):
            percent = found["percent"]
            lines[record["split"]][record["step"]] = found["value"] * (100 if percent else 1)
            if found["chance"] is not None:
                chances[record["split"]] = found["chance"] * (100 if percent else 1)
    colours = dict(zip(splits, COLOURS, strict=False))  # as in the tables, also where a split lacks the figure
    lines = {split: line for split, line in lines.items() if line}
    with drawing() as (figure, axes):
        if len(lines) > len(COLOURS):
            steps = sorted({step for line in lines.values() for step in line})
            values = [[line[step] for line in lines.values() if step in line] for step in steps]
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=COLOURS[0], alpha=0.2, linewidth=0)
            lines = {f"mean of {len(lines)}, and range": dict(zip(steps, map(fmean, values), strict=True))}
            chances = dict.fromkeys(lines, fmean(chances.values())) if chances else {}
        if not lines.keys() <= colours.keys():
            colours = dict(zip(lines, COLOURS, strict=False))
        for split, line in lines.items():
            axes.plot([*line], [*line.values()], color=colours[split], linewidth=2, **_MARKED)
            if split in chances:
                axes.axhline(chances[split], color=colours[split], linewidth=1, linestyle=_DASHED)
        _finish(axes, percent)
        _legend(axes, {split: colours[split] for split in lines})
        return svg(figure)


def overlaid(
    curves: Mapping[str, Sequence[tuple[int, float]]],
    colours: Mapping[str, str],
    percent: bool = False,
    points: bool = False,
) -> str:
    """The curves of several runs.

    Args:
        curves: (step, value) by run.
        colours: of the runs.
        percent: values are shares.
        points: mark the points, of which there are few; otherwise curves are running means.
    """
    with drawing() as (figure, axes):
        for run, each in curves.items():
            at, values = _thinned([step for step, _ in each], [value * (100 if percent else 1) for _, value in each])
            line: dict[str, Any] = {"color": colours[run], "linewidth": 2, "alpha": 0.85}
            axes.plot(at, values if points else smoothed(values), **line, **(_MARKED if points else _marks(values)))
        _finish(axes, percent)
        return svg(figure)


def _marks(values: Sequence[float]) -> dict[str, Any]:
    """How the points of a curve are marked: a single one, of which no line tells."""
    return _MARKED if len(values) == 1 else {}


def _finish(axes: Axes, percent: bool) -> None:
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    if percent:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Of lines by name. The names are set afterwards: matplotlib leaves out what begins with an underscore."""
    shown = [Line2D([], [], color=colour, linewidth=2, **_MARKED) for colour in colours.values()]
    legend = axes.legend(shown, [str(n) for n in range(len(shown))], loc="best")
    for text, name in zip(legend.get_texts(), colours, strict=True):
        text.set_text(name)


def _thinned(at: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most _MOST points: the means of groups of neighbours, at their last steps."""
    size = math.ceil(len(values) / _MOST)
    groups = [slice(first, first + size) for first in range(0, len(values), size)] if size > 1 else []
    if not groups:
        return list(at), list(values)
    return [at[group][-1] for group in groups], [fmean(values[group]) for group in groups]


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, unbiased at the start."""
    mean, total, smooth = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smooth.append(mean / total)
    return smooth
