"""`mmkernels pretrain` and `mmkernels recipes`: settings from the command line, a run, a table at the end."""

from __future__ import annotations

import argparse
import dataclasses
import signal
import sys
import time
import typing
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmkernels.pretrain import recipes
from mmkernels.pretrain.checkpoint import SaveError
from mmkernels.pretrain.config import Config
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.guards import NotFiniteError
from mmkernels.pretrain.launch import leads
from mmkernels.pretrain.loop import train
from mmkernels.pretrain.picture import picture
from mmkernels.pretrain.ranks import PeerError
from mmkernels.pretrain.report import figure_table
from mmkernels.pretrain.run_folder import RunFolder, stored_config
from mmkernels.pretrain.wiring import leaves, leaves_of, typed

__all__ = ["asked", "list_recipes", "main", "parse", "trained"]

_LINGER = 1.0  # seconds that the leading rank has to print
SIGNALLED = 128  # plus the number of a signal: the exit status by convention after it


def parse(argv: Sequence[str]) -> Config:
    """The config of a command line. Defaults are the recipe's, or a resumed run's own.

    Raises:
        ValueError: an unknown recipe, or no run to resume.
        SystemExit: an unknown option, an invalid setting, or --help.
    """
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--recipe", default=recipes.DEFAULT)
    known.add_argument("--run", "--run-folder", type=Path)
    known.add_argument("--resume", action="store_true")
    first, _ = known.parse_known_args(argv)
    default = Config.of(first.recipe)
    if first.resume:
        folder = first.run or default.folder
        default = dataclasses.replace(stored_config(folder), run=folder, resume=True)
    return asked(default, argv, "pretrain")


def asked(default: Config, argv: Sequence[str], command: str, options: Any = None, hide: Sequence[str] = ()) -> Config:
    """A config with the changes of a command line, which may name its settings and those of its recipe.

    Args:
        default: the config without them.
        argv: the command line.
        command: of mmkernels, for `--help`.
        options: a frozen dataclass whose fields are further options; they are not looked at.
        hide: settings that `--help` leaves out, besides those that only a run folder has.

    Raises:
        SystemExit: an unknown option, an invalid setting, or --help.
    """
    recipe = default.wiring()
    branches, _ = typed(recipe)
    hints = typing.get_type_hints(Config)
    own = {field.name: getattr(default, field.name) for field in dataclasses.fields(Config)}
    hidden: list[Any] = [
        (name, Annotated[hints[name], tyro.conf.Suppress], dataclasses.field(default_factory=partial(own.get, name)))
        for name in ("parts", "transfers", *hide)
    ]
    # torchrun takes --run for one of its own options.
    kind: Any = hints["run"]
    named = Annotated[kind, tyro.conf.arg(name="run-folder", aliases=["--run"])]
    hidden.append(("run", named, dataclasses.field(default=default.run)))
    shown = dataclasses.make_dataclass(
        command.capitalize(),
        [*hidden, *((name, kind, dataclasses.field(default=value)) for name, kind, value in branches)],
        bases=(Config,) if options is None else (Config, type(options)),
        frozen=True,
    )
    shown.__doc__ = f"{recipe.summary} ({recipe.source})."
    given: Any = tyro.cli(
        shown,
        default=shown(**own, **({} if options is None else vars(options))),
        args=list(argv),
        prog=f"mmkernels {command}",
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
        print(f"mmkernels {command}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels pretrain`; returns the exit status."""
    return trained("pretrain", parse, sys.argv[1:] if argv is None else argv)


def trained(command: str, parsed: Callable[[Sequence[str]], Config], argv: Sequence[str]) -> int:
    """Train what a command line asks for, and show the figures; returns the exit status."""
    try:
        outcome = train(parsed(argv))
    except (ValueError, NotFiniteError, TooManyBrokenError, PeerError, SaveError) as error:
        if leads() or not isinstance(error, (PeerError, NotFiniteError)):  # of these rank 0 says enough
            print(f"mmkernels {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C
        print(f"mmkernels {command}: stopped; once it has begun, --resume continues a run", file=sys.stderr)
        return SIGNALLED + signal.SIGINT
    status = SIGNALLED + outcome.signal if outcome.interrupted else 0
    if not leads():
        time.sleep(_LINGER if status else 0)  # a launcher stops the others once one ends with an error
        return status
    if outcome.folder.records("eval"):
        print(figure_table(outcome.folder))
    if learned := _learned(outcome.folder):
        print(learned)
    print(f"report: {outcome.folder.report}")
    if outcome.interrupted:
        print(f"stopped at step {outcome.step}; resume with: mmkernels {command} --resume --run {outcome.folder.path}")
    return status


def _learned(folder: RunFolder) -> str:
    """How many of the parameters have learned in each stage, if not all of them in every one."""
    start = folder.records("start")[-1]
    if all(count == start["parameters"] for count in start["trainable"]):
        return ""
    shares = (f"{count:,} ({100 * count / start['parameters']:.1f}%)" for count in start["trainable"])
    return f"learned: {', then '.join(shares)} of {start['parameters']:,} parameters"


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
