"""`mmkernels compare`: runs side by side: what differs in their settings, their figures, their curves, their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.report.charts import RUN_COLOURS, overlaid
from mmkernels.pretrain.report.held_out import agree, may_change
from mmkernels.pretrain.report.render import rendered
from mmkernels.pretrain.report.stored_run import StoredRun, named, stored_run

__all__ = ["Comparison", "compared", "comparison_page", "comparison_table"]

_CHARTS = 12  # curves of figures
_BASELINE = ": perplexity of bigrams"  # in the name of a figure that is no model's


@dataclass(frozen=True)
class Row:
    """A figure of several runs."""

    split: str
    name: str
    task: str  # of the objective that the name begins with; empty: no other row has the name
    figures: list[Figure | None]  # by run of the table
    best: int | None  # the run whose interval is apart from those of all others; None of figures that are no model's

    @property
    def title(self) -> str:
        return f"{self.name} ({self.task})" if self.task else self.name

    @property
    def higher_is_better(self) -> bool:
        return next(figure.higher_is_better for figure in self.figures if figure is not None)


@dataclass(frozen=True)
class Table:
    """The figures that several runs with the same held-out samples have."""

    data: str  # with what tells its held-out samples from those of other runs on it
    runs: list[StoredRun]
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """Of at least two runs."""

    runs: list[StoredRun]
    settings: dict[str, list[str | None]]  # those that differ, by run; None where a run has none of the name
    tables: list[Table]  # one for each choice of held-out samples
    alone: dict[str, list[str]]  # run -> its figures that no other run on the same held-out samples has

    @property
    def remarks(self) -> list[str]:
        """What a reader must know of the runs before comparing."""
        found = []
        for what, values in (
            ("recipes", _titles(self.runs)),
            ("data", [run.data for run in self.runs]),
        ):
            if len(set(values)) > 1:
                found.append(f"The runs have different {what}: {', '.join(dict.fromkeys(values))}.")
        if names := _told_apart(self.runs):
            found.append(f"Runs on the same data hold out different samples, by {', '.join(names)}.")
        for data, groups in _changed(self.runs).items():
            shown = "; ".join(f"{_count(group)}{', '.join(run.name for run in group)}" for group in groups)
            found.append(f"Runs hold out different samples of {data}, though by the same settings: {shown}.")
        found += [
            f"Runs are asked different things by the name {name}: {'; '.join(tasks)}."
            for name, tasks in _asked(self.runs).items()
        ]
        if found:  # of what may not be compared
            found.append(
                "Figures are compared where held-out samples, name and task agree; losses where name and task do."
            )
        limits = {name for name in self.settings if name.startswith("metrics.") and name.endswith(".limit")}
        if several := sorted(name for name in limits if None not in self.settings[name]):
            found.append(f"Their metrics look at different numbers of samples: {', '.join(several)}.")
        if silent := [run.name for run in self.runs if run.samples is None and run.figures and may_change(run.data)]:
            of = ", ".join(silent)
            found.append(
                f"The log of {of} does not say which samples were held out: told by settings and chance alone."
            )
        found += [f"{run.name} has stopped: {run.stopped.partition('. ')[0]}." for run in self.runs if run.stopped]
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
    shared = {
        (run.name, row.split, row.name)
        for table in tables
        for row in table.rows
        for run, figure in zip(table.runs, row.figures, strict=True)
        if figure is not None
    }
    alone = {
        run.name: [f"{split}: {name}" for split, name, _ in run.figures if (run.name, split, name) not in shared]
        for run in runs
    }
    return Comparison(
        runs,
        {name: values for name, values in settings.items() if len(set(values)) > 1},
        tables,
        {name: figures for name, figures in alone.items() if figures},
    )


def _tables(runs: Sequence[StoredRun]) -> list[Table]:
    tables, apart, changed = [], _told_apart(runs), _changed(runs)
    for here in _groups(runs):
        held_out, found = here[0].held_out, []
        for key in dict.fromkeys(key for run in here for key in run.figures):
            figures = _comparable([run.figures.get(key) for run in here], here)
            if sum(figure is not None for figure in figures) > 1:
                found.append(Row(*key, figures, None if _BASELINE in key[1] else best_of(figures)))
        names = [(row.split, row.name) for row in found]
        rows = [row if names.count((row.split, row.name)) > 1 else replace(row, task="") for row in found]
        more = [f"{name} {held_out[name]}" for name in apart if name in held_out]
        if here in changed.get(held_out["data"], ()):
            more.append(f"{_count(here)}held out as in {here[0].name}")
        tables += [Table(", ".join([held_out["data"], *more]), here, rows)] if rows else []
    return tables


def _groups(runs: Sequence[StoredRun]) -> list[list[StoredRun]]:
    """Runs with the same held-out samples."""
    groups: list[list[StoredRun]] = []
    for run in runs:
        for group in groups:
            if all(_same_samples(run, other) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _same_samples(one: StoredRun, other: StoredRun) -> bool:
    """Where a log does not say, some figure must have the same chance, if any has one."""
    if one.held_out != other.held_out:
        return False
    if one.samples is not None and other.samples is not None:
        return agree(one.samples, other.samples)
    both = [(one.figures[key].chance, other.figures[key].chance) for key in one.figures.keys() & other.figures.keys()]
    known = [(a, b) for a, b in both if a is not None and b is not None]
    return not known or any(math.isclose(a, b) for a, b in known)


def _comparable(figures: Sequence[Figure | None], runs: Sequence[StoredRun]) -> list[Figure | None]:
    """Without those whose chance is not that of the most, if the log of a run that has one does not say of which
    samples it is."""
    if all(run.samples is not None for run, figure in zip(runs, figures, strict=True) if figure is not None):
        return list(figures)
    chances = [None if figure is None or figure.chance is None else f"{figure.chance:.9g}" for figure in figures]
    most = max(chances, key=lambda chance: sum(c == chance for c, f in zip(chances, figures, strict=True) if f))
    return [figure if chance == most else None for figure, chance in zip(figures, chances, strict=True)]


def _changed(runs: Sequence[StoredRun]) -> dict[str, list[list[StoredRun]]]:
    """Data -> groups of runs that hold out different samples of them, although their settings agree."""
    found: dict[str, list[list[StoredRun]]] = {}
    groups = _groups(runs)
    for held_out in _different([group[0].held_out for group in groups]):
        if len(alike := [group for group in groups if group[0].held_out == held_out]) > 1:
            found.setdefault(held_out["data"], []).extend(alike)
    return found


def _asked(runs: Sequence[StoredRun]) -> dict[str, list[str]]:
    """Objective -> its tasks, where runs with the same held-out samples have figures of one name and several tasks."""
    found: dict[str, dict[str, None]] = {}
    for here in _groups(runs):
        tasks: dict[tuple[str, str], dict[str, None]] = {}
        for split, name, task in (key for run in here for key in run.figures):
            tasks.setdefault((split, name), {})[task] = None
        for (_, name), several in tasks.items():
            if len(several) > 1:
                found.setdefault(name.partition(": ")[0], {}).update(several)
    return {name: [task for task in tasks if task] for name, tasks in found.items()}


def _count(group: Sequence[StoredRun]) -> str:
    """How many samples are held out, and a comma; empty if it is not known."""
    samples = next((run.samples for run in group if run.samples), {})
    return f"{sum(split['samples'] for split in samples.values()):,} samples, " if samples else ""


def _titles(runs: Sequence[StoredRun]) -> list[str]:
    """Of their recipes, with the files where different ones have one name."""
    titles = [run.config.title for run in runs]
    own = [run.settings["recipe"] for run in runs]
    files = [t if r.config.recipe == file else f"{t} of {file}" for t, r, file in zip(titles, runs, own, strict=True)]
    return files if len(set(files)) > len(set(titles)) else titles


def _told_apart(runs: Sequence[StoredRun]) -> list[str]:
    """What runs on the same data differ in that decides which samples are held out."""
    found: dict[str, None] = {}
    for data in dict.fromkeys(run.data for run in runs):
        several = _different([run.held_out for run in runs if run.data == data])
        names = dict.fromkeys(name for each in several for name in each)
        found |= {name: None for name in names if len({each.get(name) for each in several}) > 1}
    return list(found)


def _different(values: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Each once."""
    return [value for i, value in enumerate(values) if value not in values[:i]]


