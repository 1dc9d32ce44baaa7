"""The package inside the trainers that people have: what changes by one line, in results, time and memory.

    python benches/clients.py                       all rows; a table, and a file in benches/results
    python benches/clients.py clip_loss llama       some rows
    python benches/clients.py --table               the newest file's table, for docs/drop-ins.md

Each row is a loss or a model of another library with its own implementation and with ours, in this process, on the
CPU, in float32: forward and backward of the same input. The difference of the loss (of a model: of its outputs) is
relative to the largest value, that of gradients to the largest gradient. Time is the median of both, alternating;
memory is what the process needs beyond what it had, at its peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from client_rows import ROWS, Row
from torch import Tensor

from mmkernels.runtime import native

RESULTS = Path(__file__).parent / "results"
LITTLE = 16  # MiB, of which a ratio tells nothing


@dataclass
class Measured:
    """Both sides of a row."""

    loss: float
    gradients: float
    seconds: tuple[float, float]  # of theirs, of ours
    mebibytes: tuple[float, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(row.name for row in ROWS)}; default all")
    parser.add_argument("--repeats", type=int, default=7, help="times that each side is measured")
    parser.add_argument("--table", action="store_true", help="print the newest results as a table of Markdown")
    args = parser.parse_args()
    if args.table:
        print("\n".join(table(json.loads(newest().read_text(encoding="utf-8")))))
        return
    unknown = set(args.rows) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"rows: expected some of {', '.join(row.name for row in ROWS)}, got {', '.join(sorted(unknown))}")
    found = []
    for row in ROWS:
        if not args.rows or row.name in args.rows:
            found.append(entry(row, measured(row, args.repeats)))
            print(json.dumps(found[-1]), flush=True)
    result = {**about(), "rows": found}
    print("\n".join(table(result)))
    if not args.rows:
        name = about()["cpu"].lower().replace(" ", "-")
        path = RESULTS / f"clients-{name}-{date.today()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def measured(row: Row, repeats: int) -> Measured:
    """Compare both sides, then time them."""
    theirs, ours = row.make()
    (out, grads), (our_out, our_grads) = theirs(), ours()
    difference = max(relative(a, b) for a, b in zip(our_out, out, strict=True))
    largest = max(float(grad.abs().max()) for grad in grads)
    gradients = max(float((a - b).abs().max()) for a, b in zip(our_grads, grads, strict=True)) / largest
    del out, grads, our_out, our_grads
    peaks = peak(theirs), peak(ours)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats if row.timed else 0):
        for side, into in zip((theirs, ours), times, strict=True):
            begin = time.perf_counter()
            side()
            into.append(time.perf_counter() - begin)
    seconds = tuple(statistics.median(each) if each else 0.0 for each in times)
    return Measured(difference, gradients, seconds, peaks)  # type: ignore[arg-type]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def peak(run: Callable[[], Any]) -> float:
    """Mebibytes that the process needs beyond what it has: the kernel's high-water mark, reset before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would hide what is needed
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    run()
    return (memory("VmHWM") - before) / 1024


def memory(what: str) -> int:
    """KiB, from /proc."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def entry(row: Row, found: Measured) -> dict[str, Any]:
    return {
        "name": row.name,
        "library": row.library,
        "version": importlib.metadata.version(row.library),
        "what": row.what,
        "lines": row.lines,
        "loss_difference": found.loss,
        "gradient_difference": found.gradients,
        "seconds": found.seconds if row.timed else None,
        "mebibytes": found.mebibytes if row.timed else None,
    }


def about() -> dict[str, Any]:
    info = native.core.build_info() if native.core is not None else {}
    lines: Iterator[str] = iter(Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": str(date.today()),
        "cpu": cpu,
        "cpu_isa": info.get("cpu_isa"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def newest() -> Path:
    files = sorted(RESULTS.glob("clients-*.json"), key=lambda path: path.stem[-10:])
    if not files:
        sys.exit("benches/results: expected a file clients-*.json, got none; run benches/clients.py")
    return files[-1]


def table(result: dict[str, Any]) -> list[str]:
    """Markdown."""
    head = (
        f"On {result['cpu']} ({result['cpu_isa']}, {result['threads']} threads), torch {result['torch']}, "
        f"{result['date']}; time and memory: ours / theirs."
    )
    lines = [head, "", "| library | what | lines | loss | gradients | time | memory |", "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        ratios = ["", ""]
        if row["seconds"]:
            ratios = [f"{ours / theirs:.2f}" for theirs, ours in (row["seconds"], row["mebibytes"])]
            if max(row["mebibytes"]) < LITTLE:
                ratios[1] = ""
        lines.append(
            f"| {row['library']} {row['version']} | {row['what']} | {row['lines']} | {row['loss_difference']:.1e} "
            f"| {row['gradient_difference']:.1e} | {ratios[0]} | {ratios[1]} |"
        )
    return lines


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
