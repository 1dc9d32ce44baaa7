"""Whether a command that a page shows exists, with these options: parsed by the program itself, and run where that is
quick."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import tyro
from blocks import ROOT, Block
from torch.distributed.run import get_args_parser

from mmkernels.cli import main

__all__ = ["commands", "problem"]

_CHEAP = ("info", "recipes", "scale")  # run, not only parsed
# Lines of a script around its commands.
_PLUMBING = re.compile(r"#|\w+=|if \[|exit ")


class _Parsed(Exception):  # noqa: N818  an event, not an error
    """The arguments were accepted; nothing has been done with them."""


def commands(block: Block) -> Iterator[str]:
    """The command lines of a block, each on one line; without what a console shows below them."""
    text = block.code.replace("\\\n", " ")
    session = text.startswith("$ ")
    for line in text.splitlines():
        if line.strip() and (not session or line.startswith("$ ")) and not _PLUMBING.match(line):
            yield " ".join(line.removeprefix("$ ").split())


def problem(command: str) -> str | None:
    """Why a command would not be accepted, or None."""
    words = [re.sub(r"\$\w+", "1", word) for word in shlex.split(command, comments=True)]
    words = ["x" if word == "..." else word for word in words]
    if words[0] == "srun":
        words = words[1:]
    check = _CHECKS.get(words[0])
    return f"unknown program {words[0]}" if check is None else check(words[1:])


def _mmkernels(argv: Sequence[str]) -> str | None:
    if argv[0] in _CHEAP and "ours.json" not in argv:
        return _said(lambda: main(list(argv)))
    return _said(lambda: main(list(argv)), parse_only=True)


def _said(call: Callable[[], Any], parse_only: bool = False) -> str | None:
    """What a program prints if it does not accept its arguments; `parse_only` stops it once it has."""
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stderr(output))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if parse_only:
            stack.enter_context(_stopping(argparse.ArgumentParser, "parse_args"))
            stack.enter_context(_stopping(tyro, "cli"))
        try:
            status = call()
        except _Parsed:
            return None
        except SystemExit as error:
            status = error.code
    return None if status in (0, None) else output.getvalue() or f"status {status}"


def _stopping(where: Any, name: str) -> Any:
    original = getattr(where, name)

    def stops(*args: Any, **options: Any) -> Any:
        result = original(*args, **options)
        if "return_unknown_args" in options:  # only a first look
            return result
        raise _Parsed

    return mock.patch.object(where, name, stops)


def _python(argv: Sequence[str]) -> str | None:
    if argv[0] == "-m":
        return _module(argv[1], argv[2:])
    path = ROOT / argv[0]
    if not path.exists():
        return f"no file {argv[0]}"

    def script() -> None:
        with mock.patch.object(sys, "argv", [str(path), *argv[1:]]), mock.patch.object(sys, "path", [*sys.path]):
            sys.path.insert(0, str(path.parent))
            runpy.run_path(str(path), run_name="__main__")

    return _said(script, parse_only=True)


def _module(name: str, argv: Sequence[str]) -> str | None:
    if name == "mmkernels.pretrain":
        return _mmkernels(["pretrain", *argv])
    if name == "mmkernels.integrations.open_clip":  # its arguments are those of open_clip
        return None if (ROOT / "mmkernels/integrations/open_clip/__main__.py").exists() else f"no module {name}"
    return f"unknown module {name}"


def _torchrun(argv: Sequence[str]) -> str | None:
    def parsed() -> None:
        options = get_args_parser().parse_args(list(argv))
        inner.append((options.module, options.training_script, options.training_script_args))

    inner: list[tuple[bool, str, list[str]]] = []
    said = _said(parsed)
    if said is not None:
        return said
    is_module, script, rest = inner[0]
    return _module(script, rest) if is_module else _python([script, *rest])


def _make(argv: Sequence[str]) -> str | None:
    variables = {word.partition("=")[0] for word in argv if "=" in word}
    unknown = [name for name in variables if f"$({name})" not in _text("Makefile")]
    if unknown:
        return f"the Makefile knows no {unknown[0]}"
    done = subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def _pip(argv: Sequence[str]) -> str | None:
    if argv[0] != "install":
        return f"unknown command pip {argv[0]}"
    table = _text("pyproject.toml").partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([\w-]+) = ", table, re.MULTILINE)
    named = {
        extra for word in argv for each in re.findall(r"^(?:\.|mmkernels)\[(.*)\]$", word) for extra in each.split(",")
    }
    options = {word for word in argv if word.startswith("-")}
    unknown = sorted(named - set(extras)) + sorted(option for option in options if f" {option}" not in _help_of_pip())
    return f"pip install: unknown: {', '.join(unknown)}" if unknown else None


@cache
def _help_of_pip() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--help"], capture_output=True, text=True, check=True
    )
    return done.stdout


class _Declared:
    """Takes the place of pytest's parser, and keeps the names of options."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def getgroup(self, *_: Any) -> _Declared:
        return self

    def addoption(self, *names: str, **_: Any) -> None:
        self.names |= set(names)

    def addini(self, *_: Any, **__: Any) -> None:
        pass


def _of_benches() -> set[str]:
    """Options of the suite and of pytest-benchmark."""
    from pytest_benchmark.plugin import pytest_addoption

    from mmkernels.bench import plugin

    declared: Any = _Declared()
    for add in (plugin.pytest_addoption, pytest_addoption):
        add(declared)
    return declared.names


def _pytest(argv: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(prog="pytest", exit_on_error=False)
    parser.add_argument("-m")
    parser.add_argument("-k")
    parser.add_argument("-n")
    parser.add_argument("paths", nargs="*", type=Path)
    options, unknown = parser.parse_known_args(list(argv))
    if options.m is not None and f'"{options.m}: ' not in _text("pyproject.toml"):
        return f"no marker {options.m}"
    missing = [str(path) for path in options.paths if not (ROOT / path).exists()]
    if any(path.parts[0] == "benches" for path in options.paths):
        unknown = [name for name in unknown if name.partition("=")[0] not in _of_benches()]
    return f"pytest: {[*unknown, *missing]}" if unknown or missing else None


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


_CHECKS: dict[str, Callable[[Sequence[str]], str | None]] = {
    "make": _make,
    "mmkernels": _mmkernels,
    "pip": _pip,
    "pytest": _pytest,
    "python": _python,
    "torchrun": _torchrun,
}
