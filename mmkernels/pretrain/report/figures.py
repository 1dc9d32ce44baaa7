"""The newest figures of a run: by split and by what they measure; as a table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.run_folder import RunFolder

__all__ = [
    "about",
    "figure_of",
    "figure_table",
    "headline_figures",
    "headline_names",
    "newest_by_split",
    "rows_of",
]

_SPLITS = {
    "A": "a drawing style never seen in training",
    "B": "concepts never seen in training",
    "C": "neither the style nor the concepts seen",
    "combinations": "things never seen together in training",
    "drawings": "a drawing style never seen in training",
    "held_out": "samples never seen in training",
}
_FIELDS = {field.name for field in fields(Figure)}


def figure_of(row: Mapping[str, Any]) -> Figure:
    """A figure of the log, which another version may have written."""
    return Figure(**{name: value for name, value in row.items() if name in _FIELDS})


def about(split: str) -> str:
    """What is held out in a split, if it is one of the data sets that come along."""
    return _SPLITS.get(split.rpartition(": ")[2], "")  # in a mixture it follows the data set's name


def newest_by_split(evals: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The newest record of each split."""
    return {record["split"]: record for record in evals}


def rows_of(record: Mapping[str, Any]) -> dict[str, list[tuple[str, Figure]]]:
    """Figures by what they measure; those that differ in R@k alone share a row. ↓: lower is better."""
    rows: dict[str, list[tuple[str, Figure]]] = {}
    for figure in map(figure_of, record["figures"]):
        words, _, last = figure.name.rpartition(" ")
        at_k = bool(words) and last.startswith("R@")
        name = words if at_k else figure.name + ("" if figure.higher_is_better else " ↓")
        rows.setdefault(name, []).append((last if at_k else "", figure))
    return rows


def figure_table(folder: RunFolder) -> str:
    """The newest figures of every split, for a terminal."""
    rows = [
        (split, words, "  ".join(_cell(column, f) for column, f in cells))
        for split, record in newest_by_split(folder.records("eval")).items()
        for words, cells in rows_of(record).items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)] if rows else [0, 0]
    lines = [f"{split:<{widths[0]}}  {words:<{widths[1]}}  {cells}".rstrip() for split, words, cells in rows]
    return "\n".join([*lines, "chance in brackets; ↓: lower is better"])


def _cell(column: str, figure: Figure) -> str:
    chance = f" ({figure.shown_chance()})" if figure.chance is not None else ""
    value = figure.shown() + ("%" if figure.percent else "")
    return f"{column + ' ' if column else ''}{value:>6}{chance:<8}"


def headline_names(newest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the figures that come first, in the order of the log."""
    return list(dict.fromkeys(f["name"] for record in newest.values() for f in record["figures"] if f["headline"]))


def headline_figures(newest: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """name -> split -> figure"""
    found: dict[str, dict[str, Figure]] = {}
    for split, record in newest.items():
        for figure in (figure_of(row) for row in record["figures"] if row["headline"]):
            found.setdefault(figure.name, {})[split] = figure
    return found
