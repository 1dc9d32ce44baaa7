"""Plans for realistic length distributions: pack fill, the caps, the order; problems reported against other packers."""

import functools
import itertools

import named
import numpy as np
import pytest
from planning.problems import STRATEGIES, check, in_python, needs_native

from mmkernels import plan_packing
from mmkernels.testing.lengths import LENGTHS, lengths_like, samples_like


@needs_native
@pytest.mark.parametrize("name", LENGTHS)
def test_python_gives_the_native_plan_on_data(name, monkeypatch):
    lengths, capacity = lengths_like(name, 1500)
    here = [plan_packing(lengths, capacity, strategy=strategy) for strategy in STRATEGIES]
    in_python(monkeypatch)
    there = [plan_packing(lengths, capacity, strategy=strategy) for strategy in STRATEGIES]
    for a, b in zip(here, there, strict=True):
        assert a.strategy == b.strategy
        assert np.array_equal(a.offsets, b.offsets), a.strategy
        assert np.array_equal(a.items, b.items), a.strategy


@pytest.mark.parametrize("name", LENGTHS)
def test_efficiency_on_data(name):
    """Subset sum wastes at most 0.1% if the mean is at most a quarter of the capacity; auto is as good as any
    strategy."""
    lengths, capacity = lengths_like(name, 20_000)
    plans = {strategy: plan_packing(lengths, capacity, strategy=strategy) for strategy in STRATEGIES}
    if lengths.mean() <= capacity / 4:
        assert plans["subset_sum"].efficiency > 0.999
    assert plans["auto"].num_packs == min(plan.num_packs for plan in plans.values())
    assert plans["histogram"].num_packs == plans["best_fit"].num_packs
    assert plans["subset_sum"].displacement < 0.1 * plans["best_fit"].displacement
    assert plans["next_fit"].displacement == 0


@pytest.mark.parametrize("name", ["obelics@8192", "qwen2vl@16384", "llavaov@32768"])
def test_image_caps_on_data(name):
    """A cap 10% above what the packs need on average: subset sum still fills them, best fit cannot."""
    lengths, _, images, capacity = samples_like(name, 3000)
    most = max(int(images.max()), int(1.1 * images.sum() * capacity / lengths.sum()))
    plans = {s: plan_packing(lengths, capacity, strategy=s, images=images, max_images=most) for s in STRATEGIES}
    for strategy, plan in plans.items():
        with named.case(strategy):
            check(plan)
    assert plans["subset_sum"].num_packs <= 1.02 * plans["subset_sum"].lower_bound
    assert plans["auto"].num_packs == plans["subset_sum"].num_packs < plans["best_fit"].num_packs


def test_lookahead_trades_order_for_efficiency():
    lengths, capacity = lengths_like("caption@4096", 20_000)
    plans = [plan_packing(lengths, capacity, strategy="subset_sum", lookahead=ahead) for ahead in (1, 16, 128)]
    for small, large in itertools.pairwise(plans):
        assert small.efficiency < large.efficiency
    assert plan_packing([5, 1, 3], 8, strategy="subset_sum", lookahead=1).num_packs == 3
    assert max(abs(plans[1].items - np.arange(20_000))) < 200


@pytest.mark.parametrize("strategy", ["best_fit", "subset_sum", "histogram", "next_fit"])
def test_seed_regroups_and_repeats(strategy):
    lengths, capacity = lengths_like("navit@4096", 2000)  # few lengths, many equal items
    plans = [plan_packing(lengths, capacity, strategy=strategy, seed=seed) for seed in (0, 1, 2, 1)]
    for plan in plans:
        check(plan)
    groups = [{tuple(sorted(pack.tolist())) for pack in plan} for plan in plans]
    assert groups[1] == groups[3]
    for a, b in itertools.combinations(groups[:3], 2):
        assert len(a & b) < 0.1 * len(a)


# Problems that users of other packers reported


def test_non_power_of_two_capacity_packs_nothing():
    """TRL #3887: with a capacity that is not a power of two nothing was packed."""
    lengths = np.random.default_rng(0).integers(1, 301, 2000)
    for capacity in (1000, 1023, 1025, 3001):
        plan = plan_packing(lengths, capacity)
        with named.case(capacity):
            check(plan)
            assert plan.efficiency > 0.99


def test_tokens_dropped():
    """TRL #4554: tokens past the capacity vanished."""
    lengths, capacity = lengths_like("llavaov@16384", 2000)
    for strategy in STRATEGIES:
        with named.case(strategy):
            plan = plan_packing(lengths, capacity, strategy=strategy)
            assert plan.pack_lengths.sum() == lengths.sum()
            too_long = functools.partial(plan_packing, [*lengths, capacity + 1], capacity, strategy=strategy)
            named.mistakes((too_long, ValueError, r"capacity=16384\], got 16385 at index 2000"))


def test_truncated_or_split_images():
    """TRL #5904, verl #3469: an item's images were cut off, or its halves went into two packs."""
    samples = samples_like("llavaov@16384", 1000)
    for strategy in STRATEGIES:
        plan = plan_packing(samples.lengths, samples.capacity, images=samples.images, max_images=40, strategy=strategy)
        whole = np.full(1000, -1)
        with named.case(strategy):
            for number, pack in enumerate(plan):
                assert (whole[pack] == -1).all()
                whole[pack] = number
            assert np.array_equal(np.bincount(whole, samples.images).astype(np.int64), plan.pack_images)
            assert np.array_equal(np.bincount(whole, samples.lengths).astype(np.int64), plan.pack_lengths)
