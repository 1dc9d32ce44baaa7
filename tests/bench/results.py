"""Results of the suite as tests make them up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MACHINE = {
    "device": "A CPU",
    "isa": "avx2",
    "threads": 2,
    "date": "2026-01-02T03:04:05+00:00",
    "load": 0.1,
    "versions": {
        "mmkernels": "0.1.0",
        "torch": "2.13.0",
        "triton": None,
        "numpy": "2.0",
        "python": "3.11",
        "cuda": None,
    },
    "native": {"cpu_isa": "avx2"},
    "ceilings": {"bytes": 1e10, "flops:float32": 1e11, "flops:bfloat16": 5e10},
}


def entry(
    case: str, point: Mapping[str, Any], contender: str, role: str, seconds: Sequence[float], **more: Any
) -> dict[str, Any]:
    """One of `benchmarks`."""
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    title = " ".join([case, *(f"{name}={value}" for name, value in point.items())])
    family = more.pop("family", "contrastive")
    about = {"family": family, "case": case, "point": dict(point), "contender": contender, "role": role}
    return {
        "group": f"{family}: {title}",
        "name": f"bench_{family}[{title} | {contender}]",
        "stats": {"median": median, "q1": low, "q3": high, "rounds": len(seconds), "data": list(seconds)},
        "extra_info": {**about, **more},
    }


def results(benchmarks: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """A whole file; `more` goes into its own part."""
    return {
        "machine_info": {"mmkernels": MACHINE},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": list(benchmarks),
        "mmkernels": {"size": "quick", "not_timed": [], "predictions": [], **more},
    }
