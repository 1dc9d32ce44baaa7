"""A bench's output: a table, and a JSON file with the machine, the versions and the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith(("model name", "CPU implementer")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, with a plus sign if the tree has changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, encoding="utf-8")
    if head.returncode != 0:
        return None
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, encoding="utf-8"
    )
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine(device: torch.device) -> dict[str, Any]:
    """Device, versions, commit and date of a measurement."""
    from mmkernels.runtime import native

    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "triton", "numpy")}
        | {"python": platform.python_version()},
        "native": native.why_absent() or native.core.build_info(),
    }
    if device.type == "cuda":
        about["cuda"] = {"runtime": torch.version.cuda, "capability": torch.cuda.get_device_capability(device)}
    return about


def _cells(row: Any) -> dict[str, str]:
    def show(value: float | None, text: str) -> str:
        return "" if value is None else text.format(value)

    timing = row.timing
    return {
        "contender": row.contender,
        "ms": "" if timing is None else f"{timing.median * 1e3:.3g}",
        "quartiles": "" if timing is None else f"{timing.low * 1e3:.3g}..{timing.high * 1e3:.3g} ({timing.repeats})",
        "speed-up": show(row.ratio, "{:.2f}x"),
        "TFLOP/s": show(row.tflops, "{:.3g}"),
        "GB/s": show(row.gbytes, "{:.3g}"),
        "M items/s": show(row.mitems, "{:.3g}"),
        "of ceiling": show(row.of_ceiling, "{:.0%}"),
        "peak MB": "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.4g}",
        "of baseline": show(row.memory_ratio, "{:.1%}"),
        "error ratio": show(row.error_ratio, "{:.2f}"),
        **{name: f"{value:.5g}" for name, value in row.figures.items()},
        "note": row.note,
    }


def print_table(rows: Sequence[Any]) -> None:
    """Print one point of the grid, without empty columns."""
    cells = [_cells(row) for row in rows]
    names = dict.fromkeys(name for cell in cells for name in cell if cell[name])
    shown = [name for name in names if name != "note"] + (["note"] if "note" in names else [])
    table = [[cell.get(name, "") for name in shown] for cell in cells]
    print(f"\n{rows[0].title}")
    print(tabulate(table, headers=shown, disable_numparse=True), flush=True)


def save(about: dict[str, Any], rows: Sequence[Any]) -> str:
    """Add rows to benches/results/<bench>-<device>-<date>.json; return its name.

    The file holds the day's runs, and rows that refer to their run by its index in `runs`. A row replaces an older one
    of the same case, parameters and contender; a run without rows is removed.
    """
    device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")[:40]
    suffix = "-quick" if about["quick"] else ""
    path = RESULTS / f"{about['bench']}-{device}-{about['date'][:10]}{suffix}.json"
    path.parent.mkdir(exist_ok=True)
    runs, kept = _earlier(path)
    new = [asdict(row) | {"run": len(runs)} for row in rows]
    replaced = {_what(row) for row in new}
    joined = _renumbered([*runs, about], [row for row in kept if _what(row) not in replaced] + new)
    scratch = path.with_suffix(".tmp")  # a run killed here leaves the earlier rows intact
    scratch.write_text(json.dumps(joined, indent=1) + "\n", encoding="utf-8")
    scratch.replace(path)
    return f"benches/results/{path.name}"


def _earlier(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The runs and rows of a file, also of the older format with a single run."""
    if not path.exists():
        return [], []
    found = json.loads(path.read_text(encoding="utf-8"))
    if "runs" in found:
        return found["runs"], found["rows"]
    rows = found.pop("rows")
    return [found], [row | {"run": 0} for row in rows]


def _what(row: dict[str, Any]) -> str:
    return json.dumps([row["case"], row["params"], row["contender"]], sort_keys=True)


def _renumbered(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    used = sorted({row["run"] for row in rows})
    place = {run: i for i, run in enumerate(used)}
    return {"runs": [runs[run] for run in used], "rows": [row | {"run": place[row["run"]]} for row in rows]}
