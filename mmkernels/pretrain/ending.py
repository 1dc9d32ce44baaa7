"""How a run ends: with its report, whether it has done its steps or had to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from mmkernels.pretrain.checkpoint import SaveError
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.trainer import Trainer

__all__ = ["Outcome", "reported"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. Its figures are in `folder.records()`."""

    folder: RunFolder
    step: int
    signal: int  # that interrupted it; 0: none

    @property
    def interrupted(self) -> bool:
        return self.signal != 0


@contextmanager
def reported(
    write: Callable[[RunFolder, Trainer], Any], folder: RunFolder, trainer: Trainer, journal: Journal
) -> Iterator[None]:
    """Write the report when the steps within are done, or when the run stops itself. Then the log says why.

    Args:
        write: the report.
        folder, trainer, journal: of the run.
    """
    try:
        yield
    except (NotFiniteError, TooManyBrokenError) as error:
        journal.stopped(str(error).partition(":\n")[0])  # the warnings before it have the names
        for held_out in trainer.held_out.values():
            for source in (held_out.source, held_out.train):
                source.broken.limit(1.0)  # those that can be read are examples still
        _write(write, folder, trainer)
        raise
    except SaveError as error:

        def try_to_write(folder: RunFolder, trainer: Trainer) -> None:
            with suppress(OSError):
                write(folder, trainer)

        with suppress(OSError):  # where a checkpoint does not fit, nothing else may
            journal.stopped(str(error))
        _write(try_to_write, folder, trainer)
        raise
    _write(write, folder, trainer)


def _write(write: Callable[[RunFolder, Trainer], Any], folder: RunFolder, trainer: Trainer) -> None:
    """On the leading rank, with all of the model."""
    trainer.ranks.at("writing the report", patient=True)
    with trainer.placed.whole():
        if trainer.ranks.leads:
            write(folder, trainer)
    trainer.ranks.meet()  # a launcher stops all others when one ends with an error
