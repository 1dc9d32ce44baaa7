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
    """A figure of several runs that were evaluated on the same data."""

    split: str
    name: str
    figures: list[Figure | None]  # by run
    best: int | None  # the run whose interval is apart from those of all others

    @property
    def higher_is_better(self) -> bool:
        return next(figure.higher_is_better for figure in self.figures if figure is not None)


@dataclass(frozen=True)
class Comparison:
    """Of at least two runs."""

    runs: list[StoredRun]
    settings: dict[str, list[str | None]]  # those that differ, by run; None where a run has none of the name
    rows: dict[str, list[Row]]  # by data set
    alone: dict[str, list[str]]  # run -> its figures that no other run on the same data has

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the runs before comparing."""
        found = []
        for what, values in (
            ("recipes", [run.config.recipe for run in self.runs]),
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
        if not any(self.rows.values()):
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
    rows, shared = _rows(runs)
    alone = {
        run.name: [f"{split}: {name}" for split, name in run.figures if (run.data, split, name) not in shared]
        for run in runs
    }
    return Comparison(
        runs,
        {name: values for name, values in settings.items() if len(set(values)) > 1},
        rows,
        {name: figures for name, figures in alone.items() if figures},
    )


def _rows(runs: Sequence[StoredRun]) -> tuple[dict[str, list[Row]], set[tuple[str, str, str]]]:
    rows: dict[str, list[Row]] = {}
    shared = set()
    for data in dict.fromkeys(run.data for run in runs):
        keys = dict.fromkeys(key for run in runs if run.data == data for key in run.figures)
        for split, name in keys:
            figures = [run.figures.get((split, name)) if run.data == data else None for run in runs]
            if sum(figure is not None for figure in figures) > 1:
                rows.setdefault(data, []).append(Row(split, name, figures, best_of(figures)))
                shared.add((data, split, name))
    return rows, shared


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
    figures = [figure for rows in found.rows.values() for row in rows for figure in row.figures]
    values: dict[str, Any] = {
        "found": found,
        "colours": colours,
        "common": {name: values for name, values in found.settings.items() if None not in values},
        "partial": {name: values for name, values in found.settings.items() if None in values},
        "summary": {key: [summary.get(key, "") for summary in summaries] for key in summaries[0] | summaries[-1]},
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
    for data, rows in found.rows.items():
        for row in rows:
            first = next(figure for figure in row.figures if figure is not None)
            if not first.headline or len(charts) == _CHARTS:
                continue
            curves = {run.name: _points(run, row) for run in found.runs if run.data == data}
            of = f"{data}, " if len(found.rows) > 1 else ""
            drawn = {name: points for name, points in curves.items() if points}
            charts[f"{row.name}, {of}{row.split}"] = overlaid(drawn, colours, first.percent, points=True)
    return charts


def _points(run: StoredRun, row: Row) -> list[tuple[int, float]]:
    """(step, value) of a figure."""
    records = [record for record in run.evals if record["split"] == row.split]
    return [(r["step"], each["value"]) for r in records for each in r["figures"] if each["name"] == row.name]


def comparison_table(found: Comparison) -> str:
    """For a terminal."""
    summaries = [run.summary() for run in found.runs]
    table = [["", *(run.name for run in found.runs)]]
    table += [[key, *(each.get(key, "") for each in summaries)] for key in summaries[0] | summaries[-1]]
    for data, rows in found.rows.items():
        table += [[f"figures on {data}", *[""] * len(found.runs)]]
        table += [[f"  {row.split}: {row.name}" + ("" if row.higher_is_better else " ↓"), *_cells(row)] for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip() for row in table
    ]
    legend = "*: better than all others, intervals apart; chance in brackets; ↓: lower is better"
    return "\n".join([*lines, legend, *found.remarks])


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
