"""A line chart on logarithmic axes as inline SVG, whose colours are those of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

__all__ = ["Chart", "Series", "drawn"]

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 42


@dataclass(frozen=True)
class Series:
    """Points (x, y, low, high, tooltip) of one contender, or a line.

    Args:
        style: class of the page's style sheet: "ours", "theirs", "predicted", "limit" or "third".
        marks: whether points are drawn, each style with a shape of its own.
        line: whether they are joined.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float, float, float, str]]
    marks: bool = True
    line: bool = True


@dataclass(frozen=True)
class Chart:
    """A chart, and what those hear who do not see it."""

    title: str
    text: str
    x: str
    y: str
    series: Sequence[Series]

    @property
    def svg(self) -> Markup:
        return drawn(self)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return self.begin + share * (self.end - self.begin)

    def ticks(self, values: Sequence[float] = ()) -> list[float]:
        """The values themselves if they are few; powers of ten, or, over less than two of them, also 2 and 5."""
        if 0 < len(set(values)) <= 7:
            return sorted(set(values))
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        steps = (1, 2, 5) if self.high / self.low < 100 else (1,)
        every = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        inside = [value for value in every if self.low <= value * 1.0001 and value <= self.high * 1.0001]
        return inside[:: -(-len(inside) // 7)]


def _axis(values: Sequence[float], begin: float, end: float) -> _Axis:
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.15)
    return _Axis(low / room, high * room, begin, end)


def _label(value: float) -> str:
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size and value % size == 0:
            return f"{value / size:g}{suffix}"
    return f"{value:,g}" if value < 1e6 else f"{value:.3g}"


def drawn(chart: Chart) -> Markup:
    """The chart as SVG; nothing for a chart without points."""
    points = [point for series in chart.series for point in series.points]
    if not points:
        return Markup("")
    x = _axis([point[0] for point in points], LEFT, WIDTH - RIGHT)
    y = _axis([value for point in points for value in point[1:4]], HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(chart.title)}</title><desc>{escape(chart.text)}</desc>",
    ]
    lines = all(series.line for series in chart.series)
    for value in x.ticks([point[0] for point in points] if lines else []):
        parts.append(f'<line class="grid" x1="{x.at(value):.1f}" x2="{x.at(value):.1f}" y1="{TOP}" y2="{y.begin}"/>')
        parts.append(f'<text x="{x.at(value):.1f}" y="{y.begin + 15}" text-anchor="middle">{_label(value)}</text>')
    for value in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.end}" y1="{y.at(value):.1f}" y2="{y.at(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y.at(value) + 4:.1f}" text-anchor="end">{_label(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(chart.x)}</text>')
    turned = f'transform="translate(13 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle"'
    parts.append(f"<text {turned}>{escape(chart.y)}</text>")
    parts += [_drawn(series, x, y) for series in chart.series]
    return Markup("".join([*parts, "</svg>"]))


# Paths around the point: a circle, a square, a triangle.
_MARKS = {
    "ours": "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
    "theirs": "m-3.5 -3.5h7v7h-7z",
    "third": "m0 -4.5l4.5 8h-9z",
}


def _drawn(series: Series, x: _Axis, y: _Axis) -> str:
    at = [(x.at(px), y.at(py), y.at(low), y.at(high), text) for px, py, low, high, text in series.points]
    parts = []
    if series.line and len(at) > 1:
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py, *_ in at)
        parts.append(f'<polyline class="{series.style}" points="{path}"/>')
    for px, py, low, high, text in at if series.marks else ():
        if low != high:
            parts.append(
                f'<line class="bar {series.style}" x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
            )
        parts.append(f'<path class="mark {series.style}" d="M{px:.1f} {py:.1f}{_MARKS[series.style]}">')
        parts.append(f"<title>{escape(text)}</title></path>")
    return "".join(parts)