def best_of(figures: Sequence[Figure | None]) -> int | None:
    """The run that is better than all others, with no interval that overlaps its own, nor reaches chance; None if there
    is none, or one of the intervals is not known."""
    ends: list[tuple[float, float, int, float]] = []  # the higher the better
    for i, figure in enumerate(figures):
        if figure is None:
            continue
        if figure.low is None or figure.high is None:
            return None
        sign = 1 if figure.higher_is_better else -1
        low, high = sorted((sign * figure.low, sign * figure.high))
        ends.append((low, high, i, -math.inf if figure.chance is None else sign * figure.chance))
    low, _, best, chance = max(ends)
    return best if low > chance and all(high < low for _, high, i, _ in ends if i != best) else None


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
    """Of each objective that several runs have, and whose task is the same."""
    charts: dict[str, str] = {}
    for name in dict.fromkeys(name for run in runs for name in run.losses):
        having = [run for run in runs if name in run.losses]
        tasks = {
            task: [r for r in having if r.task(name) == task] for task in dict.fromkeys(r.task(name) for r in having)
        }
        shared = {task: those for task, those in tasks.items() if len(those) > 1}
        for task, those in shared.items():
            of = f" ({task})" if len(shared) > 1 else ""
            charts[f"Loss: {name}{of}"] = overlaid({run.name: run.losses[name] for run in those}, colours)
    return charts


def _figures(found: Comparison, colours: Mapping[str, str]) -> dict[str, str]:
    """Of each shared figure that comes first in a run's own report, over the steps."""
    charts: dict[str, str] = {}
    for table in found.tables:
        for row in table.rows:
            first = next(figure for figure in row.figures if figure is not None)
            if not first.headline or len(charts) == _CHARTS:
                continue
            having = (run for run, figure in zip(table.runs, row.figures, strict=True) if figure is not None)
            curves = {run.name: _points(run, row) for run in having}
            of = f"{table.data}, " if len(found.tables) > 1 else ""
            charts[f"{row.title}, {of}{row.split}"] = overlaid(curves, colours, first.percent, points=True)
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
        rows = [[f"{r.split}: {r.title}" + ("" if r.higher_is_better else " ↓"), *_cells(r)] for r in table.rows]
        lines += ["", *_aligned([[f"figures on {table.data}", *(run.name for run in table.runs)], *rows])]
    legend = ["*: better than chance and all others, intervals apart; chance in brackets; ↓: lower is better"]
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
