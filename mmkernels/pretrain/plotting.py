"""How all charts look: SVG that inherits the page's font."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["COLOURS", "INK", "REST", "drawing", "in_legend", "svg"]

COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea", "#dc2626")
INK, REST = "#475569", "#cbd5e1"
_GRID = "#e2e8f0"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmkernels",  # the same report has the same ids
    "text.parse_math": False,  # names of classes may have dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "savefig.dpi": 180,
}


@contextmanager
def drawing(height: float = 2.7) -> Iterator[tuple[Figure, Axes]]:
    """A chart as wide as half a page, with a grid of horizontal lines; to be finished by `svg` within."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.tick_params(length=0)
        axes.grid(axis="y")
        yield figure, axes


def in_legend(name: str) -> str:
    """A label that a legend shows: matplotlib hides those that begin with an underscore, and empty ones."""
    return name if name and not name.startswith("_") else f"\u200b{name}"


def svg(figure: Figure) -> str:
    """As wide as what contains it."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', drawn, count=1)
