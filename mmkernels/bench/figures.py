"""What is derived from times: ratios to the baseline, rates, and how near the machine's ceilings they come."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmkernels.bench.case import Case, Work
from mmkernels.bench.group import Result
from mmkernels.bench.prediction import Rates

__all__ = ["derived", "ratio", "ratio_noise"]


def derived(
    case: Case,
    point: Mapping[str, Any],
    results: Mapping[str, Result],
    ceiling: Mapping[str, float],
    rates: Rates | None = None,
) -> dict[str, dict[str, Any]]:
    """Contender -> the figures of its entry, those that it has."""
    timed = {name: result for name, result in results.items() if result.kind == "timed"}
    baselines = [result for name, result in timed.items() if name in case.baseline]
    base = min(baselines, key=lambda result: statistics.median(result.seconds), default=None)
    work = case.work(point)
    found = {name: _figures(case, point, result, base, work, ceiling) for name, result in timed.items()}
    for name, result in timed.items():
        if rates is not None and result.role == "ours":
            found[name]["predicted_s"] = rates.seconds(work)
    return found


def _figures(
    case: Case,
    point: Mapping[str, Any],
    result: Result,
    base: Result | None,
    work: Work,
    ceiling: Mapping[str, float],
) -> dict[str, Any]:
    median = statistics.median(result.seconds)
    found: dict[str, Any] = {
        "flops": work.flops,
        "bytes": work.bytes,
        "items": work.items,
        "tflops": work.flops and work.flops / median / 1e12,
        "gbytes_per_s": work.bytes and work.bytes / median / 1e9,
        "mitems_per_s": work.items and work.items / median / 1e6,
        "peak_bytes": result.peak_bytes,
        "error_ratio": result.error_ratio,
        "curve": case.curve,
        "predicted_s": result.predicted,
        "figures": result.figures or None,
        "note": result.note or None,
    }
    if base is not None:
        found["baseline"] = base.contender
    # The least time at the ceilings: a call that both computes and moves is bound by the slower of the two.
    limits = {f"flops:{point.get('dtype')}": work.flops, "bytes": work.bytes}
    times = {name: amount / ceiling[name] for name, amount in limits.items() if amount and name in ceiling}
    if times:
        found["bound"] = max(times, key=lambda name: times[name])
        found["of_ceiling"] = times[found["bound"]] / median
    if base is not None:
        found["speedup"] = ratio(base.seconds, result.seconds)
        found["speedup_noise"] = 0.0 if base is result else ratio_noise(base.seconds, result.seconds)
        if base.peak_bytes and result.peak_bytes is not None:
            found["memory_ratio"] = result.peak_bytes / base.peak_bytes
    return {name: value for name, value in found.items() if value is not None}


# Rounds -> how many times wider than the normal distribution Student's is, at 99.7%.
_STUDENT = {3: 6.4, 4: 3.1, 5: 2.2, 6: 1.8}


def ratio(base: Sequence[float], mine: Sequence[float]) -> float:
    """How many times faster: the median over rounds, which were taken in turn; of fewer than three, that of medians."""
    if min(len(base), len(mine)) < 3:
        return statistics.median(base) / statistics.median(mine)
    return statistics.median(a / b for a, b in zip(base, mine, strict=False))


def ratio_noise(base: Sequence[float], mine: Sequence[float]) -> float | None:
    """The relative standard error of `ratio`, from how it differs between rounds; None of fewer than three.

    Of few rounds it is larger, so that three of it cover as much as of a known standard error (Student's t).
    """
    logs = [math.log(a / b) for a, b in zip(base, mine, strict=False)]
    if len(logs) < 3:
        return None
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(x - middle) for x in logs)  # of a normal distribution
    if len(logs) < 5:  # the median distance of three is the smaller of two
        spread = statistics.stdev(logs)
    return _STUDENT.get(len(logs), 1.0) * 1.2533 * spread / math.sqrt(len(logs))  # of a median
