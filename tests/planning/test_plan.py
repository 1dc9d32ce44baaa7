"""The planner: every plan is within its caps and complete; native and Python agree; best fit keeps its bound."""

import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import PackingPlan, plan_packing
from mmkernels.planning import plan_python
from mmkernels.planning.plan import shuffled
from mmkernels.runtime import native
from mmkernels.testing.lengths import LENGTHS, lengths_like, samples_like

needs_native = pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))

STRATEGIES = ["auto", "best_fit", "subset_sum", "histogram", "next_fit"]
NO_CAP = 2**63 - 1


def check(plan: PackingPlan) -> None:
    """Every item exactly once or dropped, no pack over its caps or empty, the figures as a plain loop finds them."""
    lengths, images = plan.lengths.tolist(), None if plan.images is None else plan.images.tolist()
    assert plan.offsets.dtype == plan.items.dtype == np.int64
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.items)
    assert sorted([*plan.items.tolist(), *plan.dropped.tolist()]) == list(range(len(lengths)))
    room = 0
    for number, pack in enumerate(plan):
        tokens, pictures = sum(lengths[i] for i in pack), sum(images[i] for i in pack) if images else 0
        room += max(plan.capacity, tokens)
        assert len(pack) > 0
        assert (plan.pack_lengths[number], plan.pack_images[number]) == (tokens, pictures)
        if number in plan.oversize_packs:
            assert len(pack) == 1
            assert tokens > plan.capacity or pictures > plan.max_images
            continue
        assert tokens <= plan.capacity
        assert plan.max_images is None or pictures <= plan.max_images
        assert plan.max_samples is None or len(pack) <= plan.max_samples
    assert plan.lower_bound <= plan.num_packs
    assert plan.efficiency == (sum(plan.pack_lengths.tolist()) / room if room else 1.0)


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_absent", lambda: "taken away by a test")


@st.composite
def problems(draw, most_items: int = 60, capacities=None):
    """(lengths, images or None, capacity, max_images, max_samples), each item within the caps."""
    if capacities is None:
        capacities = st.one_of(st.integers(1, 40), st.integers(1, 5000), st.just(2**40))
    capacity = draw(capacities)
    lengths = draw(st.lists(st.integers(0, capacity), max_size=most_items))
    max_samples = draw(st.one_of(st.none(), st.integers(1, 6)))
    max_images = draw(st.one_of(st.none(), st.integers(1, 5), st.just(2**29)))
    images = (
        draw(st.lists(st.integers(0, max_images), min_size=len(lengths), max_size=len(lengths))) if max_images else None
    )
    return lengths, images, capacity, max_images, max_samples


def options_of(problem, strategy: str, lookahead: int = 128) -> dict:
    """Of the options those that the call takes: `lookahead` is an error where subset sum has no part."""
    _, images, capacity, max_images, max_samples = problem
    options = {"strategy": strategy, "images": images, "max_images": max_images, "max_samples": max_samples}
    if strategy == "subset_sum" or (strategy == "auto" and capacity <= 2**24):
        options["lookahead"] = lookahead
    return options


def optimum(problem) -> int:
    """Fewest packs by exhaustive search: each item goes into one of the packs so far or a new one."""
    lengths, images, capacity, max_images, max_samples = problem
    images = images or [0] * len(lengths)
    best = len(lengths)

    def place(i: int, packs: list[tuple[int, int, int]]) -> None:
        nonlocal best
        if len(packs) >= best:
            return
        if i == len(lengths):
            best = len(packs)
            return
        for p, (tokens, pictures, count) in enumerate(packs):
            grown = tokens + lengths[i], pictures + images[i], count + 1
            if grown[0] <= capacity and grown[1] <= (max_images or NO_CAP) and grown[2] <= (max_samples or NO_CAP):
                place(i + 1, [*packs[:p], grown, *packs[p + 1 :]])
        place(i + 1, [*packs, (lengths[i], images[i], 1)])

    if lengths:
        place(0, [])
    return best


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
    """The bound is none above the optimum, no strategy below it, auto the best of them, best fit within its bound."""
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
    assert plans["histogram"].num_packs == plans["best_fit"].num_packs
    assert plans["subset_sum"].displacement < 0.1 * plans["best_fit"].displacement
    assert plans["next_fit"].displacement == 0


