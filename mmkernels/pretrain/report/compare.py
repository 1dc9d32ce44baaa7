"""`mmkernels compare`: runs side by side: what differs in their settings, their figures, their curves, their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.report.charts import RUN_COLOURS, overlaid
from mmkernels.pretrain.report.render import rendered
from mmkernels.pretrain.report.stored_run import StoredRun, named, stored_run

__all__ = ["Comparison", "compared", "comparison_page", "comparison_table"]

_CHARTS = 12  # curves of figures


@dataclass(frozen=True)
class Row:
    """A figure of several runs."""

    split: str
    name: str
    figures: list[Figure | None]  # by run of the table
    best: int | None  # the run whose interval is apart from those of all others

    @property
    def higher_is_better(self) -> bool:
        return next(figure.higher_is_better for figure in self.figures if figure is not None)


@dataclass(frozen=True)
class Table:
    """The figures that several runs on the same data have."""

    data: str
    runs: list[StoredRun]
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Of at least two runs."""

    runs: list[StoredRun]
    settings: dict[str, list[str | None]]  # those that differ, by run; None where a run has none of the name
    tables: list[Table]  # one for each data set
    alone: dict[str, list[str]]  # run -> its figures that no other run on the same data has

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the runs before comparing."""
        found = []
        for what, values in (
            ("recipes", [run.config.title for run in self.runs]),
            ("data", [run.data for run in self.runs]),
        ):
            if len(set(values)) > 1:
                found.append(f"The runs have different {what}: {', '.join(dict.fromkeys(values))}.")
        if found:
            found.append(
                "Figures are compared where data, split and name agree; losses where objectives have one name."
            )
        if len({run.config.eval_limit for run in self.runs}) > 1:
            found.append("They were evaluated on different numbers of samples (eval_limit).")
        if not self.tables:
            found.append("They share no figure.")
        return found


def compared(folders: Sequence[Path]) -> Comparison:
    """Read and compare runs.

    Raises:
        ValueError: fewer than two, or one twice.
        RunFolderError: a folder that holds no run, or a damaged one.
    """
    if len(folders) < 2:
        raise ValueError(f"RUN: expected at least two runs, got {len(folders)}")
    runs = [stored_run(folder, printable(name)) for name, folder in named(folders).items()]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    settings = {name: [run.settings.get(name) for run in runs] for name in names}
    tables = _tables(runs)
    shared = {(table.data, row.split, row.name) for table in tables for row in table.rows}
    alone = {
        run.name: [f"{split}: {name}" for split, name in run.figures if (run.data, split, name) not in shared]
        for run in runs
    }
    return Comparison(
        runs,
        {name: values for name, values in settings.items() if len(set(values)) > 1},
        tables,
        {name: figures for name, figures in alone.items() if figures},
    )


def _tables(runs: Sequence[StoredRun]) -> list[Table]:
    tables = []
    for data in dict.fromkeys(run.data for run in runs):
        here = [run for run in runs if run.data == data]
        rows = []
        for split, name in dict.fromkeys(key for run in here for key in run.figures):
            figures = [run.figures.get((split, name)) for run in here]
            if sum(figure is not None for figure in figures) > 1:
                rows.append(Row(split, name, figures, best_of(figures)))
        tables += [Table(data, here, rows)] if rows else []
    return tables


def best_of(figures: Sequence[Figure | None]) -> int | None:
    """The run that is better than all others, with no interval that overlaps its own; None if there is none, or one of
    the intervals is not known."""
    ends = []  # the higher the better
    for i, figure in enumerate(figures):
        if figure is None:
            continue
        if figure.low is None or figure.high is None:
            return None
        ends.append((figure.low, figure.high, i) if figure.higher_is_better else (-figure.high, -figure.low, i))
    low, _, best = max(ends)
    return best if all(high < low for _, high, i in ends if i != best) else None


def comparison_page(found: Comparison) -> str:
    """The page, as HTML."""
    names = [run.name for run in found.runs]
    colours = dict(zip(names, cycle(RUN_COLOURS), strict=False))
    summaries = [run.summary() for run in found.runs]
    figures = [figure for table in found.tables for row in table.rows for figure in row.figures]
    values: dict[str, Any] = {
        "found": found,
        "colours": colours,
        "common": {name: values for name, values in found.settings.items() if None not in values},
        "partial": {name: values for name, values in found.settings.items() if None in values},
        "summary": {key: [summary.get(key, "") for summary in summaries] for key in _keys(summaries)},
        "losses": _losses(found.runs, colours),
        "figures": _figures(found, colours),
        "intervals": any(figure is not None and figure.low is not None for figure in figures),
    }
    return printable(rendered("compare.html.jinja", **values))


def _losses(runs: Sequence[StoredRun], colours: Mapping[str, str]) -> dict[str, str]:
    """Of each objective that several runs have."""
    names = dict.fromkeys(name for run in runs for name in run.losses)
    curves = {name: {run.name: run.losses[name] for run in runs if name in run.losses} for name in names}
    return {f"Loss: {name}": overlaid(each, colours) for name, each in curves.items() if len(each) > 1}


def _figures(found: Comparison, colours: Mapping[str, str]) -> dict[str, str]:
    """Of each shared figure that comes first in a run's own report, over the steps."""
    charts: dict[str, str] = {}
    for table in found.tables:
        for row in table.rows:
            first = next(figure for figure in row.figures if figure is not None)
            if not first.headline or len(charts) == _CHARTS:
                continue
            curves = {run.name: points for run in table.runs if (points := _points(run, row))}
            of = f"{table.data}, " if len(found.tables) > 1 else ""
            charts[f"{row.name}, {of}{row.split}"] = overlaid(curves, colours, first.percent, points=True)
    return charts


def _points(run: StoredRun, row: Row) -> list[tuple[int, float]]:
    """(step, value) of a figure."""
    records = [record for record in run.evals if record["split"] == row.split]
    return [(r["step"], each["value"]) for r in records for each in r["figures"] if each["name"] == row.name]


def comparison_table(found: Comparison) -> str:
    """For a terminal."""
    summaries = [run.summary() for run in found.runs]
    lines = _aligned(
        [
            ["", *(run.name for run in found.runs)],
            *([key, *(each.get(key, "") for each in summaries)] for key in _keys(summaries)),
        ]
    )
    for table in found.tables:
        rows = [[f"{r.split}: {r.name}" + ("" if r.higher_is_better else " ↓"), *_cells(r)] for r in table.rows]
        lines += ["", *_aligned([[f"figures on {table.data}", *(run.name for run in table.runs)], *rows])]
    legend = ["*: better than all others, intervals apart; chance in brackets; ↓: lower is better"]
    return "\n".join([*lines, *(legend if found.tables else []), *found.remarks])


def _keys(summaries: Sequence[Mapping[str, str]]) -> list[str]:
    """Of the longest: a run without steps has fewer."""
    longest: Mapping[str, str] = max(summaries, key=len)
    return list(longest)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in rows]


def _cells(row: Row) -> list[str]:
    cells = []
    for i, figure in enumerate(row.figures):
        if figure is None:
            cells.append("-")
            continue
        interval = f" [{figure.shown_interval().replace(' to ', ', ')}]" if figure.low is not None else ""
        chance = f" ({figure.shown_chance()})" if figure.chance is not None else ""
        cells.append(f"{'*' if row.best == i else ''}{figure.shown()}{'%' if figure.percent else ''}{interval}{chance}")
    return cells
