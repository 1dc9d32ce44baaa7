"""Writing checkpoints while training goes on."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from mmkernels.pretrain.checkpoint.agreement import Group, everyones, of_first, own_group
from mmkernels.pretrain.checkpoint.folders import SaveError, flush, install, partial_of
from mmkernels.pretrain.checkpoint.manifest import INDEX, OTHERS, Entry, Sum, sums_of, write_index, write_manifest
from mmkernels.pretrain.checkpoint.naming import moments_of, named, weights_of
from mmkernels.pretrain.checkpoint.shards import KINDS, Piece, mine

__all__ = ["Saver", "save"]


class _Job(NamedTuple):
    """A checkpoint to write: all of it is on the host, and nobody else's."""

    folder: Path
    step: int
    pieces: dict[str, Piece]
    values: bytes
    copied: Any  # an event on the device after which the pieces have arrived; None: they have


class Saver:
    """Writes checkpoints in the background, one at a time. As a context manager it waits at the end.

    Args:
        keep: checkpoints that stay, at least 1.
        group: the ranks that write together; None: this process alone. All of them make the saver at the same time, and
            call its methods in the same order: it has a gloo group of its own, whose messages are apart from those of
            training.

    Example:
        >>> with Saver(keep=2) as saver:
        ...     for step in range(1, 1001):
        ...         train_one(model, optimizer)
        ...         if step % 100 == 0:
        ...             saver.save(folder, step, model, optimizer, {"step": step})
    """

    def __init__(self, keep: int, group: Group = None) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.keep, self.group = keep, own_group(group)
        writing()
        self._thread: threading.Thread | None = None
        self._error: SaveError | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self.wait()
        except SaveError:
            if kind is None:  # else what is raised already says more
                raise

    def save(
        self,
        folder: Path,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        values: Mapping[str, Any] | None = None,
    ) -> Path:
        """Copy a state to the host, and write it in the background. Of copies on several ranks, one is written.

        Args:
            folder: the run's checkpoints; created if missing. All ranks see it.
            step: optimizer steps done.
            module: plain, DDP, or sharded by `fully_shard`. What is not a DTensor is taken to be the same on all ranks;
                buffers are those of the first.
            optimizer: of parameters of the module.
            values: further numbers, strings, tensors, lists and dicts of them; those of the first rank are kept. None
                may be called "optimizer".

        Returns:
            the folder that the checkpoint will have, once `wait` has returned.

        Raises:
            SaveError: the checkpoint before it could not be written. This one is not, either.
            ValueError: the module lacks a parameter of the optimizer. TypeError: it has state that is not a tensor.
        """
        self.wait()
        values = dict(values or {})
        if "optimizer" in values:
            raise ValueError("values: expected any name but 'optimizer', which has the optimizer's settings")
        tensors = {f"{KINDS[0]}.{name}": weight for name, weight in weights_of(module).items()}
        buffers = tensors.keys() - {f"{KINDS[0]}.{name}" for name in named(module)}
        if optimizer is not None:
            moments, values["optimizer"] = moments_of(module, optimizer)
            tensors |= {f"{KINDS[1]}.{name}": moment for name, moment in moments.items()}
        pieces, copied = _on_host(mine(tensors, buffers, self.group))
        job = _Job(folder, step, pieces, _as_bytes(values), copied)
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"checkpoint {step}")
        self._thread.start()
        return folder / f"step-{step:08d}"

    def wait(self) -> None:
        """Return once the last checkpoint is on disk. Raise SaveError if it could not be written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def _run(self, job: _Job) -> None:
        try:
            _write(job, self.keep, self.group)
        except BaseException as error:  # DCP's CheckpointException is no Exception
            what = f"the checkpoint of step {job.step} could not be written to {job.folder}"
            self._error = SaveError(f"{what} ({_reason(error)})")
            self._error.__cause__ = error


def save(
    folder: Path,
    step: int,
    module: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    values: Mapping[str, Any] | None = None,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint of this process alone, and return when it is on disk.

    Arguments, result and errors are those of `Saver` and `Saver.save`.
    """
    with Saver(keep) as saver:
        return saver.save(folder, step, module, optimizer, values)


def _write(job: _Job, keep: int, group: Group) -> None:
    """Write a checkpoint; all ranks at once. Its name it gets when all of it is on disk."""
    if job.copied is not None:
        job.copied.synchronize()
    partial = of_first(lambda: partial_of(job.folder, job.step), group)
    stored = writing().write_shards(partial, job.pieces, group)
    entries = {
        name: Entry(piece.local.dtype, torch.Size(piece.size), [stored[name]]) for name, piece in job.pieces.items()
    }
    files = {partial / part.file for part in stored.values()}
    everything = everyones(lambda: (entries, sums_of(files)), group)
    of_first(lambda: _finish(job, partial, everything, keep), group)


def writing() -> ModuleType:
    """What writes shards; imported late, because that takes a second, but not by the thread that writes."""
    return import_module("mmkernels.pretrain.checkpoint.writing")


def _finish(job: _Job, partial: Path, everything: list[tuple[dict[str, Entry], dict[str, Sum]]], keep: int) -> None:
    entries: dict[str, Entry] = {}
    sums: dict[str, Sum] = {}
    for some, of_them in everything:
        sums |= of_them
        for name, entry in some.items():
            before = entries[name].parts if name in entries else []
            entries[name] = entry._replace(parts=[*before, *entry.parts])
    write_index(partial, entries)
    (partial / OTHERS).write_bytes(job.values)
    flush(partial / OTHERS)
    sums |= sums_of(partial / name for name in (INDEX, OTHERS, ".metadata"))
    write_manifest(partial, job.step, sums)
    install(partial, job.step, keep)


def _on_host(pieces: Mapping[str, Piece]) -> tuple[dict[str, Piece], Any]:
    """(Copies on the host, an event after which they have arrived). From CUDA they are queued like its other work: the
    next step need not wait."""
    copies, event = {}, None
    for name, piece in pieces.items():
        pinned = piece.local.is_cuda
        copy = torch.empty(piece.local.shape, dtype=piece.local.dtype, pin_memory=pinned)
        copies[name] = piece._replace(local=copy.copy_(piece.local, non_blocking=pinned))
    if any(piece.local.is_cuda for piece in pieces.values()):
        event = torch.cuda.Event()
        event.record()
    return copies, event


def _as_bytes(values: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    return buffer.getvalue()


def _reason(error: BaseException) -> str:
    """In one line; of an error that DCP gathers, what each rank has met."""
    failures = getattr(error, "failures", None) or {}
    told = [f"rank {rank}: {_reason(wrapped[0])}" for rank, wrapped in failures.items()]
    return "; ".join(told) or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
