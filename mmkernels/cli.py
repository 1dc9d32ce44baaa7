"""`mmkernels <command>`: hands its arguments to the command, which has its own `--help`."""

from __future__ import annotations

import sys

__all__ = ["main"]

USAGE = """usage: mmkernels <command> [options]

  info       what is installed, which backend runs, and why not another
  pretrain   train a dual encoder on images and captions (needs mmkernels[pretrain])

mmkernels <command> --help says more; mmkernels --version shows the version"""

# Packages of the [pretrain] extra, by the name they are imported under.
_PRETRAIN_PACKAGES = {"tyro", "tqdm", "PIL", "tensorboard", "matplotlib", "safetensors", "jinja2"}


def _info(argv: list[str]) -> int:
    from mmkernels import info

    return info.main(argv)


def _pretrain(argv: list[str]) -> int:
    try:
        from mmkernels import pretrain
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in _PRETRAIN_PACKAGES:
            raise
        print(f"mmkernels pretrain needs the package {error.name}: pip install 'mmkernels[pretrain]'", file=sys.stderr)
        return 2
    return pretrain.main(argv)


_COMMANDS = {"info": _info, "pretrain": _pretrain}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status."""
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
