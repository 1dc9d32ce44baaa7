"""Runs as they lie on the disk, to be compared, and how a comparison groups them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmkernels.pretrain import Config
from mmkernels.pretrain.config import to_dict
from mmkernels.pretrain.metrics import Figure

__all__ = ["ENVIRONMENT", "OWN", "figure", "grouped", "stored"]

ENVIRONMENT = {"mmkernels": "1", "torch": "2", "device": "cpu", "threads": "1"}
OWN: dict[str, Any] = {"recipe": "clip", "data": "folder:x"}


def figure(name: str, value: float, width: float | None = 0.02, **more: Any) -> dict[str, Any]:
    ends = {} if width is None else {"low": value - width, "high": value + width}
    return Figure(name, value, 0.1, **ends, **more).to_dict()


def stored(
    folder: Path, figures: Any = (), *, steps: int = 4, wiring: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A run as it lies on the disk: evaluated after each step, with these figures at the last."""
    folder.mkdir(parents=True)
    wiring = {"objectives.contrast.weight": 1.0} if wiring is None else wiring
    settings = {**to_dict(Config(steps=4, **config)), "wiring": wiring}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    records = [{"kind": "start", "step": 0, "samples": 10, "parameters": 2_500_000, "environment": ENVIRONMENT}]
    for step in range(1, steps + 1):
        cost = {"seconds": 30.0, "tokens_per_s": 100.0 * step, "peak_memory": 2**20 * 300}
        records.append({"kind": "step", "step": step, "loss": 8.0 / step, **cost})
        if figures:
            rows = [{**row, "value": row["value"] * step / steps} for row in figures]
            records.append({"kind": "eval", "step": step, "split": "held_out", "figures": rows})
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return folder


def grouped(found: Any) -> list[tuple[str, list[str]]]:
    return [(table.data, [run.name for run in table.runs]) for table in found.tables]
