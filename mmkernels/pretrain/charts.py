"""The curves of a report, as SVG that inherits the page's font."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "figure_chart", "loss_chart"]

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
_INK, _GRID = "#475569", "#e2e8f0"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def loss_chart(steps: Sequence[Mapping[str, Any]]) -> str:
    """Loss of every step and its running mean, with the loss at chance where there is one."""
    with _drawing() as (figure, axes):
        at, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
        chance = steps[-1].get("chance")
        axes.plot(at, losses, color=COLOURS[0], alpha=0.25, linewidth=1)
        axes.plot(at, _smoothed(losses), color=COLOURS[0], linewidth=2, label="loss")
        if chance is not None:
            axes.axhline(chance, color=_INK, linewidth=1, linestyle=(0, (4, 3)), label="chance")
        top = max(losses[0], chance or 0.0)
        if min(losses) >= 0 < top:
            axes.set_ylim(bottom=0, top=1.15 * top)
        axes.set_xlabel("step")
        axes.legend(loc="lower left")
        return _svg(figure)


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
    lines = {split: line for split, line in lines.items() if line}
    with _drawing() as (figure, axes):
        if len(lines) > len(COLOURS):
            steps = sorted({step for line in lines.values() for step in line})
            values = [[line[step] for line in lines.values() if step in line] for step in steps]
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=COLOURS[0], alpha=0.2, linewidth=0)
            lines = {f"mean of {len(lines)}, and range": dict(zip(steps, map(fmean, values), strict=True))}
            chances = dict.fromkeys(lines, fmean(chances.values())) if chances else {}
        for colour, (split, line) in zip(COLOURS, lines.items(), strict=False):
            axes.plot([*line], [*line.values()], color=colour, linewidth=2, marker="o", markersize=4, label=split)
            if split in chances:
                axes.axhline(chances[split], color=colour, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xlim(left=0)
        axes.set_xlabel("step")
        if percent:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}%")
        axes.legend(loc="best")
        return _svg(figure)


@contextmanager
def _drawing() -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.tick_params(length=0)
        yield figure, axes


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential running mean, unbiased at the start."""
    mean, total, smooth = 0.0, 0.0, []
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        smooth.append(mean / total)
    return smooth


def _svg(figure: Figure) -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
