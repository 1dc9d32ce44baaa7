"""`mmkernels bench`: the suite, for those who installed a wheel; `mmkernels bench model` plans exchanges instead."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch
import tyro

from mmkernels.bench import suite
from mmkernels.bench.case import FAMILIES
from mmkernels.runtime.backends import BACKENDS

__all__ = ["main"]


@dataclass(frozen=True)
class Options:
    """Check the kernels on this machine, time them against what you would use without them, and show both.

    Every contender's result is checked before any is timed. `mmkernels bench model` plans a loss over many ranks."""

    families: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Of the benches; all if none is given."""
    quick: bool = False
    """Sizes that take a few minutes in all; the default."""
    full: bool = False
    """Sizes of trainers; half an hour on two cores."""
    peers: bool = False
    """Measure other installed packages, too."""
    compile: bool = False
    """Measure torch.compile and FlexAttention on a CPU, too, where they compile for tens of seconds."""
    filter: str = ""
    """Only what has all these words in its name, such as "infonce fwd+bwd N=2048"."""
    backend: tuple[str, ...] = ()
    """Our backends to measure, by name; of the planner, ranks and the loop there is one."""
    device: str = ""
    """Where to run; by default cuda, if there is one."""
    threads: int = 0
    """CPU threads; 0 for torch's default."""
    seconds: float | None = None
    """To spend on each contender of a point; by default 0.3, and 1 with --full."""
    memory: bool = True
    """Measure peak memory, too."""
    json: Path | None = None
    """Write the results there, in pytest-benchmark's format; in a folder, named after machine, instructions and day."""
    html: Path | None = None
    """Write a page there."""
    compare: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="A.json B.json")] = None
    """Measure nothing; say what became slower from A to B, by the ratio to the baseline in the same file."""


def _wrong(options: Options) -> str:
    """What is wrong with the options, or nothing."""
    unknown = [name for name in options.families if name not in FAMILIES]
    if unknown:
        return f"family: expected some of {', '.join(FAMILIES)}, got {unknown[0]!r}"
    if options.quick and options.full:
        return "--quick: expected not to be given with --full"
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        return f"--seconds: expected a number > 0, got {options.seconds}"
    for backend in options.backend:
        if backend not in BACKENDS:
            return f"--backend: expected some of {', '.join(BACKENDS)}, got {backend!r}"
    ignored = [name for name in ("families", "json", "html", "filter") if options.compare and getattr(options, name)]
    if ignored:
        return f"--compare: expected alone, got {ignored[0]}, too"
    if options.threads < 0:
        return f"--threads: expected a number >= 0, got {options.threads}"
    for name in ("json", "html"):
        path = getattr(options, name)
        if path is None:
            continue
        folder = path if name == "json" and path.is_dir() else path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            return f"--{name}: expected a path in a folder that exists and can be written, got {str(path)!r}"
        if name == "html" and path.is_dir():
            return f"--html: expected a file, got the folder {str(path)!r}"
    return _wrong_device(options.device)


def _wrong_device(name: str) -> str:
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        return f"--device: expected cpu, cuda or cuda:N, got {name!r}"
    if device.type not in ("cpu", "cuda"):
        return f"--device: expected cpu, cuda or cuda:N, got {name!r}"
    if device.type == "cuda" and not (device.index or 0) < torch.cuda.device_count():
        return f"--device: expected one of {torch.cuda.device_count()} CUDA devices, got {name!r}"
    return ""


def _arguments(options: Options, results: Path) -> list[str]:
    """Pytest's."""
    file = Path(suite.__file__)
    given = [f"{file}::bench_{family}" for family in options.families or FAMILIES]
    given += ["-c", os.devnull, f"--rootdir={file.parent}", "--import-mode=importlib", "-pno:cacheprovider"]
    given += ["-pmmkernels.bench.plugin", "-opython_functions=bench_*", "-q", "--tb=short", "--disable-warnings"]
    given += ["--benchmark-quiet", f"--benchmark-json={results}"]
    flags = {"full": options.full, "peers": options.peers, "compile": options.compile, "no-memory": not options.memory}
    given += [f"--{name}" for name, on in flags.items() if on]
    given += [f"--backend={name}" for name in options.backend]
    values = {"device": options.device, "threads": options.threads, "benchmark-max-time": options.seconds}
    given += [f"--{name}={value}" for name, value in values.items() if value]
    return [*given, f"--filter={options.filter}"]


def _file_name(results: dict[str, Any], options: Options) -> str:
    """Of a part of the suite it begins with another word, so that it does not replace that day's whole run."""
    about = results["machine_info"]["mmkernels"]
    size = "" if results["mmkernels"]["size"] == "full" else "-quick"
    part = "-".join([*options.families, options.filter, *options.backend]).strip("-")
    name = f"{'part-' + part if part else 'suite'}-{about['device']}-{about['isa']}-{about['date'][:10]}{size}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json"


def _compare(before: Path, after: Path) -> int:
    from mmkernels.bench import compare

    return compare.main(before, after)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels bench`; returns the exit status: 1 if a result is wrong, or slower in a comparison."""
    given = sys.argv[1:] if argv is None else list(argv)
    if given[:1] == ["model"]:
        from mmkernels.bench import model_cli

        return model_cli.main(given[1:])
    options = tyro.cli(Options, prog="mmkernels bench", args=given)
    wrong = _wrong(options)
    if wrong:
        print(f"mmkernels bench: {wrong}", file=sys.stderr)
        return 2
    if options.compare is not None:
        return _compare(*options.compare)
    return _run(options)


def _run(options: Options) -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.json"
        status = int(pytest.main(_arguments(options, results)))
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            print(
                f"mmkernels bench: --filter: expected words of some test's name, got {options.filter!r}",
                file=sys.stderr,
            )
            return 2
        found: dict[str, Any] | None = json.loads(results.read_text(encoding="utf-8")) if results.exists() else None
    if found is None:
        if options.json or options.html:
            print("mmkernels bench: nothing was timed, so that there are no results to write", file=sys.stderr)
        return status or int(bool(options.json or options.html))
    if options.json is not None:
        path = options.json / _file_name(found, options) if options.json.is_dir() else options.json
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a run that is killed here leaves the older file
            scratch = Path(folder) / path.name
            scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            scratch.replace(path)
        print(f"results: {path}")
    if options.html is not None:
        from mmkernels.bench.page import render

        render(found, options.html)
        print(f"page: {options.html}")
    return status
