"""`mmkernels data-report`: from the name of a data set to a page, its figures as JSON, and a filter list."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import tyro

from mmkernels.pretrain.data.filter_list import TRAIN, FilterList
from mmkernels.pretrain.data.opening import places
from mmkernels.pretrain.data.unicode import printable
from mmkernels.pretrain.data_report.kinds import KINDS
from mmkernels.pretrain.data_report.page import page
from mmkernels.pretrain.data_report.report import IDENTITY, Report, examine
from mmkernels.pretrain.data_report.settings import DataReport
from mmkernels.pretrain.run_folder import write_whole

__all__ = ["data_report", "main"]

INTERRUPTED = 130  # the exit status by convention after Ctrl-C


def data_report(options: DataReport) -> Report:
    """Examine a data set and write report.html, report.json and, if asked, drop.jsonl.

    Raises:
        ValueError: the data cannot be opened; the folder holds something else, the report of other data, or a list that
            would no longer belong to its report.
    """
    _check_folder(options)
    options.folder.mkdir(parents=True, exist_ok=True)  # before all the reading, should it be impossible
    try:
        report = examine(options)
        html, figures = page(report), json.dumps(report.json(), indent=1) + "\n"
    except BaseException:
        with suppress(OSError):
            options.folder.rmdir()  # unless there was an earlier report
        raise
    if options.drop:
        write_whole(options.folder / "drop.jsonl", report.filter_list().text())
    write_whole(options.folder / "report.json", figures)
    write_whole(options.folder / "report.html", html)
    return report


def _check_folder(options: DataReport) -> None:
    """Raise ValueError if a report must not be written there."""
    folder = options.folder
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"out: expected a folder, got {folder}, which is a file")
    if not any(folder.iterdir()):
        return
    try:
        earlier = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        kind, source = earlier["kind"], str(earlier["source"])
    except (OSError, ValueError, TypeError, KeyError):
        kind, source = None, ""
    if kind != IDENTITY:
        raise ValueError(f"out: expected a new folder, or that of an earlier report, got {folder} with other files")
    if options.out is None and places(source) != places(options.source):
        raise ValueError(
            f"out: expected a folder of its own for the report of {options.source}, got {folder}, its default, with "
            f"that of {source}. Name another with --out, or the same one, to replace the report in it"
        )
    _check_list(folder / "drop.jsonl", options.drop)


def _check_list(path: Path, drop: Sequence[str]) -> None:
    """Raise ValueError if a filter list must not be replaced, or would stay beside a report that is not its own."""
    if not path.exists():
        return
    if not drop:
        raise ValueError(
            f"drop: expected what to leave out, as {path} is a list of the earlier report there, got nothing. Write a "
            "new list with --drop, name another folder with --out, or delete the list"
        )
    try:
        FilterList.read(path)
    except ValueError as error:
        raise ValueError(f"out: expected a folder without files of yours, got {path}, which is no list") from error


def summary(report: Report) -> str:
    """For a terminal."""
    counts, splits = report.counts, report.found.splits
    rows = [("", *splits), *((kind, *(f"{counts[kind][split]:,}" for split in splits)) for kind in KINDS)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(splits) + 1)]
    lines = []
    for kind, *cells in rows:
        aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([kind.ljust(widths[0]), *aligned]))
    if report.data.partial:
        read = sum(len(rows) for rows in report.data.read.values())
        lines.append(f"only a part was read: {read:,} of {sum(map(len, report.data.splits.values())):,} samples")
    if report.options.drop:
        dropped = [each for each in report.filter_list().dropped if each.split == TRAIN and each.index is not None]
        place = report.options.folder / "drop.jsonl"
        lines.append(f"{place}: {len(dropped):,} of {len(report.data.train):,} training samples to leave out")
        lines.append(f"train without them: {report.training}")
    return printable("\n".join([*lines, f"report: {report.options.folder / 'report.html'}"]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels data-report`; returns the exit status."""
    options = tyro.cli(DataReport, prog="mmkernels data-report", args=None if argv is None else list(argv))
    try:
        print(summary(data_report(options)))
    except (ValueError, OSError) as error:
        print(f"mmkernels data-report: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mmkernels data-report: stopped; nothing was written", file=sys.stderr)
        return INTERRUPTED
    return 0
