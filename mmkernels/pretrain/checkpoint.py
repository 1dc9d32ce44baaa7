"""Checkpoints, written to a temporary folder and renamed, so that a kill at any moment leaves a complete one.

checkpoints/step-00000450/model.safetensors     weights, for use elsewhere
                          training.pt           optimizer, data cursor, for resuming
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["DamagedError", "latest", "load", "load_weights", "save", "step_of", "steps_in", "whole"]

_NAME = re.compile(r"step-(\d{8,})")


class DamagedError(ValueError):
    """A checkpoint that cannot be read; the message says which one and what to do."""


def steps_in(folder: Path) -> dict[int, Path]:
    """Complete checkpoints by step, oldest first."""
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
        folder: the run's checkpoints; created if missing.
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
    """Weights on `device`, and everything else on the CPU.

    Raises:
        DamagedError: a file is missing, cut short or otherwise damaged.
    """
    with whole(path / "training.pt") as file:
        training = torch.load(file, map_location="cpu", weights_only=True)
    return {name: weight.to(device) for name, weight in load_weights(path).items()}, training


def load_weights(path: Path, remedy: str = "") -> dict[str, Tensor]:
    """Weights alone, on the CPU. Raises DamagedError as `load` does; `remedy` says what to do then."""
    with whole(path / "model.safetensors", remedy) as file:
        found = from_bytes(file.read_bytes())  # safetensors cannot open a path that is not UTF-8
    return dict(sorted(found.items()))  # it gives them in any order


@contextmanager
def whole(file: Path, remedy: str = "") -> Iterator[Path]:
    """Turn any error while reading a checkpoint file into a DamagedError, which names the file."""
    try:
        yield file
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        remedy = remedy or f"Delete {file.parent} to resume from the previous checkpoint, or from the start"
        raise DamagedError(f"{file} is damaged ({type(error).__name__}: {reason}). {remedy}") from error


def _flush(path: Path) -> None:
    """Flush to disk: otherwise the rename may get there before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
