"""The folders of checkpoints: which there are, which of them is the newest that can be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from mmkernels.pretrain.checkpoint.agreement import Group, of_first

__all__ = [
    "DamagedError",
    "SaveError",
    "discard",
    "flush",
    "install",
    "latest",
    "newest_whole",
    "partial_of",
    "step_of",
    "steps_in",
    "whole",
]

T = TypeVar("T")
_NAME = re.compile(r"(step|replaced)-(\d{8,})")


class DamagedError(ValueError):
    """A checkpoint that cannot be read; the message says which file of it and what to do.

    Args:
        what: the file and what is wrong with it.
        remedy: what to do.
    """

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


class SaveError(OSError):
    """A checkpoint that could not be written; the message says which one and why."""


def steps_in(folder: Path) -> dict[int, Path]:
    """Checkpoints by step, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in folder.glob("*-*"))
    named = sorted((match[1], int(match[2]), path) for match, path in found if match)
    return dict(sorted({step: path for _, step, path in named}.items()))  # a "step" hides one that it has replaced


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder, whole or not."""
    return next(reversed(steps_in(folder).values()), None)


def step_of(checkpoint: Path | None) -> int:
    """Optimizer steps done; 0 without a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name) if checkpoint else None
    return int(match[2]) if match else 0


def newest_whole(folder: Path, load: Callable[[Path], T], *, group: Group = None) -> tuple[T | None, list[str]]:
    """Load the newest checkpoint that is whole.

    Args:
        folder: a run's checkpoints.
        load: what loads one; it raises DamagedError, on every rank, before it changes anything.
        group: the ranks that load together; None: this process alone.

    Returns:
        what `load` returned, None without any checkpoint; a warning for each newer checkpoint that is damaged.

    Raises:
        DamagedError: there are checkpoints, but all are damaged.
    """
    errors: list[tuple[Path, DamagedError]] = []
    for path in reversed(of_first(lambda: list(steps_in(folder).values()), group)):
        try:
            found = load(path)
        except DamagedError as error:
            errors.append((path, error))
            continue
        return found, [f"{error.what}. Left out; the run goes on from {path.name}" for _, error in errors]
    if not errors:
        return None, []
    damaged = ", ".join(str(path) for path, _ in errors)
    raise DamagedError(errors[0][1].what, f"Delete {damaged} to begin the run anew") from errors[0][1]


@contextmanager
def whole(file: Path, remedy: str = "") -> Iterator[Path]:
    """Turn any error while reading a checkpoint file into a DamagedError, which names the file."""
    try:
        yield file
    except (MemoryError, DamagedError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        remedy = remedy or f"Delete {file.parent} to use the checkpoint before it, or to begin anew without one"
        raise DamagedError(f"{file} is damaged ({type(error).__name__}: {reason})", remedy) from error


def partial_of(folder: Path, step: int) -> Path:
    """A new empty folder to write a checkpoint in; what a kill left of others is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("partial-*"):
        shutil.rmtree(path)
    made = folder / f"partial-{step:08d}"
    made.mkdir()
    return made


def install(partial: Path, step: int, keep: int) -> Path:
    """Give a written folder its name, and remove all but the `keep` newest up to it."""
    folder, final = partial.parent, partial.parent / f"step-{step:08d}"
    aside = folder / f"replaced-{step:08d}"
    flush(partial)
    if final.exists():  # another of the same step: one of both has its name at any moment
        discard(aside)
        os.replace(final, aside)
    os.replace(partial, final)
    flush(folder)
    # Later ones were damaged, or this step would not have run again.
    kept = [path for at, path in steps_in(folder).items() if at <= step][-keep:]
    for path in folder.glob("*-*"):
        if _NAME.fullmatch(path.name) and path not in kept:
            discard(path)
    return final


def discard(path: Path) -> None:
    """Remove a folder, if it is there: a kill leaves it whole or a partial one."""
    if path.exists():
        gone = path.with_name(f"partial-{path.name}")
        os.replace(path, gone)
        shutil.rmtree(gone)


def flush(path: Path) -> None:
    """Flush to disk: otherwise the rename may get there before the bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
