"""The planner: every plan is within its caps and complete; native and Python agree; best fit keeps its bound."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels.ops.packing import PackingPlan, plan_packing
from mmkernels.ops.packing import plan as plan_module
from mmkernels.runtime import native
from mmkernels.testing.packing import LENGTHS, lengths_like

needs_native = pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))


def check(plan: PackingPlan, lengths, capacity: int, max_samples: int | None = None) -> None:
    """Every item exactly once, no pack over its caps or empty, packs by first item, items in order."""
    assert plan.offsets.dtype == plan.items.dtype == np.int64
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(lengths)
    assert sorted(plan.items.tolist()) == list(range(len(lengths)))
    for pack in plan:
        assert len(pack) > 0
        assert sum(lengths[i] for i in pack) <= capacity
        assert max_samples is None or len(pack) <= max_samples
    assert plan.lower_bound <= plan.num_packs


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_absent", lambda: "taken away by a test")


def optimum(lengths: list[int], capacity: int) -> int:
    """Fewest packs by exhaustive search: each item goes into one of the packs so far or a new one."""
    best = len(lengths)

    def place(i: int, packs: list[int]) -> None:
        nonlocal best
        if len(packs) >= best:
            return
        if i == len(lengths):
            best = len(packs)
            return
        for p, used in enumerate(packs):
            if used + lengths[i] <= capacity:
                place(i + 1, [*packs[:p], used + lengths[i], *packs[p + 1 :]])
        place(i + 1, [*packs, lengths[i]])

    if lengths:
        place(0, [])
    return best


@st.composite
def problems(draw, most_items: int = 60):
    capacity = draw(st.one_of(st.integers(1, 40), st.integers(1, 5000), st.just(2**40)))
    lengths = draw(st.lists(st.integers(0, capacity), max_size=most_items))
    return lengths, capacity


STRATEGIES = ["auto", "best_fit", "subset_sum", "next_fit"]


def options_of(strategy: str, capacity: int, max_samples: int | None, lookahead: int) -> dict:
    """Those of the options that a strategy takes."""
    options = {"strategy": strategy}
    if strategy != "subset_sum":
        options["max_samples"] = max_samples
    if strategy == "subset_sum" or (strategy == "auto" and max_samples is None and capacity <= 2**24):
        options["lookahead"] = lookahead
    return options


@settings(max_examples=300, deadline=None)
@given(
    problems(),
    st.sampled_from(STRATEGIES),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from([1, 2, 7, 128]),
    st.integers(0, 2),
)
def test_every_plan_is_complete_and_within_caps(problem, strategy, max_samples, lookahead, seed):
    lengths, capacity = problem
    if strategy == "subset_sum" and capacity > 2**24:
        return
    options = options_of(strategy, capacity, max_samples, lookahead)
    plan = plan_packing(lengths, capacity, seed=seed, **options)
    check(plan, lengths, capacity, options.get("max_samples"))
    again = plan_packing(lengths, capacity, seed=seed, **options)
    assert np.array_equal(plan.offsets, again.offsets)
    assert np.array_equal(plan.items, again.items)
    assert plan.pack_lengths.tolist() == [sum(lengths[i] for i in pack) for pack in plan]
    if seed == 0:
        assert all(np.all(np.diff(pack) > 0) for pack in plan)
        assert np.all(np.diff([pack[0] for pack in plan]) > 0)


@needs_native
@settings(max_examples=400, deadline=None)
@given(problems(), st.sampled_from(["best_fit", "subset_sum", "next_fit"]), st.sampled_from([1, 2, 7, 2**62]))
def test_python_gives_the_native_plan(problem, strategy, option):
    lengths, capacity = np.asarray(problem[0], np.int64), problem[1]
    if strategy == "subset_sum" and capacity > 2**24:
        return
    planners = native.core(), plan_module.plan_python
    here, there = (getattr(planner, f"plan_{strategy}")(lengths, capacity, option) for planner in planners)
    for ours, theirs in zip(here, there, strict=True):
        assert ours.dtype == theirs.dtype == np.int64
        assert ours.tolist() == theirs.tolist()


@needs_native
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_python_gives_the_native_plan_on_data(name, strategy, monkeypatch):
    lengths, capacity = lengths_like(name, 1500)
    here = plan_packing(lengths, capacity, strategy=strategy)
    in_python(monkeypatch)
    there = plan_packing(lengths, capacity, strategy=strategy)
    assert here.strategy == there.strategy
    assert np.array_equal(here.offsets, there.offsets)
    assert np.array_equal(here.items, there.items)


@pytest.mark.parametrize("name", LENGTHS)
def test_efficiency_on_data(name):
    """Subset sum wastes at most 0.1% where the mean is at most a quarter of the capacity; auto is as good as any."""
    lengths, capacity = lengths_like(name, 20_000)
    plans = {strategy: plan_packing(lengths, capacity, strategy=strategy) for strategy in STRATEGIES}
    if lengths.mean() <= capacity / 4:
        assert plans["subset_sum"].efficiency > 0.999
    assert plans["auto"].num_packs == min(plan.num_packs for plan in plans.values())
    assert plans["subset_sum"].displacement < 0.1 * plans["best_fit"].displacement
    assert plans["next_fit"].displacement == 0


@settings(max_examples=100, deadline=None)
@given(
    st.integers(2, 60).flatmap(lambda c: st.tuples(st.lists(st.integers(0, c), min_size=1, max_size=12), st.just(c)))
)
def test_subset_sum_fills_the_oldest_pack_best(problem):
    """The first pack holds the first item and is as full as any subset of the others makes it."""
    lengths, capacity = problem
    plan = plan_packing(lengths, capacity, strategy="subset_sum")
    others = [length for length in lengths[1:] if length]
    sums = {lengths[0] + sum(some) for size in range(len(others) + 1) for some in itertools.combinations(others, size)}
    assert plan[0][0] == 0
    assert plan.pack_lengths[0] == max(total for total in sums if total <= capacity)


@settings(max_examples=100, deadline=None)
@given(problems(most_items=9))
def test_next_fit_is_the_best_that_keeps_the_order(problem):
    lengths, capacity = problem
    plan = plan_packing(lengths, capacity, keep_order=True)
    assert plan.strategy == "next_fit"
    assert plan.items.tolist() == list(range(len(lengths)))
    fewest = [0]  # by the number of items before
    for end in range(1, len(lengths) + 1):
        starts = [s for s in range(end) if sum(lengths[s:end]) <= capacity]
        fewest.append(1 + min(fewest[s] for s in starts))
    assert plan.num_packs == fewest[-1]


def test_lookahead_trades_order_for_efficiency():
    lengths, capacity = lengths_like("caption@4096", 20_000)
    plans = [plan_packing(lengths, capacity, strategy="subset_sum", lookahead=ahead) for ahead in (1, 16, 128)]
    for small, large in itertools.pairwise(plans):
        assert small.efficiency < large.efficiency
    assert plan_packing([5, 1, 3], 8, strategy="subset_sum", lookahead=1).num_packs == 3
    assert max(abs(plans[1].items - np.arange(20_000))) < 200


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 30).flatmap(lambda c: st.tuples(st.lists(st.integers(1, c), max_size=8), st.just(c))))
def test_best_fit_against_the_optimum(problem):
    lengths, capacity = problem
    best, plan = optimum(lengths, capacity), plan_packing(lengths, capacity, strategy="best_fit")
    assert plan.lower_bound <= best <= plan.num_packs
    assert plan.num_packs <= 11 / 9 * best + 6 / 9


def test_a_plan_by_hand():
    # 8 | 7 + 1 | 5 + 3 | 4 + 4, the earlier of equals first; packs by first item.
    plan = plan_packing([4, 8, 1, 5, 4, 7, 3], 8, strategy="best_fit")
    assert [pack.tolist() for pack in plan] == [[0, 4], [1], [2, 5], [3, 6]]
    assert plan.num_packs == len(plan) == plan.lower_bound == 4
    assert plan.efficiency == 1.0
    assert plan.displacement == np.abs(np.array([0, 4, 1, 2, 5, 3, 6]) - np.arange(7)).mean()
    assert plan[-1].tolist() == [3, 6]
    assert plan.strategy == "best_fit"
    with pytest.raises(IndexError, match="pack: expected at most 4 packs, got index 4"):
        plan[4]


def test_lower_bound_counts_what_cannot_share():
    assert plan_packing([5, 5, 5], 9).lower_bound == 3
    assert plan_packing([5, 5, 5], 10).lower_bound == 2
    assert plan_packing([5, 5, 5, 5], 9).num_packs == 4


def test_nothing_and_zero_length_items():
    plan = plan_packing([], 8)
    assert (plan.num_packs, plan.efficiency, plan.lower_bound, plan.displacement) == (0, 1.0, 0, 0.0)
    assert list(plan) == []
    plan = plan_packing([0, 0, 0], 8)
    assert [pack.tolist() for pack in plan] == [[0, 1, 2]]
    assert plan.lower_bound == 1
    assert [pack.tolist() for pack in plan_packing([8, 0, 8], 8)] in ([[0, 1], [2]], [[0], [1, 2]])


@pytest.mark.parametrize("strategy", ["best_fit", "subset_sum", "next_fit"])
def test_seed_regroups_and_repeats(strategy):
    lengths, capacity = lengths_like("navit@4096", 2000)  # few lengths, many equal items
    plans = [plan_packing(lengths, capacity, strategy=strategy, seed=seed) for seed in (0, 1, 2, 1)]
    for plan in plans:
        check(plan, lengths, capacity)
    groups = [{tuple(sorted(pack.tolist())) for pack in plan} for plan in plans]
    assert groups[1] == groups[3]
    for a, b in itertools.combinations(groups[:3], 2):
        assert len(a & b) < 0.1 * len(a)


def test_shuffle_is_the_same_on_every_machine():
    assert plan_module._shuffled(8, 1).tolist() == [3, 4, 7, 5, 2, 0, 1, 6]
    assert sorted(plan_module._shuffled(1000, 7).tolist()) == list(range(1000))


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.tensor, lambda x: np.asarray(x, np.uint16)])
def test_lengths_of_any_integer_kind(kind):
    assert [pack.tolist() for pack in plan_packing(kind([3, 5, 2]), 8)] == [[0, 1], [2]]


def test_a_plan_is_frozen():
    lengths = np.array([3, 5, 2])
    plan = plan_packing(lengths, 8)
    lengths[0] = 7
    assert plan.pack_lengths.tolist() == [8, 2]
    with pytest.raises(ValueError, match="read-only"):
        plan.items[0] = 1
    with pytest.raises(AttributeError):
        plan.capacity = 9


# Users' pain


@pytest.mark.parametrize("capacity", [1000, 1023, 1025, 3001])
def test_capacity_that_is_no_power_of_two(capacity):
    """TRL #3887: such a capacity packed nothing."""
    lengths = np.random.default_rng(0).integers(1, 301, 2000)
    plan = plan_packing(lengths, capacity)
    check(plan, lengths, capacity)
    assert plan.efficiency > 0.99


