"""`report.html`: one file with what a run's recipe is about, from its log and its weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.metrics import Figure, Groups
from mmkernels.pretrain.plotting import COLOURS
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.report.charts import curve_chart, figure_chart, loss_chart
from mmkernels.pretrain.report.figures import headline_figures, newest_by_split
from mmkernels.pretrain.report.render import rendered
from mmkernels.pretrain.report.section import Run
from mmkernels.pretrain.report.sections import sections_of
from mmkernels.pretrain.report.tables import groups_of, recalls_of, table_of
from mmkernels.pretrain.run_folder import RunFolder, stored_config, write_whole
from mmkernels.pretrain.wiring import leaves

__all__ = ["headlines", "speed_of", "steps_done", "write_report"]

_MB = 2**20
_KINDS = ("step", "eval", "start", "warning")
_TILES = 6  # figures at the top


def _share(percent: float) -> str:
    return f"{percent:.{0 if percent == 0 or percent >= 9.95 else 1}f}%"


# Values of a step: their titles, in which unit, and how they are written.
_SPEED: dict[str, tuple[str, float, Callable[[float], str]]] = {
    "tokens_per_s": ("Tokens a second", 1, lambda value: f"{value:,.0f}"),
    "samples_per_s": ("Samples a second", 1, lambda value: f"{value:,.0f}"),
    "padding_saved": ("Padding saved", 0.01, _share),
    "data_wait": ("Time spent on data", 0.01, _share),
    "peak_memory": ("Peak memory", _MB, lambda value: f"{value:,.0f} MB"),
    "seconds": ("Seconds a step", 1, lambda value: f"{value:.2g} s"),
    "seconds_predicted": ("Seconds a step, predicted", 1, lambda value: f"{value:.2g} s"),
}
_NO_CURVE = {"kind", "step", "loss", "chance", "tokens", *_SPEED}


def write_report(folder: RunFolder, run: Run) -> Path:
    """Write the report of a run in its current state.

    Args:
        folder: the run's folder; its log has the figures.
        run: its recipe, model and held-out sets, for examples: a `Trainer`, for one.

    Returns:
        the path of the report.
    """
    page = rendered("report.html.jinja", **_facts(folder, run), sections=sections_of(run))
    write_whole(folder.report, printable(page))
    return folder.report


def _facts(folder: RunFolder, run: Run) -> dict[str, Any]:
    config, recipe = stored_config(folder.path), run.recipe
    records = folder.records()
    steps, evals, starts, warnings = ([r for r in records if r.get("kind") == kind] for kind in _KINDS)
    skipped = sum(1 for record in warnings if record.get("skipped"))
    told = [record for record in warnings if not record.get("stopped")]
    told = [record for record in records[-1:] if record.get("stopped")] + told  # why, unless it has gone on since
    done, idle = steps_done(records), [name for name in recipe.objectives if name not in run.learned]
    untaught = f"{', '.join(idle)}: no step has taught this: its figures are those of random weights"
    newest = newest_by_split(evals)
    labels = [metric.label for metric in recipe.metrics if isinstance(metric, Groups)]
    return {
        "config": config,
        "data": config.data or recipe.data,
        "recipe": recipe,
        "settings": flat({**dataclasses.asdict(config), **leaves(recipe)}),
        "environment": starts[-1]["environment"],
        "steps": f"{done}" + (f" ({skipped} skipped)" if skipped else ""),
        "warnings": list(dict.fromkeys(r["message"] for r in told)) + [untaught] * bool(idle and done),  # once each
        "headlines": headlines(newest, steps, starts[-1], not recipe.draw),
        "older": _older(newest, done),
        "recalls": recalls_of(newest),
        "table": table_of(newest, labels),
        "groups": groups_of(newest, labels),
        "intervals": any(row.get("low") is not None for record in newest.values() for row in record["figures"]),
        "loss_svgs": _losses(steps, recipe),
        "figure_svgs": {name: figure_chart(evals, list(newest), name) for name in headline_figures(newest)},
        "other_svgs": _others(steps),
        "speed": speed_of(steps),
    }


def steps_done(records: Iterable[Mapping[str, Any]]) -> int:
    """How many steps the records of a log tell of, skipped ones included."""
    return max((record.get("step", 0) for record in records), default=0)


def _older(newest: Mapping[str, Mapping[str, Any]], done: int) -> str:
    """What to say of figures that were measured before the last step, of which everything else is."""
    at = sorted({record["step"] for record in newest.values() if record["step"] != done})
    return f"Measured after step {', '.join(map(str, at))}, before the last of the {done}." if at else ""


def _losses(steps: Sequence[Mapping[str, Any]], recipe: Recipe) -> dict[str, str]:
    """The loss, and each objective's own where there are several; where one is drawn a step, these alone."""
    own = [name for name in recipe.objectives if any(f"{name}/loss" in record for record in steps)]
    found = {"Training loss": loss_chart(steps)} if steps and not recipe.draw else {}
    return found | {f"Loss: {name}": loss_chart(steps, f"{name}/loss", f"{name}/chance") for name in own}


