"""`report.html`: one file with curves, figures beside chance, and retrieved examples, from a run's log and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmkernels.pretrain.charts import COLOURS, figure_chart, loss_chart
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.evaluate import evaluating
from mmkernels.pretrain.examples import retrieved
from mmkernels.pretrain.metrics import Figure, Retrieval
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.run_folder import RunFolder, stored_config, write_whole
from mmkernels.pretrain.trainer import Trainer
from mmkernels.pretrain.wiring import leaves

__all__ = ["figure_table", "write_report"]

_SPLITS = {
    "A": "a drawing style never seen in training",
    "B": "concepts never seen in training",
    "C": "neither the style nor the concepts seen",
    "combinations": "things never seen together in training",
    "drawings": "a drawing style never seen in training",
    "held_out": "samples never seen in training",
}


def write_report(folder: RunFolder, trainer: Trainer) -> Path:
    """Write the report of a run in its current state.

    Args:
        folder: the run's folder; its log has the figures.
        trainer: its model and held-out sets, for examples.

    Returns:
        the path of the report.
    """
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["percent"] = lambda share: f"{100 * share:.1f}"
    template = page.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
    write_whole(
        folder.report, printable(template.render(**_facts(folder, trainer.recipe), examples=_examples(trainer)))
    )
    return folder.report


def _examples(trainer: Trainer) -> list[dict[str, Any]]:
    """Of every metric that retrieves, on every held-out set."""
    streams, found = trainer.recipe.streams, []
    with evaluating(trainer.trained):
        for metric in (m for m in trainer.recipe.metrics if isinstance(m, Retrieval)):
            fields = (streams[metric.a].field or metric.a, streams[metric.b].field or metric.b)
            for name, held_out in trainer.held_out.items():
                ways = retrieved(trainer.trained, metric, held_out, fields)
                found += [{"name": name, "about": _about(name), "ways": ways}] if ways else []
    return found


def figure_table(folder: RunFolder) -> str:
    """The newest figures of every split, for a terminal."""
    rows = [
        (split, words, "  ".join(_cell(column, f) for column, f in cells))
        for split, record in _newest(folder.records("eval")).items()
        for words, cells in _rows(record).items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)] if rows else [0, 0]
    lines = [f"{split:<{widths[0]}}  {words:<{widths[1]}}  {cells}".rstrip() for split, words, cells in rows]
    return "\n".join([*lines, "chance in brackets; ↓: lower is better"])


def _cell(column: str, row: Mapping[str, Any]) -> str:
    figure = Figure(**row)
    chance = f" ({figure.shown_chance()})" if figure.chance is not None else ""
    value = figure.shown() + ("%" if figure.percent else "")
    return f"{column + ' ' if column else ''}{value:>6}{chance:<8}"


def _rows(record: Mapping[str, Any]) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Figures by what they measure; those that differ in R@k alone share a row. ↓: lower is better."""
    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for figure in record["figures"]:
        words, _, last = figure["name"].rpartition(" ")
        at_k = bool(words) and last.startswith("R@")
        name = words if at_k else figure["name"] + ("" if figure["higher_is_better"] else " ↓")
        rows.setdefault(name, []).append((last if at_k else "", figure))
    return rows


def _facts(folder: RunFolder, recipe: Recipe) -> dict[str, Any]:
    config = stored_config(folder.path)
    steps, evals, starts = folder.records("step"), folder.records("eval"), folder.records("start")
    newest = _newest(evals)
    table: list[dict[str, Any]] = [
        {"split": split, "about": _about(split), "rows": _rows(record)} for split, record in newest.items()
    ]
    return {
        "config": config,
        "data": config.data or recipe.data,
        "recipe": recipe,
        "settings": _flat({**dataclasses.asdict(config), **leaves(recipe)}),
        "environment": starts[-1]["environment"],
        "steps": len(steps),
        "warnings": list(dict.fromkeys(r["message"] for r in folder.records("warning"))),  # a resumed run repeats some
        "headlines": _headlines(newest, steps, starts[-1]),
        "table": table,
        "recalls": any(column for row in table for cells in row["rows"].values() for column, _ in cells),
        "loss_svg": loss_chart(steps) if steps else "",
        "figure_svgs": {name: figure_chart(evals, list(newest), name) for name in _headline_names(newest)},
        "colours": dict(zip(newest, cycle(COLOURS), strict=False)),
    }


def _newest(evals: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {record["split"]: record for record in evals}


def _headline_names(newest: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(f["name"] for record in newest.values() for f in record["figures"] if f["headline"]))


def _headlines(
    newest: Mapping[str, Mapping[str, Any]], steps: Sequence[Mapping[str, Any]], start: Mapping[str, Any]
) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    by_name: dict[str, dict[str, Figure]] = {}
    for split, record in newest.items():
        for figure in (Figure(**row) for row in record["figures"] if row["headline"]):
            by_name.setdefault(figure.name, {})[split] = figure
    tiles = []
    for found in by_name.values():
        for split, figure in found.items() if len(found) <= len(COLOURS) else [("", _mean(list(found.values())))]:
            values = sorted(found.values(), key=lambda each: each.value)
            notes = [] if split else [f"{values[0].shown()} to {values[-1].shown()}"]
            notes += [f"chance {figure.shown_chance()}"] if figure.chance is not None else []
            notes += [] if figure.higher_is_better else ["lower is better"]
            tiles.append(
                {
                    "value": figure.shown() + ("%" if figure.percent else ""),
                    "what": f"{figure.name}, " + (f"split {split}" if split else f"mean of {len(found)} splits"),
                    "note": ", ".join(notes),
                }
            )
    if steps:
        seconds = sum(r["seconds"] for r in steps)
        waited = sum(r["data_wait"] * r["seconds"] for r in steps) / seconds
        losses = [r["loss"] for r in steps[-20:]]
        chance = steps[-1].get("chance")
        tiles += [
            {
                "value": f"{sum(losses) / len(losses):.2f}",
                "what": "loss, mean of the last steps",
                "note": f"{chance:.2f} at chance" if chance is not None else f"{steps[0]['loss']:.2f} at the start",
            },
            {
                "value": f"{median(r['tokens_per_s'] for r in steps):,.0f}/s",
                "what": "tokens, in the median step",
                "note": f"{100 * waited:.0f}% of the time on data",
            },
            {
                "value": f"{int(seconds // 60)}:{int(seconds % 60):02d}",
                "what": "minutes of training",
                "note": f"{max(r['peak_memory'] for r in steps) / 2**20:,.0f} MB at the peak",
            },
            {
                "value": f"{start['parameters'] / 1e6:.2f} M",
                "what": "parameters",
                "note": f"{start['samples']:,} training samples",
            },
        ]
    return tiles


def _mean(figures: Sequence[Figure]) -> Figure:
    chances = [figure.chance for figure in figures if figure.chance is not None]
    chance = fmean(chances) if chances else None
    return dataclasses.replace(figures[0], value=fmean(figure.value for figure in figures), chance=chance)


def _about(split: str) -> str:
    return _SPLITS.get(split.rpartition(": ")[2], "")  # in a mixture it follows the data set's name


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings, by their command-line names."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, default=str).strip('"')
    return flat
