"""A run's results as one HTML file that asks nothing of any server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from mmkernels.bench.page.curves import curves_of, rooflines_of
from mmkernels.bench.page.summary import details_of, failures_of, summary_of

__all__ = ["render"]


def render(results: Mapping[str, Any] | str | Path, path: str | Path) -> None:
    """Write the page of results, or of a file that has them, to `path`.

    Raises:
        OSError: a file that cannot be read or written.
        ValueError: a file without JSON.
    """
    if isinstance(results, (str, Path)):
        results = json.loads(Path(results).read_text(encoding="utf-8"))
    assert isinstance(results, Mapping)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = page.get_template("page.html.jinja").render(
        about=results.get("machine_info", {}).get("mmkernels", {}),
        commit=results.get("commit_info") or {},
        size=results.get("mmkernels", {}).get("size", ""),
        failures=failures_of(results),
        families=summary_of(results),
        curves=curves_of(results),
        rooflines=rooflines_of(results),
        details=details_of(results),
    )
    Path(path).write_text(text, encoding="utf-8")
