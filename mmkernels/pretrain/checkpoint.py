"""Checkpoints: written beside and renamed into place, so that a kill at any moment leaves a whole one.

checkpoints/step-00000450/model.safetensors     weights, for whoever wants to use them
                          training.pt           optimizer, data cursor, random state: what resuming needs besides
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["latest", "load", "save", "step_of", "steps_in"]

_NAME = re.compile(r"step-(\d{8,})")


def steps_in(folder: Path) -> dict[int, Path]:
    """Whole checkpoints by step, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("step-*"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def latest(folder: Path) -> Path | None:
    return next(reversed(steps_in(folder).values()), None)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done; 0 without a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(match[1]) if match else 0


def save(folder: Path, step: int, weights: dict[str, Tensor], training: dict[str, Any], *, keep: int) -> Path:
    """Write a checkpoint and remove all but the `keep` newest.

    Args:
        folder: of the run's checkpoints; made if need be.
        step: optimizer steps done.
        weights: contiguous tensors that share no memory.
        training: tensors, numbers, strings, lists and dicts of them.
        keep: at least 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    partial = folder / f"partial-{step:08d}"
    for path in folder.glob("partial-*"):  # left by a kill
        shutil.rmtree(path)
    partial.mkdir()
    save_file(weights, partial / "model.safetensors")
    torch.save(training, partial / "training.pt")
    for path in (*partial.iterdir(), partial):
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    _flush(folder)
    for old in list(steps_in(folder).values())[:-keep]:
        shutil.rmtree(old)
    return final


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights on `device`, and what else was saved, on the CPU."""
    weights = load_file(path / "model.safetensors", device=str(device))
    return weights, torch.load(path / "training.pt", map_location="cpu", weights_only=True)


def _flush(path: Path) -> None:
    """To the disk: a rename may otherwise overtake the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
