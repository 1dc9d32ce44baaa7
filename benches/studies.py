"""What the scripts here share: where results go, and what they were measured on."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch

from mmkernels.bench.machine import machine

RESULTS = Path(__file__).parent / "results"


def _commit() -> str | None:
    """The commit, with a plus sign if the tree has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, encoding="utf-8")
    if head.returncode != 0:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, encoding="utf-8"
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def results_of(study: str, about: dict[str, Any]) -> Path:
    """Where the results of a study go: named after the processor, its instructions and the day."""
    device = f"{about['device']}-{about['isa']}".lower().replace(" ", "-")
    return RESULTS / f"{study}-{device}-{about['date'][:10]}.json"


def measured_on() -> dict[str, Any]:
    """The machine's processors, versions, and the commit."""
    return {**machine(torch.device("cpu")), "commit": _commit()}
