"""The pictures of a report, as SVG that inherits the page's font."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.ticker import NullFormatter

from mmkernels.pretrain.plotting import COLOURS, REST, drawing, in_legend, svg

__all__ = ["histogram", "scatter"]

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
    with drawing() as (figure, axes):
        for colour, (split, each) in zip(cycle(COLOURS), by_split.items(), strict=False):
            counts, _ = np.histogram(each, edges)
            shares = 100 * counts / max(len(each), 1)
            first = split == next(iter(by_split))
            if first:
                axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25, linewidth=0)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=in_legend(split))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}%")
        axes.set_xlabel(unit)
        if log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        if 1 < len(by_split) <= len(COLOURS):
            axes.legend(loc="best")
        return svg(figure)


def scatter(xy: np.ndarray, groups: Sequence[str], order: Sequence[str]) -> str:
    """Points coloured by group; groups beyond the colours are grey."""
    with drawing(3.6) as (figure, axes):
        shown = list(order)[: len(COLOURS)]
        of = np.array(groups, str)
        rest = ~np.isin(of, shown)
        if rest.any():
            axes.scatter(*_xy(xy, rest), 6, REST, linewidth=0, rasterized=True, label="others")
        for colour, name in zip(COLOURS, shown, strict=False):
            mine, label = of == name, in_legend(name)
            axes.scatter(*_xy(xy, mine), 7, colour, alpha=0.55, linewidth=0, rasterized=True, label=label)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first component")
        axes.set_ylabel("second component")
        legend = figure.legend(loc="outside upper left", ncols=3, markerscale=1.8, handletextpad=0.1)
        for handle in legend.legend_handles:
            if handle is not None:
                handle.set_alpha(1.0)
        return svg(figure)


def _xy(points: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points[kept, 0], points[kept, 1]