def test_no_token_is_dropped_or_cut():
    """TRL #4554, #5904: tokens past the capacity vanished."""
    lengths, capacity = lengths_like("llavaov@16384", 2000)
    plan = plan_packing(lengths, capacity)
    assert plan.pack_lengths.sum() == lengths.sum()
    with pytest.raises(ValueError, match=r"capacity=16384\], got 16385 at index 2000"):
        plan_packing([*lengths, capacity + 1], capacity)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 9, 2, 10], 8), ValueError, r"lengths: expected each in \[0, capacity=8\], got 9 at index 1 and 1 more"),
        (([1, -1], 8), ValueError, r"lengths: .* got -1 at index 1$"),
        (([1.0, 2.0], 8), TypeError, r"lengths: expected \[n\] integers, got '\[2\] float64'"),
        (([[1, 2]], 8), ValueError, r"lengths: expected \[n\] integers, got '\[1, 2\] int64'"),
        (([1], 0), ValueError, r"capacity: expected an integer >= 1, got 0 \(int\)"),
        (([1], 2**25, "subset_sum"), ValueError, "capacity: expected at most 16777216 with strategy='subset_sum'"),
        (([1], 8.0), TypeError, r"capacity: expected an integer >= 1, got 8.0 \(float\)"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        plan_packing(*arguments[:2], **({"strategy": arguments[2]} if arguments[2:] else {}))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"strategy": "worst_fit"},
            ValueError,
            "strategy: expected one of auto, best_fit, subset_sum, histogram, next_fit",
        ),
        ({"max_samples": 0}, ValueError, "max_samples: expected an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer >= 0, got 0.5"),
        ({"strategy": "histogram"}, NotImplementedError, "strategy: not supported yet"),
        ({"strategy": "subset_sum", "max_samples": 2}, NotImplementedError, "max_samples with strategy='subset_sum'"),
        ({"images": [1]}, NotImplementedError, "images: not supported yet"),
        ({"max_images": 1}, NotImplementedError, "max_images: not supported yet"),
        (
            {"keep_order": True, "strategy": "best_fit"},
            ValueError,
            "keep_order: expected strategy='next_fit' or 'auto'",
        ),
        ({"keep_order": True, "seed": 1}, ValueError, "keep_order: .* and seed=0"),
        (
            {"lookahead": 64, "strategy": "best_fit"},
            ValueError,
            "lookahead: expected its default, for best_fit look",
        ),
        ({"lookahead": 64, "keep_order": True}, ValueError, "lookahead: expected its default, for next_fit look"),
        ({"lookahead": 64, "max_samples": 4}, ValueError, "lookahead: expected its default, for best_fit and next_fit"),
        ({"lookahead": 0}, ValueError, "lookahead: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        plan_packing([1], 8, **options)
