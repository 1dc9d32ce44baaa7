"""The benches: `pytest` collects these functions, and `plugin.py` makes a test of each contender of each point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmkernels.bench.plugin import Entry, Suite, hand_over, recorded_time

__all__ = ["benches_of"]


def benches_of(module: str) -> Callable[..., None]:
    """The bench of a module that has `cases(settings)`."""

    @pytest.mark.benchmark(timer=recorded_time)
    def bench(entry: Entry, suite: Suite, benchmark: Any) -> None:
        result, figures = suite.result(entry, timed=benchmark.enabled)
        if result.kind in ("wrong", "fails") and entry.contender.startswith("mmkernels"):
            pytest.fail(f"{result.kind}: {result.why}", pytrace=False)
        if result.kind not in ("timed", "checked"):
            pytest.skip(f"{result.kind}: {result.why}")
        if result.kind == "timed":
            hand_over(benchmark, entry, result, figures)

    bench.cases_module = module  # what plugin.py makes tests of
    return bench


bench_attention = benches_of("mmkernels.bench.cases.attention")
bench_contrastive = benches_of("mmkernels.bench.cases.contrastive")
bench_packing = benches_of("mmkernels.bench.cases.packing")
bench_planner = benches_of("mmkernels.bench.cases.planner")
bench_scaling = benches_of("mmkernels.bench.cases.scaling")
bench_ranks = benches_of("mmkernels.bench.cases.ranks")
bench_pretrain = benches_of("mmkernels.bench.cases.pretrain")
