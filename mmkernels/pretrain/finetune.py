"""`mmkernels finetune`: from the folder of a run and a task to the config of a run that begins with its weights."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmkernels.pretrain.cli import asked, trained
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data.opening import EMBEDDED, part_names, places
from mmkernels.pretrain.run_folder import stored_config
from mmkernels.pretrain.setup import read_by
from mmkernels.pretrain.transfer import Transfer, drawn_anew, transferred

__all__ = ["STEPS", "finetuned", "main", "parse"]

# Of the rate of pretraining. Weights that have learned something are moved less; those that begin anew need it all.
_LR = {"probe": 5.0, "adapters": 2.0, "unfreeze": 0.5, "scratch": 1.0}
_LR_OF_ALL = 0.5
STEPS, _WARMUP, _EVAL_EVERY = 400, 20, 100
# Settings that say how the base's data are read: another data set has its own.
_OF_DATA = ("data_weights", "labels", "csv_separator", "csv_img_key", "csv_caption_key", "filter")
_OF_RUN = ("ema", "profile", "resume", "train_fraction", "skip", "spike", "validate")


@dataclass(frozen=True, kw_only=True)
class Finetune(Transfer):
    """Go on from a trained model with another task. `--from RUN --task TASK --help` also shows every setting of the new
    run and of its recipe."""

    base: Annotated[Path, tyro.conf.arg(name="from")]
    """Folder of the run to begin with, or of its exported weights."""
    parts_before: Annotated[dict[str, Any], tyro.conf.Suppress] = dataclasses.field(default_factory=dict)

    @property
    def transfer(self) -> Transfer:
        return Transfer(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Transfer)})


def finetuned(base: Path | str, transfer: Transfer, **changes: Any) -> Config:
    """The config of a run that goes on with the weights of another.

    Args:
        base: folder of the other run, or of its exported weights. Its data, seed, batch, precision and device are kept;
            learning rate and steps are those of a shorter run.
        transfer: the task, and what learns.
        **changes: settings of the new run. Another `data` does not take over how the base's is read.

    Raises:
        RunFolderError: no run in that folder.
        ValueError: the task needs what the base does not have.

    Example:
        >>> probe = finetuned("runs/mae", Transfer("classify", label="group", probe=True), train_fraction=0.1)
        >>> train(probe)
    """
    run = Path(base)
    config = stored_config(run)
    recipe, transfer = config.wiring(), dataclasses.replace(transfer, parts_before=config.parts)
    factor = _lr_factor(transfer)
    if config.transfers:  # the base's rate is a share, too
        factor /= _lr_factor(config.transfers[-1])
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    data = config.data or recipe.data
    same_data = places(changes.get("data") or data) == places(data)
    learned_own = set(part_names(data)) - EMBEDDED.keys()
    own: dict[str, Any] = {
        # Other data may be a copy of the run's own, or these come again after one of those that come along.
        "held_out_by": config.held_out_by or (tuple(read_by(recipe)[0]) if learned_own else ()),
        "without": tuple(stream for stream in config.without if stream in transferred(recipe, transfer).streams),
        **({} if same_data else {name: defaults[name] for name in _OF_DATA}),
        **{name: defaults[name] for name in _OF_RUN},
        "run": Path("runs") / "-".join([Path(os.path.abspath(run)).name, transfer.task, *_ways(transfer)]),
        "init": run,
        "fresh": drawn_anew(recipe, transfer),
        "transfers": (*config.transfers, transfer),
        "parts": {},
        "lr": float(f"{factor * config.lr:.3g}"),
        "steps": STEPS,
        "warmup": _WARMUP,
        "eval_every": _EVAL_EVERY,
    }
    made = dataclasses.replace(config, **{**own, **changes})
    made.wiring()  # raises what cannot work
    return made


def _ways(transfer: Transfer) -> list[str]:
    """How it learns, other than everything from the base's weights."""
    return [name for name in ("probe", "adapters", "unfreeze", "scratch") if getattr(transfer, name)]


def _lr_factor(transfer: Transfer) -> float:
    """The first way counts: a head on random features learns at the rate of a head."""
    return next((_LR[way] for way in _ways(transfer)), _LR_OF_ALL)


def parse(argv: Sequence[str]) -> Config:
    """The config of a command line. Defaults follow from the run in --from, or are a resumed run's own.

    Raises:
        ValueError: no run in that folder, or the task needs what it does not have; no run to resume.
        SystemExit: an unknown option, an invalid setting, or --help.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--from", dest="base")
    known.add_argument("--task")
    known.add_argument("--data")
    known.add_argument("--run", type=Path)
    known.add_argument("--resume", action="store_true")
    first, _ = known.parse_known_args(argv)
    if first.resume and first.base is None:
        if first.run is None:
            raise ValueError("run: expected the folder of the run to resume, got none")
        default = dataclasses.replace(stored_config(first.run), run=first.run, resume=True)
        return asked(default, argv, "finetune")
    own: Any = tyro.cli
    args = list(argv)
    if first.base is not None and first.task is not None:  # then --help shows the settings of the run, too
        args = [each for each in argv if each not in ("-h", "--help")]
    options, _ = own(Finetune, args=args, prog="mmkernels finetune", return_unknown_args=True)
    changes = {} if first.data is None else {"data": first.data}
    default = finetuned(options.base, options.transfer, **changes)
    if first.resume:
        folder = first.run or default.folder
        asked_for = {name: getattr(default, name) for name in ("init", "fresh", "transfers")}
        default = dataclasses.replace(stored_config(folder), run=folder, resume=True, **asked_for)
    return asked(default, argv, "finetune", options, hide=("recipe", "init", "fresh"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels finetune`; returns the exit status."""
    return trained("finetune", parse, sys.argv[1:] if argv is None else argv)
