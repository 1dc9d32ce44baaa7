"""Small plans by hand: the figures of a plan, the forms of its input, bad input."""

import pickle

import numpy as np
import pytest
import torch
from planning.problems import check, needs_native

from mmkernels import plan_packing
from mmkernels.planning.plan import shuffled


def test_a_plan_by_hand():
    # 8 | 7 + 1 | 5 + 3 | 4 + 4, the earlier of equals first; packs ordered by first item.
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


def test_dropped_items_are_reported():
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


@needs_native
@pytest.mark.parametrize("capacity", [4096, 70_000, 2**21])
def test_a_counted_plan_lists_its_packs_when_asked(capacity):
    """One pass over the lengths, which the plan copies; the same plan as without this shortcut."""
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
