"""The command: a table of the study's figures, and the picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import tyro
from tabulate import tabulate

from mmkernels.plan_cli.files import FileError
from mmkernels.plan_cli.study import Options, Report, study

__all__ = ["main", "render"]


def render(report: Report) -> str:
    """The report as text."""
    lines = [
        f"{report.items:,} items, {report.tokens:,} tokens, mean {report.tokens / max(report.items, 1):,.1f}; "
        f"packs of {report.capacity:,}",
        f"no plan has fewer than {report.lower_bound:,} packs",
    ]
    if report.dropped:
        lines.append(f"{report.dropped:,} items DROPPED: longer than a pack, or with too many images")
    if report.oversize_packs:
        lines.append(f"{report.oversize_packs:,} items exceed the caps and are packs of their own")
    rows = [
        (
            f"{each.strategy}{' *' if each.strategy == report.best else ''}",
            f"{each.packs:,}",
            f"{each.above_bound:,}",
            f"{each.efficiency:.3%}",
            f"{each.displacement:,.1f}",
            f"{each.seconds * 1e3:,.1f}",
        )
        for each in report.strategies
    ]
    rows.append(("padding 32 to the longest", "", "", f"{report.padding_efficiency:.3%}", "", ""))
    headers = ("strategy", "packs", "above bound", "efficiency", "items moved by", "ms")
    lines += ["", tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5))]
    lines += [
        "* strategy='auto' picks this one",
        "",
        f"{report.ranks} ranks, {report.steps:,} steps each: slowest rank {report.imbalance:.3f} of the mean, "
        f"{report.imbalance_in_turn:.3f} with packs dealt round-robin",
    ]
    if report.dummies:
        lines.append(f"{report.dummies} dummies in the last step")
    if report.without_image:
        lines.append(f"{report.without_image:,} times a rank has no image in a step")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mmkernels plan`; returns the exit status."""
    options = tyro.cli(Options, prog="mmkernels plan", args=None if argv is None else list(argv))
    try:
        report, plan, schedule, cost = study(options)
    except FileError as error:
        print(f"mmkernels plan: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        hint = "; --oversize drop or own_pack takes such items" if "expected each in" in str(error) else ""
        print(f"mmkernels plan: {error}{hint}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), indent=1) if options.json else render(report))
    if options.picture is not None and plan.num_packs:
        from mmkernels.plan_cli.picture import draw

        try:
            draw(report, plan, schedule, cost, options.picture)
        except (OSError, ValueError) as error:
            print(f"mmkernels plan: --picture: {error}", file=sys.stderr)
            return 1
        print(f"picture: {options.picture}", file=sys.stderr if options.json else sys.stdout)
    return 0
