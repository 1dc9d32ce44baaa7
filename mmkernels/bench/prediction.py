"""The cost model of one op on one device: seconds are flop over a rate plus bytes over a rate.

The rates are those that the op attains in two short calls of other sizes, so that a prediction tells whether its time
grows as its work does. They need not be the machine's ceilings, which `Rates.of_ceilings` sets them beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mmkernels.bench.case import Case, Settings, Work
from mmkernels.bench.measure import in_turn

__all__ = ["Rates", "fitted", "rates_of"]


@dataclass(frozen=True)
class Rates:
    """What an op attains; None for a term that its time does not need.

    Args:
        flops: per second.
        bytes: per second.
        items: per second.
    """

    flops: float | None = None
    bytes: float | None = None
    items: float | None = None

    def seconds(self, work: Work) -> float:
        """Predicted, of a call with this work."""
        amounts = ((work.flops, self.flops), (work.bytes, self.bytes), (work.items, self.items))
        return sum(amount / rate for amount, rate in amounts if amount and rate)

    def of_ceilings(self, dtype: str | None, ceilings: Mapping[str, float]) -> dict[str, float]:
        """The share of each of the machine's rates."""
        rates = {f"flops:{dtype}": self.flops, "bytes": self.bytes}
        return {name: rate / ceilings[name] for name, rate in rates.items() if rate and name in ceilings}


def rates_of(works: Sequence[Work], seconds: Sequence[float]) -> Rates:
    """Rates from one call, or of calls with both flop and bytes from two, the shorter first.

    Raises:
        ValueError: another number of calls, or calls without work.
    """
    last, took = works[-1], seconds[-1]
    if last.flops is None:
        if last.bytes is None and last.items is None:
            raise ValueError(f"works: expected calls with work, got {last}")
        return Rates(bytes=last.bytes and last.bytes / took, items=last.items and last.items / took)
    if last.bytes is None or len(works) == 1:
        return Rates(flops=last.flops / took)
    if len(works) != 2:
        raise ValueError(f"works: expected one or two, got {len(works)}")
    first = works[0]
    assert first.flops is not None and first.bytes is not None
    # seconds = flops * a + bytes * b, twice
    determinant = first.flops * last.bytes - last.flops * first.bytes
    a = (seconds[0] * last.bytes - took * first.bytes) / determinant if determinant else 0.0
    b = (first.flops * took - last.flops * seconds[0]) / determinant if determinant else 0.0
    if a <= 0:  # too little flop to tell
        return Rates(bytes=last.bytes / took)
    return Rates(flops=1 / a, bytes=1 / b) if b > 0 else Rates(flops=last.flops / took)


def fitted(case: Case, settings: Settings) -> Rates:
    """Measure a case's `calibrate` points with the backend that is chosen by default."""
    device = torch.device(settings.device)
    runs = {}
    for i, point in enumerate(case.calibrate):
        runs[str(i)] = partial(case.ours, case.setup(point, device), None)
    taken = in_turn(runs, device, seconds=max(settings.seconds, 0.3), least=settings.least)
    return rates_of(
        [case.work(point) for point in case.calibrate], [statistics.median(each) for each in taken.values()]
    )
