"""What the drawing scripts share: colours, boxes and arrows, and writing or checking `docs/images/*.svg`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

IMAGES = Path(__file__).resolve().parents[1] / "images"
INK, QUIET, ROW, COLUMN, BOTH = "#2b2d42", "#d9dce3", "#2a9d8f", "#e9c46a", "#9d4edd"
SKIP, PARTIAL, FULL = "#f4f5f7", "#e9c46a", "#2a9d8f"

mpl.rcParams |= {
    "svg.hashsalt": "mmkernels",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": INK,
    "text.color": INK,
}


def bare(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_aspect("equal")
    for side in axes.spines.values():
        side.set_visible(False)


def box(axes: Axes, x: float, y: float, width: float, height: float, color: str, label: str = "") -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", linewidth=1))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=INK, linewidth=1))


def svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def main(pictures: Mapping[str, Callable[[], Figure]], description: str | None) -> int:
    """Write the pictures, or with --check compare them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    IMAGES.mkdir(parents=True, exist_ok=True)
    stale = []
    for name, draw in pictures.items():
        path, text = IMAGES / f"{name}.svg", svg(draw())
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
    if stale:
        print(f"out of date: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0
