"""The cost model: rates of short calls, and what they predict."""

from __future__ import annotations

import pytest

from mmkernels.bench.case import Work
from mmkernels.bench.prediction import Rates, rates_of


def test_two_calls_give_both_rates() -> None:
    truth = Rates(flops=1e11, bytes=1e10)
    works = [Work(flops=1e9, bytes=1e8), Work(flops=1e10, bytes=3e8)]
    found = rates_of(works, [truth.seconds(work) for work in works])
    assert (found.flops, found.bytes) == (pytest.approx(1e11), pytest.approx(1e10))
    assert found.seconds(Work(flops=1e12, bytes=1e9)) == pytest.approx(10.1)


def test_terms_that_short_calls_do_not_show_are_left_out() -> None:
    works = [Work(flops=1e9, bytes=1e8), Work(flops=4e9, bytes=2e8)]
    assert rates_of(works, [0.01, 0.041]) == Rates(flops=4e9 / 0.041)  # more than in proportion to flop
    assert rates_of(works, [0.02, 0.02]) == Rates(bytes=2e8 / 0.02)  # less than in proportion to bytes
    assert rates_of(works[:1], [0.02]) == Rates(flops=1e9 / 0.02)
    assert rates_of([works[0], works[0]], [0.02, 0.02]) == Rates(bytes=1e8 / 0.02)


def test_other_work_has_one_rate() -> None:
    assert rates_of([Work(bytes=1e9)], [0.1]).seconds(Work(bytes=2e9)) == pytest.approx(0.2)
    assert rates_of([Work(items=1e6)], [0.1]) == Rates(items=1e7)
    with pytest.raises(ValueError, match="works: expected calls with work"):
        rates_of([Work()], [0.1])
    with pytest.raises(ValueError, match="works: expected one or two, got 3"):
        rates_of([Work(flops=1, bytes=1)] * 3, [0.1] * 3)


def test_rates_stand_beside_ceilings() -> None:
    ceilings = {"bytes": 1e10, "flops:float32": 2e11}
    assert Rates(flops=1e11, bytes=1e10).of_ceilings("float32", ceilings) == {"flops:float32": 0.5, "bytes": 1.0}
    assert Rates(flops=1e11).of_ceilings("bfloat16", ceilings) == {}
