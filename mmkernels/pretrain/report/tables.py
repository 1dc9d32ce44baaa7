"""The newest figures of a run, arranged: recalls by split, other figures with a column for each split, groups apart."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.plotting import COLOURS
from mmkernels.pretrain.report.figures import about, rows_of

__all__ = ["Column", "Recalls", "Table", "groups_of", "recalls_of", "table_of"]


@dataclass(frozen=True)
class Column:
    """A split."""

    name: str
    about: str
    colour: str


@dataclass(frozen=True)
class Recalls:
    """R@k of a split: what -> (k, figure)."""

    split: Column
    rows: Mapping[str, list[tuple[str, Figure]]]


@dataclass(frozen=True)
class Table:
    """A row for each figure, a column for each split."""

    title: str
    columns: list[Column]
    rows: list[tuple[str, list[Figure | None]]]


def _columns(newest: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    return [Column(split, about(split), colour) for split, colour in zip(newest, cycle(COLOURS), strict=False)]


def recalls_of(newest: Mapping[str, Mapping[str, Any]]) -> list[Recalls]:
    """Of the splits that have any."""
    found = []
    for column in _columns(newest):
        rows = {what: cells for what, cells in rows_of(newest[column.name]).items() if cells[0][0]}
        found += [Recalls(column, rows)] if rows else []
    return found


def table_of(newest: Mapping[str, Mapping[str, Any]], labels: Collection[str]) -> Table:
    """All but recalls and the figures of groups, whose labels are given."""
    cells: dict[str, dict[str, Figure]] = {}
    for split, record in newest.items():
        for what, (first, *_) in rows_of(record).items():
            if not first[0] and not any(f", {label} " in what for label in labels):
                cells.setdefault(what, {})[split] = first[1]
    return _table("", newest, cells)


def groups_of(newest: Mapping[str, Mapping[str, Any]], labels: Sequence[str]) -> list[Table]:
    """A table for each figure that is given by the classes of a label: "answer: accuracy, kind count"."""
    found: dict[str, dict[str, dict[str, Figure]]] = {}
    for split, record in newest.items():
        for what, (first, *_) in rows_of(record).items():
            for label in labels:
                of, comma, name = what.partition(f", {label} ")
                if comma:
                    found.setdefault(f"{of} by {label}", {}).setdefault(name, {})[split] = first[1]
    return [_table(title, newest, cells) for title, cells in found.items()]


def _table(title: str, newest: Mapping[str, Mapping[str, Any]], cells: Mapping[str, Mapping[str, Figure]]) -> Table:
    columns = [c for c in _columns(newest) if any(c.name in each for each in cells.values())]
    return Table(title, columns, [(what, [each.get(c.name) for c in columns]) for what, each in cells.items()])