@pytest.mark.parametrize("name", ["obelics@8192", "qwen2vl@16384", "llavaov@32768"])
def test_image_caps_on_data(name):
    """A cap 10% above what the packs need on average: subset sum still fills them, best fit cannot."""
    lengths, _, images, capacity = samples_like(name, 3000)
    most = max(int(images.max()), int(1.1 * images.sum() * capacity / lengths.sum()))
    plans = {s: plan_packing(lengths, capacity, strategy=s, images=images, max_images=most) for s in STRATEGIES}
    for plan in plans.values():
        check(plan)
    assert plans["subset_sum"].num_packs <= 1.02 * plans["subset_sum"].lower_bound
    assert plans["auto"].num_packs == plans["subset_sum"].num_packs < plans["best_fit"].num_packs


@settings(max_examples=200, deadline=None)
@given(problems(most_items=10, capacities=st.integers(2, 60)))
def test_subset_sum_fills_the_oldest_pack_best(problem):
    """The first pack holds the first item and, unless both caps bind, is as full as any subset of the others can."""
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
def test_next_fit_is_the_best_that_keeps_the_order(problem):
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
    """Without caps: the same packs, up to which of equal items goes where."""
    lengths, _, capacity, *_ = problem
    plans = [plan_packing(lengths, capacity, strategy=strategy) for strategy in ("best_fit", "histogram")]
    packs = [sorted(sorted(lengths[i] for i in pack) for pack in plan) for plan in plans]
    assert packs[0] == packs[1]


