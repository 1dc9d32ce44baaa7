"""`mmkernels pretrain`: settings from the command line, a run, a table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.loop import train
from mmkernels.pretrain.recipes import RECIPES, recipe
from mmkernels.pretrain.report import recall_table
from mmkernels.pretrain.run_folder import stored_config

__all__ = ["main", "parse"]

INTERRUPTED = 130  # the exit status by convention after Ctrl-C


def parse(argv: Sequence[str]) -> Config:
    """The config of a command line. Defaults are the recipe's, or a resumed run's own.

    Raises:
        ValueError: an invalid setting.
        SystemExit: an unknown option, or --help.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--recipe", choices=RECIPES, default="clip")
    known.add_argument("--run", type=Path)
    known.add_argument("--resume", action="store_true")
    first, _ = known.parse_known_args(argv)
    default = dataclasses.replace(Config(recipe=first.recipe), **recipe(first.recipe).SETTINGS)
    if first.resume:
        folder = first.run or default.folder
        default = dataclasses.replace(stored_config(folder), run=folder, resume=True)
    return tyro.cli(Config, default=default, args=list(argv), prog="mmkernels pretrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels pretrain`; returns the exit status."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        outcome = train(config)
    except (ValueError, NotFiniteError, TooManyBrokenError) as error:
        print(f"mmkernels pretrain: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print("mmkernels pretrain: stopped; --resume continues from the newest checkpoint", file=sys.stderr)
        return INTERRUPTED
    if outcome.folder.records("eval"):
        print(recall_table(outcome.folder))
    print(f"report: {outcome.folder.report}")
    if outcome.interrupted:
        print(f"stopped at step {outcome.step}; resume with: mmkernels pretrain --resume --run {outcome.folder.path}")
        return INTERRUPTED
    return 0
