"""The page's tables: what a reader sees in a minute, what failed, and everything about a point."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["details_of", "failures_of", "finite", "groups_of", "milliseconds", "summary_of", "three"]

Results = Mapping[str, Any]
Entry = Mapping[str, Any]


def finite(value: Any) -> float | None:
    """A number, or None for what is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def three(value: float) -> str:
    """Three significant digits, without an exponent from a thousandth to a million."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    if 1e-3 <= abs(rounded) < 1e6:
        return f"{rounded:,.{max(0, min(digits, 6))}f}"
    return f"{rounded:.2e}"


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{three(1e3 * seconds)} ms"


def _shown(value: Any, unit: str = "", factor: float = 1.0) -> str:
    number = finite(value)
    return "" if number is None else f"{three(factor * number)}{unit}"


def _percent(value: Any) -> str:
    number = finite(value)
    return "" if number is None else f"{number:.0%}" if number >= 0.1 else f"{number:.1%}"


def groups_of(results: Results) -> dict[str, list[Entry]]:
    """The entries of each point, with a time."""
    found: dict[str, list[Entry]] = {}
    for each in results.get("benchmarks", ()):
        if finite(each.get("stats", {}).get("median")) and "extra_info" in each:
            found.setdefault(str(each.get("group")), []).append(each)
    return found


def _from_default(entry: Entry) -> int:
    """0 for "mmkernels", 1 for one of its backends by name, 2 for its other forms."""
    name = str(entry["extra_info"].get("contender"))
    return 0 if name == "mmkernels" else 1 if name.startswith("mmkernels [") else 2


def _first(entries: Sequence[Entry], role: str) -> Entry | None:
    """Of ours the one that is chosen by default; of baselines the fastest, to which ratios refer."""
    those = [each for each in entries if each["extra_info"].get("role") == role]
    if role == "ours":
        return min(those, key=_from_default, default=None)
    return min(those, key=lambda each: each["stats"]["median"], default=None)


def _sizes(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {value}" for name, value in info.get("point", {}).items() if name != "pass")


@dataclass
class Row:
    """A line of a family's table."""

    case: str
    sizes: str
    against: str
    speed: str = ""
    is_slower: bool = False
    memory: str = ""
    ceiling: str = ""
    wrong: str = ""


@dataclass
class Family:
    name: str
    headline: str = ""
    rows: list[Row] = field(default_factory=list)


def summary_of(results: Results) -> list[Family]:
    """A table for each family, with a line for each point that has ours."""
    families: dict[str, Family] = {}
    ratios: dict[str, list[float]] = {}
    for entries in groups_of(results).values():
        mine, theirs = _first(entries, "ours"), _first(entries, "baseline")
        if mine is None or mine["extra_info"].get("curve"):  # curves have charts
            continue
        info = mine["extra_info"]
        name = str(info.get("family", ""))
        speed = finite(info.get("speedup"))
        row = Row(str(info.get("case", "")), _sizes(info), theirs["extra_info"]["contender"] if theirs else "")
        if speed is not None:
            row.speed, row.is_slower = f"{three(speed)}x", speed < 0.97
            ratios.setdefault(name, []).append(speed)
        row.memory, row.ceiling = _percent(info.get("memory_ratio")), _percent(info.get("of_ceiling"))
        families.setdefault(name, Family(name)).rows.append(row)
    for each in _wrong_of_ours(results):
        name = str(each.get("family", ""))
        row = Row(str(each.get("case", "")), _sizes(each), "", wrong=str(each.get("kind")))
        families.setdefault(name, Family(name)).rows.append(row)
    for name, family in families.items():
        if ratios.get(name):
            low, middle, high = min(ratios[name]), statistics.median(ratios[name]), max(ratios[name])
            family.headline = f"{three(middle)}x in the median, from {three(low)}x to {three(high)}x"
    return list(families.values())


def _wrong_of_ours(results: Results) -> list[Mapping[str, Any]]:
    return [
        each
        for each in results.get("mmkernels", {}).get("not_timed", ())
        if each.get("kind") in ("wrong", "fails") and str(each.get("contender", "")).startswith("mmkernels")
    ]


def failures_of(results: Results) -> list[tuple[str, str, str]]:
    """Of ours: point, contender, and what is wrong."""
    return [(str(e.get("group")), str(e.get("contender")), str(e.get("why", ""))) for e in _wrong_of_ours(results)]


_TIMES = ("median", "quartiles (rounds)", "speed", "rate", "of ceiling", "predicted")
HEADS: tuple[str, ...] = ("contender", *_TIMES, "memory", "error ratio", "more")


@dataclass
class Detail:
    """Everything about a point: a row of cells for each contender, and the reasons of those that were not timed."""

    group: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    not_timed: list[tuple[str, str, str]] = field(default_factory=list)  # contender, kind, why
    heads: tuple[str, ...] = HEADS


def _cells(entry: Entry) -> tuple[str, ...]:
    stats, info = entry["stats"], entry["extra_info"]
    quartiles = [finite(stats.get(name)) for name in ("q1", "q3")]
    between = " to ".join(three(1e3 * each) for each in quartiles if each is not None)
    rates = {"tflops": (" TFLOP/s", 1.0), "gbytes_per_s": (" GB/s", 1.0), "mitems_per_s": (" items/s", 1e6)}
    found = (_shown(info.get(name), unit, factor) for name, (unit, factor) in rates.items())
    rate = ", ".join(each for each in found if each)
    more = [f"{name}: {_shown(value) or value}" for name, value in (info.get("figures") or {}).items()]
    return (
        str(info.get("contender", "")),
        milliseconds(stats["median"]),
        f"{between} ({stats.get('rounds', '?')})",
        _shown(info.get("speedup"), "x"),
        rate,
        _percent(info.get("of_ceiling")),
        milliseconds(finite(info.get("predicted_s"))),
        _shown(info.get("peak_bytes"), " MB", 1e-6),
        _shown(info.get("error_ratio")),
        "; ".join([*more, str(info["note"])] if info.get("note") else more),
    )


def details_of(results: Results) -> list[Detail]:
    found = {group: Detail(group, [_cells(each) for each in entries]) for group, entries in groups_of(results).items()}
    for each in results.get("mmkernels", {}).get("not_timed", ()):
        group = str(each.get("group"))
        reason = (str(each.get("contender", "")), str(each.get("kind", "")), str(each.get("why", "")))
        found.setdefault(group, Detail(group)).not_timed.append(reason)
    return list(found.values())
