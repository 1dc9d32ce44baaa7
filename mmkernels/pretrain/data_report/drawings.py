"""The pictures of a report, as SVG that inherits the page's font."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from mmkernels.pretrain.pages import COLOURS

__all__ = ["histogram", "scatter"]

_INK, _GRID, _REST = "#475569", "#e2e8f0", "#cbd5e1"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmkernels",  # the same report has the same ids
    "text.parse_math": False,  # names of classes may have dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 180,
}
_BINS = 40


def histogram(by_split: Mapping[str, np.ndarray], unit: str) -> str:
    """Shares of values, a line for each split; logarithmic where values span more than two orders of magnitude."""
    values = np.concatenate(list(by_split.values()))
    low, high = float(values.min()), float(values.max())
    log = low > 0 and high / low > 100
    whole = bool((values == np.rint(values)).all()) and high - low <= _BINS
    if whole:
        edges = np.arange(low, high + 2) - 0.5
    else:
        edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
        edges = np.unique(edges)
    with _drawing() as (figure, axes):
        for colour, (split, each) in zip(cycle(COLOURS), by_split.items(), strict=False):
            counts, _ = np.histogram(each, edges)
            shares = 100 * counts / max(len(each), 1)
            first = split == next(iter(by_split))
            if first:
                axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=split)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel(unit)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if 1 < len(by_split) <= len(COLOURS):
            axes.legend(loc="best")
        return _svg(figure)


def scatter(xy: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> str:
    """Points coloured by group; groups beyond the colours are grey."""
    with _drawing((4.4, 3.6)) as (figure, axes):
        shown = list(order)[: len(COLOURS)]
        of = np.array(groups, str)
        rest = ~np.isin(of, shown)
        if rest.any():
            axes.scatter(*_xy(xy, rest), 6, _REST, linewidth=0, rasterized=True, label="others")
        for colour, name in zip(COLOURS, shown, strict=False):
            mine = of == name
            axes.scatter(
                xy[mine, 0], xy[mine, 1], s=7, color=colour, alpha=0.55, linewidth=0, rasterized=True, label=name
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
        legend = figure.legend(loc="outside upper left", ncols=3, markerscale=1.8, handletextpad=0.1)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        return _svg(figure)


def _xy(points: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points[kept, 0], points[kept, 1]


@contextmanager
def _drawing(size: tuple[float, float] = (4.4, 2.7)) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.tick_params(length=0)
        axes.grid(axis="y")
        yield figure, axes


def _svg(figure: Figure) -> str:
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg, count=1)
