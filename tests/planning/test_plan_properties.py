"""Properties of every plan: complete, within its caps, within the bounds that its strategy promises; native and Python
agree."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.problems import NO_CAP, STRATEGIES, check, needs_native, optimum, options_of, problems

from mmkernels import plan_packing
from mmkernels.planning import plan_python
from mmkernels.runtime import native


@settings(max_examples=300, deadline=None)
@given(problems(), st.sampled_from(STRATEGIES), st.sampled_from([1, 2, 7, 128]), st.integers(0, 2))
def test_every_plan_is_complete_and_within_caps(problem, strategy, lookahead, seed):
    if strategy == "subset_sum" and problem[2] > 2**24:
        return
    options = options_of(problem, strategy, lookahead)
    plan = plan_packing(problem[0], problem[2], seed=seed, **options)
    check(plan)
    again = plan_packing(problem[0], problem[2], seed=seed, **options)
    assert np.array_equal(plan.offsets, again.offsets)
    assert np.array_equal(plan.items, again.items)
    if seed == 0:
        assert all(np.all(np.diff(pack) > 0) for pack in plan)
        assert np.all(np.diff([pack[0] for pack in plan]) > 0)


@settings(max_examples=150, deadline=None)
@given(problems(most_items=8, capacities=st.integers(2, 30)))
def test_against_the_optimum(problem):
    """The bound is never above the optimum, no strategy below it, auto is the best strategy, best fit within its
    bound."""
    best = optimum(problem)
    packs = {s: plan_packing(problem[0], problem[2], **options_of(problem, s)) for s in STRATEGIES}
    for plan in packs.values():
        assert plan.lower_bound <= best <= plan.num_packs
    assert packs["auto"].num_packs == min(plan.num_packs for plan in packs.values())
    if problem[3] is None and problem[4] is None:
        assert packs["best_fit"].num_packs <= 11 / 9 * best + 6 / 9


@needs_native
@settings(max_examples=400, deadline=None)
@given(problems(), st.sampled_from(["best_fit", "subset_sum", "histogram", "next_fit"]), st.sampled_from([1, 2, 7, 60]))
def test_python_gives_the_native_plan(problem, strategy, lookahead):
    lengths, images, capacity, max_images, max_samples = problem
    if strategy == "subset_sum" and capacity > 2**24:
        return
    items = np.asarray(lengths, np.int64), None if images is None else np.asarray(images, np.int64)
    arguments = [*items, capacity, max_images or NO_CAP, max_samples or NO_CAP]
    window = [lookahead] if strategy == "subset_sum" else []
    planners = native.core, plan_python
    here, there = (getattr(planner, f"plan_{strategy}")(*arguments, *window) for planner in planners)
    assert here[0].dtype == there[0].dtype == np.int64
    assert here[0].tolist() == there[0].tolist()
    assert np.array_equal(here[1], there[1])
    if strategy == "histogram":
        lists = [planner.list_histogram(*items, *here) for planner in planners]
        assert [part.tolist() for part in lists[0]] == [part.tolist() for part in lists[1]]
    if strategy == "subset_sum":
        picked = [planner.fullest_pack(*arguments).tolist() for planner in planners]
        assert picked[0] == picked[1]


@settings(max_examples=200, deadline=None)
@given(problems(most_items=10, capacities=st.integers(2, 60)))
def test_subset_sum_fills_the_oldest_pack_best(problem):
    """The first pack holds the first item and, unless both caps bind, is as full as any subset of the others allows."""
    lengths, images, capacity, max_images, max_samples = problem
    if not lengths:
        return
    plan = plan_packing(lengths, capacity, **options_of(problem, "subset_sum"))
    assert plan[0][0] == 0
    images = images or [0] * len(lengths)
    fullest = 0
    for size in range(min(len(lengths), max_samples or NO_CAP)):
        for some in itertools.combinations(range(1, len(lengths)), size):
            pack = [0, *some]
            tokens = sum(lengths[i] for i in pack)
            if tokens <= capacity and sum(images[i] for i in pack) <= (max_images or NO_CAP):
                fullest = max(fullest, tokens)
    if max_images is None or max_samples is None or max_samples >= len(lengths):
        assert plan.pack_lengths[0] == fullest
    else:
        assert plan.pack_lengths[0] <= fullest


@settings(max_examples=100, deadline=None)
@given(problems(most_items=9))
def test_next_fit_is_optimal_in_the_given_order(problem):
    lengths, images, capacity, max_images, max_samples = problem
    caps = {"images": images, "max_images": max_images, "max_samples": max_samples}
    plan = plan_packing(lengths, capacity, keep_order=True, **caps)
    assert plan.strategy == "next_fit"
    assert plan.items.tolist() == list(range(len(lengths)))

    def fits(s: int, end: int) -> bool:
        few = end - s <= (max_samples or NO_CAP) and sum((images or [])[s:end]) <= (max_images or NO_CAP)
        return few and sum(lengths[s:end]) <= capacity

    fewest = [0]  # by the number of items before
    for end in range(1, len(lengths) + 1):
        fewest.append(1 + min(fewest[s] for s in range(end) if fits(s, end)))
    assert plan.num_packs == fewest[-1]


@settings(max_examples=200, deadline=None)
@given(problems(capacities=st.integers(1, 3000)))
def test_histogram_packs_as_best_fit_does(problem):
    """Without caps: the same packs, up to the choice among equal items."""
    lengths, _, capacity, *_ = problem
    plans = [plan_packing(lengths, capacity, strategy=strategy) for strategy in ("best_fit", "histogram")]
    packs = [sorted(sorted(lengths[i] for i in pack) for pack in plan) for plan in plans]
    assert packs[0] == packs[1]


@settings(max_examples=150, deadline=None)
@given(problems(), st.sampled_from(STRATEGIES), st.sampled_from(["drop", "own_pack"]), st.integers(0, 2), st.data())
def test_oversize_items_by_policy(problem, strategy, oversize, seed, data):
    lengths, images, capacity, max_images, max_samples = problem
    if strategy == "subset_sum" and capacity > 2**24:
        return
    large = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True, max_size=3)) if lengths else []
    for i in large:
        if images is not None and i % 2:
            images[i] = max_images + 1
        else:
            lengths[i] = capacity + 1 + i
    options = options_of((lengths, images, capacity, max_images, max_samples), strategy)
    plan = plan_packing(lengths, capacity, oversize=oversize, seed=seed, **options)
    check(plan)
    assert plan.dropped.tolist() == (sorted(large) if oversize == "drop" else [])
    own = [int(plan[pack][0]) for pack in plan.oversize_packs]
    assert sorted(own) == (sorted(large) if oversize == "own_pack" else [])
    if seed == 0:
        assert np.all(np.diff([pack[0] for pack in plan]) > 0)
    if large:
        with pytest.raises(ValueError, match=r"(lengths|images): expected each in \[0, (capacity|max_images)="):
            plan_packing(lengths, capacity, **options)
