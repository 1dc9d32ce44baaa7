"""`mmkernels <command>`: hands its arguments to the command, which has its own `--help`."""

from __future__ import annotations

import codecs
import sys

__all__ = ["main"]

USAGE = """usage: mmkernels <command> [options]

  info       what is installed, which backend runs, and why not another
  plan       how well lengths pack, and how evenly ranks share the packs (needs mmkernels[plan])
  pretrain   train a dual encoder on images and captions (needs mmkernels[pretrain])

mmkernels <command> --help says more; mmkernels --version shows the version"""

# Packages of the extras, by the name they are imported under.
_PRETRAIN_PACKAGES = {"tyro", "tqdm", "PIL", "tensorboard", "matplotlib", "safetensors", "jinja2"}
_PLAN_PACKAGES = {"tyro", "tabulate", "matplotlib", "pyarrow"}


def _info(argv: list[str]) -> int:
    from mmkernels import info

    return info.main(argv)


def _missing(command: str, extra: str, error: ModuleNotFoundError, packages: set[str]) -> int:
    """Says which package a command lacks and which extra has it; raises for one that is no extra's."""
    if error.name is None or error.name.split(".")[0] not in packages:
        raise error
    print(f"mmkernels {command} needs the package {error.name}: pip install 'mmkernels[{extra}]'", file=sys.stderr)
    return 2


def _pretrain(argv: list[str]) -> int:
    try:
        from mmkernels import pretrain
    except ModuleNotFoundError as error:
        return _missing("pretrain", "pretrain", error, _PRETRAIN_PACKAGES)
    return pretrain.main(argv)


def _plan(argv: list[str]) -> int:
    try:
        from mmkernels import plan_cli

        return plan_cli.main(argv)
    except ModuleNotFoundError as error:  # those of a file's format and of the picture come late
        return _missing(
            "plan", "parquet" if (error.name or "").startswith("pyarrow") else "plan", error, _PLAN_PACKAGES
        )


_COMMANDS = {"info": _info, "plan": _plan, "pretrain": _pretrain}


def _escaped(error: UnicodeError) -> tuple[bytes, int]:
    """What the terminal's encoding lacks: bytes of a path as they are, characters as \\u escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    written = (
        bytes([ord(char) - 0xDC00]) if "\udc80" <= char <= "\udcff" else char.encode("ascii", "backslashreplace")
        for char in lacking
    )
    return b"".join(written), error.end


def _print_anything() -> None:
    """A table after an hour of training is no place for a UnicodeEncodeError (the C locale has ASCII alone)."""
    codecs.register_error("mmkernels.escaped", _escaped)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where it was replaced, as in notebooks
            stream.reconfigure(errors="mmkernels.escaped")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    _print_anything()
    argv = sys.argv[1:] if argv is None else argv
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
