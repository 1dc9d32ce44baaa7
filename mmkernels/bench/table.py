"""The figures of a run as text: a table for each point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tabulate import tabulate

__all__ = ["tables"]


def _many(millions: float | None) -> str:
    if millions is None:
        return ""
    return f"{millions:.3g}M" if millions >= 0.1 else f"{1e6 * millions:,.0f}"


def _cells(entry: Mapping[str, Any]) -> dict[str, str]:
    def show(name: str, text: str, factor: float = 1.0) -> str:
        return "" if entry.get(name) is None else text.format(factor * entry[name])

    return {
        "contender": entry["contender"],
        "ms": show("median", "{:.3g}", 1e3),
        "speed-up": show("speedup", "{:.2f}x"),
        "TFLOP/s": show("tflops", "{:.3g}"),
        "GB/s": show("gbytes_per_s", "{:.3g}"),
        "items/s": _many(entry.get("mitems_per_s")),
        "of ceiling": show("of_ceiling", "{:.0%}"),
        "predicted ms": show("predicted_s", "{:.3g}", 1e3),
        "peak MB": show("peak_bytes", "{:.4g}", 1e-6),
        "of baseline": show("memory_ratio", "{:.1%}"),
        "error ratio": show("error_ratio", "{:.2f}"),
        **{name: f"{value:.5g}" for name, value in entry.get("figures", {}).items()},
        "note": entry["why"] if "why" in entry else entry.get("note", ""),
    }


def tables(timed: Sequence[Mapping[str, Any]], not_timed: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Each point, without empty columns, nor what is absent."""
    groups: dict[str, list[dict[str, str]]] = {}
    for entry in [*timed, *(each for each in not_timed if each["kind"] != "absent")]:
        note = f"{entry['kind']}: {entry['why']}" if "kind" in entry else None
        groups.setdefault(entry["group"], []).append(_cells({**entry, **({"why": note} if note else {})}))
    for group, cells in groups.items():
        names = dict.fromkeys(name for cell in cells for name in cell if cell[name])
        shown = [name for name in names if name != "note"] + (["note"] if "note" in names else [])
        rows = [[cell.get(name, "") for name in shown] for cell in cells]
        yield f"\n{group}\n{tabulate(rows, headers=shown, disable_numparse=True)}"
