"""The page's charts: how time grows, beside what the cost model predicts, and how near calls come to the ceilings."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmkernels.bench.page.chart import Chart, Series
from mmkernels.bench.page.summary import finite, groups_of, milliseconds, three

__all__ = ["curves_of", "rooflines_of"]

Results = Mapping[str, Any]
Entry = Mapping[str, Any]

LONG = 0.05  # seconds: calls from here on are what the cost model is judged by
STYLES = {"ours": "ours", "baseline": "theirs"}


def _point(entry: Entry, x: float, scale: float = 1e3) -> tuple[float, float, float, float, str]:
    stats = entry["stats"]
    low, high = (finite(stats.get(name)) or stats["median"] for name in ("q1", "q3"))
    text = f"{entry['extra_info'].get('contender')}: {milliseconds(stats['median'])}"
    return x, scale * stats["median"], scale * low, scale * high, text


def _flat(x: float, y: float, text: str = "") -> tuple[float, float, float, float, str]:
    """Without quartiles."""
    return x, y, y, y, text


def curves_of(results: Results) -> list[Chart]:
    """A chart for each curve, then one for each prediction over ranks."""
    found: dict[str, dict[str, list[tuple[float, Entry]]]] = {}
    for entries in groups_of(results).values():
        for entry in entries:
            info = entry["extra_info"]
            x = finite(info.get("point", {}).get(info.get("curve")))
            if x is None or x <= 0:
                continue
            others = {name: value for name, value in info["point"].items() if name != info["curve"]}
            others.pop("L", None)  # of segments, whose tokens are the same in all
            key = json.dumps([info["case"], info["curve"], others])
            found.setdefault(key, {}).setdefault(str(info["contender"]), []).append((x, entry))
    charts = [_curve(key, contenders) for key, contenders in found.items()]
    return charts + [_over_ranks(key, each) for key, each in _predictions(results).items()]


def _curve(key: str, contenders: Mapping[str, list[tuple[float, Entry]]]) -> Chart:
    case, curve, others = json.loads(key)
    series: list[Series] = []
    errors: list[tuple[float, float]] = []
    for name, taken in contenders.items():
        taken.sort(key=lambda each: each[0])
        style = STYLES.get(str(taken[0][1]["extra_info"].get("role")), "third")
        style = "third" if any(style == each.style for each in series) else style
        series.append(Series(name, style, [_point(entry, x) for x, entry in taken]))
        predicted = [(x, entry, finite(entry["extra_info"].get("predicted_s"))) for x, entry in taken]
        line = [_flat(x, 1e3 * p) for x, _, p in predicted if p]
        if line:
            series.append(Series(f"{name}, predicted", f"predicted {style}", line, marks=False))
        errors += [(entry["stats"]["median"], p / entry["stats"]["median"] - 1) for _, entry, p in predicted if p]
    what = ", ".join(f"{name} = {value}" for name, value in others.items())
    return Chart(f"{case} ({what})" if what else case, _error(errors), curve, "ms", series)


def _error(errors: Sequence[tuple[float, float]]) -> str:
    """How far the cost model is off."""
    if not errors:
        return "Without a prediction."
    every = [abs(error) for _, error in errors]
    long = [abs(error) for seconds, error in errors if seconds >= LONG]
    text = f"The cost model is off by {statistics.median(every):.0%} in the median, {max(every):.0%} at most"
    return f"{text}; of calls of 50 ms and more, {max(long):.0%} at most." if long else f"{text}; all calls are short."


def _predictions(results: Results) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for each in results.get("mmkernels", {}).get("predictions", ()):
        key = json.dumps([each.get("case"), each.get("of"), each.get("machine"), each.get("x")])
        found.setdefault(key, []).append(each)
    return found


def _over_ranks(key: str, every: Sequence[Mapping[str, Any]]) -> Chart:
    case, of, machine, x = json.loads(key)
    styles = ("ours", "theirs", "third")
    series = []
    for i, each in enumerate(every):
        points = [
            (float(a), 1e3 * b, 1e3 * b, 1e3 * b, f"{each['series']}: {milliseconds(b)}") for a, b in each["points"]
        ]
        series.append(Series(str(each["series"]), styles[i % 3], points))
    what = ", ".join(f"{name} = {value}" for name, value in (of or {}).items())
    return Chart(f"{case}, predicted for {machine} ({what})", "Predicted, not measured.", str(x), "ms", series)


def rooflines_of(results: Results) -> list[Chart]:
    """A chart for each dtype that has a ceiling: flop/s over flop per byte."""
    ceilings = results.get("machine_info", {}).get("mmkernels", {}).get("ceilings") or {}
    width = finite(ceilings.get("bytes"))
    charts = []
    for name, peak in ceilings.items():
        dtype = name.partition("flops:")[2]
        if not dtype or not width or not finite(peak):
            continue
        series = [_calls(results, dtype, role) for role in ("ours", "baseline")]
        points = [point for each in series for point in each.points]
        if not points:
            continue
        edge = peak / width
        ends = sorted({min(edge, *(p[0] for p in points)) / 1.5, edge, max(edge, *(p[0] for p in points)) * 1.5})
        roof = [_flat(at, min(peak, at * width) / 1e9) for at in ends]
        limit = Series("ceiling", "limit", roof, marks=False)
        text = f"Ceilings: {three(peak / 1e9)} GFLOP/s, {three(width / 1e9)} GB/s of a large copy."
        charts.append(Chart(f"Roofline, {dtype}", text, "flop per byte", "GFLOP/s", [limit, *series]))
    return charts


def _calls(results: Results, dtype: str, role: str) -> Series:
    points = []
    for entries in groups_of(results).values():
        for entry in entries:
            info = entry["extra_info"]
            flops, size = finite(info.get("flops")), finite(info.get("bytes"))
            if info.get("role") == role and info.get("point", {}).get("dtype") == dtype and flops and size:
                rate = flops / entry["stats"]["median"] / 1e9
                text = f"{entry['group']}: {info.get('contender')}, {three(rate)} GFLOP/s"
                points.append(_flat(flops / size, rate, text))
    return Series("mmkernels" if role == "ours" else "baseline", STYLES[role], points, line=False)
