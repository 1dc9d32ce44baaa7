"""`mmkernels pretrain` and `mmkernels recipes`: settings from the command line, a run, a table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmkernels.pretrain import recipes
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.loop import train
from mmkernels.pretrain.picture import picture
from mmkernels.pretrain.report import figure_table
from mmkernels.pretrain.run_folder import stored_config
from mmkernels.pretrain.wiring import leaves, leaves_of, typed

__all__ = ["list_recipes", "main", "parse"]

INTERRUPTED = 130  # the exit status by convention after Ctrl-C


def parse(argv: Sequence[str]) -> Config:
    """The config of a command line. Defaults are the recipe's, or a resumed run's own.

    Raises:
        ValueError: an unknown recipe, or no run to resume.
        SystemExit: an unknown option, an invalid setting, or --help.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--recipe", default=recipes.DEFAULT)
    known.add_argument("--run", type=Path)
    known.add_argument("--resume", action="store_true")
    first, _ = known.parse_known_args(argv)
    default = Config.of(first.recipe)
    if first.resume:
        folder = first.run or default.folder
        default = dataclasses.replace(stored_config(folder), run=folder, resume=True)
    recipe = default.wiring()
    branches, _ = typed(recipe)
    hints = typing.get_type_hints(Config)
    hidden: list[Any] = [
        ("parts", Annotated[hints["parts"], tyro.conf.Suppress], dataclasses.field(default_factory=dict))
    ]
    shown = dataclasses.make_dataclass(
        "Pretrain",
        [*hidden, *((name, kind, dataclasses.field(default=value)) for name, kind, value in branches)],
        bases=(Config,),
        frozen=True,
    )
    shown.__doc__ = f"{recipe.summary} ({recipe.source})."
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(Config)}
    given: Any = tyro.cli(
        shown,
        default=shown(**own),
        args=list(argv),
        prog="mmkernels pretrain",
        config=(tyro.conf.AvoidSubcommands,),
    )
    before, parts = leaves(recipe), dict(default.parts)
    for name, _, _ in branches:
        inner = leaves_of(getattr(given, name))
        flat = {f"{name}.{path}" if path else name: value for path, value in inner.items()}
        parts |= {path: value for path, value in flat.items() if value != before[path]}
    config = Config(**{**{name: getattr(given, name) for name in own}, "parts": parts})
    try:
        config.wiring()
    except ValueError as error:  # a part refuses a value
        print(f"mmkernels pretrain: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return config


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
        print(figure_table(outcome.folder))
    print(f"report: {outcome.folder.report}")
    if outcome.interrupted:
        print(f"stopped at step {outcome.step}; resume with: mmkernels pretrain --resume --run {outcome.folder.path}")
        return INTERRUPTED
    return 0


def list_recipes(argv: Sequence[str]) -> int:
    """Run `mmkernels recipes`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mmkernels recipes", description="The recipes of mmkernels pretrain.")
    parser.add_argument("recipe", nargs="?", help="show the wiring of this one (a name, or a file.py)")
    parser.add_argument("--names", action="store_true", help="print the names alone, one per line")
    args = parser.parse_args(list(argv))
    try:
        if args.recipe is not None:
            print(picture(args.recipe, recipes.load(args.recipe)))
            return 0
        names = recipes.names()
        width = max(map(len, names))
        for name in names:
            print(name if args.names else f"{name:<{width}}  {recipes.load(name).summary}")
    except ValueError as error:
        print(f"mmkernels recipes: {error}", file=sys.stderr)
        return 1
    return 0
