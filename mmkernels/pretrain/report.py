"""`report.html`: one file with curves, recall and chance, and retrieved examples, from a run's log and weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, StrictUndefined

from mmkernels.pretrain.charts import COLOURS, loss_chart, recall_chart
from mmkernels.pretrain.data import Data, Tokenizer
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.evaluate import KS
from mmkernels.pretrain.examples import retrieved
from mmkernels.pretrain.model import DualEncoder
from mmkernels.pretrain.recipes import recipe
from mmkernels.pretrain.run_folder import RunFolder, stored_config, write_whole

__all__ = ["recall_table", "write_report"]

WAYS = {"image_to_text": "image → text", "text_to_image": "text → image"}
_SPLITS = {
    "A": "a drawing style never seen in training",
    "B": "concepts never seen in training",
    "C": "neither the style nor the concepts seen",
    "held_out": "captions never seen in training",
}


def write_report(folder: RunFolder, model: DualEncoder, data: Data, tokenizer: Tokenizer) -> Path:
    """Write the report of a run in its current state.

    Args:
        folder: the run's folder; its log has the figures.
        model: the trained model.
        data: the examples come from its held-out sets.
        tokenizer: the model's.

    Returns:
        the path of the report.
    """
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters["percent"] = lambda share: f"{100 * share:.1f}"
    template = page.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))
    examples = [
        {"name": name, "about": _about(name), "images": queries[0], "captions": queries[1]}
        for name, held_out in data.evals.items()
        if (queries := retrieved(model, held_out, tokenizer))
    ]
    write_whole(folder.report, printable(template.render(**_facts(folder), examples=examples)))
    return folder.report


def recall_table(folder: RunFolder) -> str:
    """The newest recall of every split, for a terminal."""
    lines = [f"{'held-out split':<16}{'':<14}" + "".join(f"{f'R@{k}':>14}" for k in KS)]
    for split, record in _newest(folder.records("eval")).items():
        for way, words in WAYS.items():
            cells = "".join(
                f"{100 * record[way][str(k)]:>7.1f} ({100 * record[f'chance_{way}'][str(k)]:.1f})".rjust(14) for k in KS
            )
            lines.append(f"{split:<16}{words:<14}{cells}")
    return "\n".join([*lines, "% of queries whose target is among the k nearest (chance in brackets)"])


def _facts(folder: RunFolder) -> dict[str, Any]:
    config = stored_config(folder.path)
    steps, evals, starts = folder.records("step"), folder.records("eval"), folder.records("start")
    newest = _newest(evals)
    chance_loss = recipe(config.recipe).objective(config).chance_loss(config.batch)
    return {
        "config": config,
        "settings": _flat(dataclasses.asdict(config)),
        "environment": starts[-1]["environment"],
        "steps": len(steps),
        "warnings": list(dict.fromkeys(r["message"] for r in folder.records("warning"))),  # a resumed run repeats some
        "headlines": _headlines(newest, steps, chance_loss, starts[-1]),
        "table": [
            {"split": split, "about": _about(split), "images": r["images"], "captions": r["captions"], "ways": _ways(r)}
            for split, r in newest.items()
        ],
        "ks": KS,
        "loss_svg": loss_chart(steps, chance_loss) if steps else "",
        "recall_svgs": {WAYS[way]: recall_chart(evals, list(newest), way, 10) for way in WAYS} if evals else {},
        "colours": dict(zip(newest, COLOURS, strict=False)),
    }


def _newest(evals: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {record["split"]: record for record in evals}


def _ways(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"words": words, "cells": [(record[way][str(k)], record[f"chance_{way}"][str(k)]) for k in KS]}
        for way, words in WAYS.items()
    ]


def _headlines(
    newest: Mapping[str, Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    chance_loss: float,
    start: Mapping[str, Any],
) -> list[dict[str, str]]:
    """The figures at the top of the page."""
    tiles = [
        {
            "value": f"{100 * record['image_to_text']['10']:.1f}%",
            "what": f"R@10, image → text, split {split}",
            "note": f"chance {100 * record['chance_image_to_text']['10']:.1f}%",
        }
        for split, record in newest.items()
    ]
    if steps:
        seconds = sum(r["seconds"] for r in steps)
        waited = sum(r["data_wait"] * r["seconds"] for r in steps) / seconds
        losses = [r["loss"] for r in steps[-20:]]
        tiles += [
            {
                "value": f"{sum(losses) / len(losses):.2f}",
                "what": "loss, mean of the last steps",
                "note": f"{chance_loss:.2f} at chance",
            },
            {
                "value": f"{median(r['samples_per_s'] for r in steps):,.0f}/s",
                "what": "samples, in the median step",
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
                "note": f"{start['samples']:,} training images",
            },
        ]
    return tiles


def _about(split: str) -> str:
    return _SPLITS.get(split, "")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings, by their command-line names."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value, default=str).strip('"')
    return flat