@needs_native
@pytest.mark.parametrize("capacity", [4096, 70_000, 2**21])
def test_a_counted_plan_lists_its_packs_when_asked(capacity):
    """One pass over the lengths, which the plan keeps a copy of; the same plan as without that short cut."""
    lengths = np.random.default_rng(0).integers(0, capacity // 4, 3000)
    plan = plan_packing(lengths, capacity, strategy="histogram", max_samples=9)
    direct = plan_packing(lengths.astype(np.int32), capacity, strategy="histogram", max_samples=9)
    before = lengths.copy()
    lengths[:] = 1
    assert (plan.num_packs, plan.efficiency) == (direct.num_packs, direct.efficiency)
    assert not set(plan.__dict__) & {"_listed", "lengths"}
    copy = pickle.loads(pickle.dumps(plan))
    for each in (plan, copy):
        check(each)
        assert np.array_equal(each.items, direct.items)
        assert np.array_equal(each.lengths, before)
    with pytest.raises(ValueError, match="read-only"):
        plan.items[0] = 1


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


def test_dropped_items_are_said():
    plan = plan_packing([3, 99, 5, 100], 8, oversize="drop")
    assert plan.dropped.tolist() == [1, 3]
    assert [pack.tolist() for pack in plan] == [[0, 2]]
    assert plan.efficiency == 1.0
    assert plan.displacement == 0.0
    assert "2 items dropped" in repr(plan)
    plan = plan_packing([3, 99, 5, 100], 8, oversize="own_pack")
    assert [pack.tolist() for pack in plan] == [[0, 2], [1], [3]]
    assert plan.oversize_packs.tolist() == [1, 2]
    assert plan.lower_bound == 3
    assert plan.efficiency == 1.0
    assert "2 packs oversize" in repr(plan)


def test_lookahead_trades_order_for_efficiency():
    lengths, capacity = lengths_like("caption@4096", 20_000)
    plans = [plan_packing(lengths, capacity, strategy="subset_sum", lookahead=ahead) for ahead in (1, 16, 128)]
    for small, large in itertools.pairwise(plans):
        assert small.efficiency < large.efficiency
    assert plan_packing([5, 1, 3], 8, strategy="subset_sum", lookahead=1).num_packs == 3
    assert max(abs(plans[1].items - np.arange(20_000))) < 200


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


def test_shuffle_is_the_same_on_every_machine():
    assert shuffled(8, 1).tolist() == [3, 4, 7, 5, 2, 0, 1, 6]
    assert sorted(shuffled(1000, 7).tolist()) == list(range(1000))


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
def test_non_power_of_two_capacity_packs_nothing(capacity):
    """TRL #3887: such a capacity packed nothing."""
    lengths = np.random.default_rng(0).integers(1, 301, 2000)
    plan = plan_packing(lengths, capacity)
    check(plan)
    assert plan.efficiency > 0.99


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tokens_dropped(strategy):
    """TRL #4554: tokens past the capacity vanished."""
    lengths, capacity = lengths_like("llavaov@16384", 2000)
    plan = plan_packing(lengths, capacity, strategy=strategy)
    assert plan.pack_lengths.sum() == lengths.sum()
    with pytest.raises(ValueError, match=r"capacity=16384\], got 16385 at index 2000"):
        plan_packing([*lengths, capacity + 1], capacity, strategy=strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_truncated_or_split_images(strategy):
    """TRL #5904, verl #3469: an item's images were cut off, or its halves went into two packs."""
    samples = samples_like("llavaov@16384", 1000)
    plan = plan_packing(samples.lengths, samples.capacity, images=samples.images, max_images=40, strategy=strategy)
    whole = np.full(1000, -1)
    for number, pack in enumerate(plan):
        assert (whole[pack] == -1).all()
        whole[pack] = number
    assert np.array_equal(np.bincount(whole, samples.images).astype(np.int64), plan.pack_images)
    assert np.array_equal(np.bincount(whole, samples.lengths).astype(np.int64), plan.pack_lengths)


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
        ({"max_images": 1}, ValueError, r"images: expected \[n\] integers with max_images, got None"),
        ({"images": [1], "max_images": 0}, ValueError, "max_images: expected an integer >= 1, got 0"),
        ({"images": [1, 2]}, ValueError, r"images: expected \[1\] integers, got '\[2\] int64'"),
        ({"images": [0.5]}, TypeError, r"images: expected \[n\] integers, got '\[1\] float64'"),
        ({"images": [-1]}, ValueError, r"images: expected an integer in \[0, 2\^63\), got -1 at index 0"),
        (
            {"images": [3], "max_images": 2},
            ValueError,
            r"images: expected each in \[0, max_images=2\], got 3 at index 0",
        ),
        ({"oversize": "truncate"}, ValueError, "oversize: expected one of error, drop, own_pack, got 'truncate'"),
        (
            {"images": [1], "max_images": 2**30, "strategy": "subset_sum"},
            ValueError,
            "max_images: expected at most 1073741823 with strategy='subset_sum'",
        ),
        (
            {"lookahead": 2**31, "strategy": "subset_sum"},
            ValueError,
            r"lookahead: expected at most 119304646 \(1 GiB of tables\) with strategy='subset_sum'",
        ),
        (
            {"keep_order": True, "strategy": "best_fit"},
            ValueError,
            "keep_order: expected strategy='next_fit' or 'auto'",
        ),
        ({"keep_order": True, "seed": 1}, ValueError, "keep_order: .* and seed=0"),
        (
            {"lookahead": 64, "strategy": "best_fit"},
            ValueError,
            "lookahead: expected its default for best_fit",
        ),
        ({"lookahead": 64, "keep_order": True}, ValueError, "lookahead: expected its default for next_fit"),
        ({"lookahead": 0}, ValueError, "lookahead: expected an integer >= 1, got 0"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        plan_packing([1], 8, **options)
