"""`mmkernels compare RUN RUN ...`: a table in the terminal, and a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmkernels.pretrain.report.compare import compared, comparison_page, comparison_table
from mmkernels.pretrain.run_folder import write_whole

__all__ = ["main"]

_MARK = "mmkernels compare"  # in the head of each page


def main(argv: Sequence[str]) -> int:
    """Run `mmkernels compare`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mmkernels compare",
        description="Runs side by side: settings that differ, figures with their intervals, curves, cost.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, finished or not")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.html"), help="the page to write; default: %(default)s"
    )
    args = parser.parse_args(list(argv))
    try:
        _expect_ours(args.out)
        found = compared(args.runs)
        page = comparison_page(found)
    except ValueError as error:
        print(f"mmkernels compare: {error}", file=sys.stderr)
        return 1
    print(comparison_table(found))
    try:
        write_whole(args.out, page)
    except OSError as error:
        print(f"mmkernels compare: --out {args.out} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    print(f"page: {args.out}")
    return 0


def _expect_ours(out: Path) -> None:
    """Raise ValueError if the page would replace something that is no such page."""
    if not out.exists():
        return
    head = out.open("rb").read(500) if out.is_file() else b""
    if _MARK.encode() not in head:
        what = "a folder" if out.is_dir() else "another file"
        raise ValueError(f"--out: expected a new file or an earlier comparison, got {what}, {out}")
