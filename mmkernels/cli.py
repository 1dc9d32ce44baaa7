"""`mmkernels <command>`: pass the arguments to the command, which has its own `--help`."""

from __future__ import annotations

import codecs
import os
import select
import sys

__all__ = ["main"]

USAGE = """usage: mmkernels <command> [options]

  info         what is installed, which backend runs, and why
  bench        check the kernels, time them against what you would use without them (needs mmkernels[bench])
  plan         how well lengths pack, and how evenly ranks share the packs (needs mmkernels[plan])
  scale        what a training step takes on many ranks (needs mmkernels[plan])
  fetch        get a larger data set for pretrain (needs mmkernels[pretrain])
  data-report  what is in a data set, and what is wrong with it (needs mmkernels[report])
  pretrain     train a model by a recipe (needs mmkernels[pretrain])
  finetune     go on from a trained model with another task (needs mmkernels[pretrain])
  export       a trained model in a folder of its own (needs mmkernels[pretrain])
  evaluate     measure a trained model on held-out data (needs mmkernels[pretrain])
  compare      runs side by side (needs mmkernels[pretrain])
  recipes      the recipes of pretrain, or the wiring of one (needs mmkernels[pretrain])

mmkernels <command> --help shows its options; mmkernels --version shows the version"""

# Packages of the extras, by import name.
_PRETRAIN_PACKAGES = {"tyro", "tqdm", "PIL", "tensorboard", "matplotlib", "safetensors", "jinja2", "tokenizers"}
_REPORT_PACKAGES = {*_PRETRAIN_PACKAGES, "imagehash", "datasketch", "py3langid", "sklearn", "scipy"}
_BENCH_PACKAGES = {"tyro", "tabulate", "pytest", "pytest_benchmark", "jinja2"}
_PLAN_PACKAGES = {"tyro", "tabulate", "matplotlib", "pyarrow"}


def _info(argv: list[str]) -> int:
    from mmkernels import info

    return info.main(argv)


def _missing(command: str, extra: str, error: ModuleNotFoundError, packages: set[str]) -> int:
    """Print which package a command lacks and which extra installs it; re-raise for any other package."""
    package = (error.name or "").split(".")[0]
    if package not in packages:
        raise error
    print(f"mmkernels {command} needs the package {package}: pip install 'mmkernels[{extra}]'", file=sys.stderr)
    return 2


def _bench(argv: list[str]) -> int:
    try:
        from mmkernels.bench import cli
    except ModuleNotFoundError as error:
        return _missing("bench", "bench", error, _BENCH_PACKAGES)
    return cli.main(argv)


def _pretrain(argv: list[str]) -> int:
    try:
        from mmkernels import pretrain
    except ModuleNotFoundError as error:
        return _missing("pretrain", "pretrain", error, _PRETRAIN_PACKAGES)
    return pretrain.main(argv)


def _export(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain import export
    except ModuleNotFoundError as error:
        return _missing("export", "pretrain", error, _PRETRAIN_PACKAGES)
    return export.main(argv)


def _fetch(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain import fetch
    except ModuleNotFoundError as error:
        return _missing("fetch", "pretrain", error, _PRETRAIN_PACKAGES)
    return fetch.main(argv)


def _finetune(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain import finetune
    except ModuleNotFoundError as error:
        return _missing("finetune", "pretrain", error, _PRETRAIN_PACKAGES)
    return finetune.main(argv)


def _evaluate(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain import evaluate_cli
    except ModuleNotFoundError as error:
        return _missing("evaluate", "pretrain", error, _PRETRAIN_PACKAGES)
    return evaluate_cli.main(argv)


def _data_report(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain import data_report
    except ModuleNotFoundError as error:
        return _missing("data-report", "report", error, _REPORT_PACKAGES)
    return data_report.main(argv)


def _recipes(argv: list[str]) -> int:
    try:
        from mmkernels import pretrain
    except ModuleNotFoundError as error:
        return _missing("recipes", "pretrain", error, _PRETRAIN_PACKAGES)
    return pretrain.list_recipes(argv)


def _compare(argv: list[str]) -> int:
    try:
        from mmkernels.pretrain.report import compare_cli
    except ModuleNotFoundError as error:
        return _missing("compare", "pretrain", error, _PRETRAIN_PACKAGES)
    return compare_cli.main(argv)


def _plan(argv: list[str]) -> int:
    try:
        from mmkernels import plan_cli

        return plan_cli.main(argv)
    except ModuleNotFoundError as error:  # file formats and the picture import lazily
        return _missing(
            "plan", "parquet" if (error.name or "").startswith("pyarrow") else "plan", error, _PLAN_PACKAGES
        )


def _scale(argv: list[str]) -> int:
    try:
        from mmkernels import plan_cli

        return plan_cli.scale(argv)
    except ModuleNotFoundError as error:
        return _missing("scale", "plan", error, _PLAN_PACKAGES)


_COMMANDS = {
    "bench": _bench,
    "compare": _compare,
    "data-report": _data_report,
    "evaluate": _evaluate,
    "export": _export,
    "fetch": _fetch,
    "finetune": _finetune,
    "info": _info,
    "plan": _plan,
    "pretrain": _pretrain,
    "recipes": _recipes,
    "scale": _scale,
}


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    """Encode what the terminal's encoding lacks: bytes of a path unchanged, characters as \\u escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    written = (
        bytes([ord(char) - 0xDC00]) if "\udc80" <= char <= "\udcff" else char.encode("ascii", "backslashreplace")
        for char in lacking
    )
    return b"".join(written), error.end


def _print_anything() -> None:
    """Never let printing raise UnicodeEncodeError, e.g. for the table after an hour of training in the C locale."""
    codecs.register_error("mmkernels.escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where the stream was replaced, as in notebooks
            stream.reconfigure(errors="mmkernels.escaped")


def _reader_is_gone() -> bool:
    """Whether the reader of the output has closed the pipe, as in `mmkernels info | head -1`."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)  # POLLERR and POLLHUP are always reported
    except (AttributeError, ValueError):  # closed from the start, or replaced as in notebooks
        return False
    return bool(poll.poll(0))


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 141 if its reader has closed the pipe, as in a shell after SIGPIPE."""
    _print_anything()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)  # also where there is no stdout
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout at exit
        return 141


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] == "--version":
        from mmkernels import __version__

        print(__version__)
        return 0
    if argv[0] not in _COMMANDS:
        print(f"mmkernels: no command {argv[0]!r}\n{USAGE}", file=sys.stderr)
        return 2
    return _COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