def _others(steps: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What else a step logs: the learning rate, the gradient's norm, values of the objectives' own."""
    names = dict.fromkeys(name for record in steps for name in record if name not in _NO_CURVE)
    names = {name: None for name in names if not name.endswith(("/loss", "/chance"))}
    points = {name: [(r["step"], r[name]) for r in steps if isinstance(r.get(name), (int, float))] for name in names}
    return {name: curve_chart(each) for name, each in points.items() if each}


def speed_of(steps: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Each of _SPEED: its curve, its median, and between which values the middle 80% of the steps are."""
    found = []
    for key, (name, unit, shown) in _SPEED.items():
        points = [(record["step"], record[key] / unit) for record in steps if key in record]
        if not points:
            continue
        values = [value for _, value in points]
        tenths = quantiles(values, n=10, method="inclusive") if len(values) > 1 else values
        numbers = {"median": median(values), "low": tenths[0], "high": tenths[-1]}
        curve = curve_chart(points, shown)
        found.append({"name": name, "svg": curve, **{what: shown(value) for what, value in numbers.items()}})
    return found


def headlines(
    newest: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    start: Mapping[str, Any],
    one_loss: bool = True,
) -> list[dict[str, str]]:
    """The tiles at the top of the page; one_loss: all steps have the same objectives."""
    tiles, names = [], headline_figures(newest)
    first_only = sum(map(len, names.values())) > _TILES and len(names) > 1  # the others are in the tables below
    for found in names.values():
        shown = list(found.items())[: 1 if first_only else None]
        for split, figure in shown if len(shown) <= len(COLOURS) else [("", _mean(list(found.values())))]:
            values = sorted(found.values(), key=lambda each: each.value)
            notes = [figure.shown_interval()] if split else [f"{values[0].shown()} to {values[-1].shown()}"]
            notes += [f"chance {figure.shown_chance()}"] if figure.chance is not None else []
            notes += [] if figure.higher_is_better else ["lower is better"]
            at = {newest[name]["step"] for name in ([split] if split else found)}
            notes += [f"after step {min(at)}"] if steps and min(at) < steps[-1]["step"] else []
            tiles.append(
                {
                    "value": figure.shown() + ("%" if figure.percent else ""),
                    "what": f"{figure.name}, " + (f"split {split}" if split else f"mean of {len(found)} splits"),
                    "note": ", ".join(filter(None, notes)),
                }
            )
    return tiles + (_of_steps(steps, start)[0 if one_loss else 1 :] if steps else [])


def _of_steps(steps: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> list[dict[str, str]]:
    seconds = sum(r["seconds"] for r in steps)
    waited = sum(r["data_wait"] * r["seconds"] for r in steps) / seconds
    kinds = [{key for key in record if key.endswith("/loss")} for record in steps[-20:]]
    last = [r for r, kind in zip(steps[-20:], kinds, strict=True) if kind == kinds[-1]]  # of the same objectives
    losses, chances = [r["loss"] for r in last], [r["chance"] for r in last if r.get("chance") is not None]
    chance = fmean(chances) if chances else None
    most = max(start.get("trainable", [start["parameters"]]))  # of its stages
    share = most / start["parameters"]
    return [
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
            "note": f"{max(r['peak_memory'] for r in steps) / _MB:,.0f} MB at the peak",
        },
        {
            "value": f"{start['parameters'] / 1e6:.2f} M",
            "what": "parameters" if most == start["parameters"] else f"parameters; {share:.1%} learn",
            "note": f"{start['samples']:,} training samples",
        },
    ]


def _mean(figures: Sequence[Figure]) -> Figure:
    chances = [figure.chance for figure in figures if figure.chance is not None]
    chance = fmean(chances) if chances else None
    value = fmean(figure.value for figure in figures)
    return dataclasses.replace(figures[0], value=value, chance=chance, low=None, high=None)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings, by their command-line names."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = json.dumps(value, default=str, ensure_ascii=False).strip('"')
    return found
