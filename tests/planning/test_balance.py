"""Ranks: every pack once, equal steps, nearly equal work, one order at every world size, images spread over ranks."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import AttentionCost, EncoderCost, PackingPlan, balance_ranks, plan_packing
from mmkernels.testing.lengths import LENGTHS, samples_like


def plan_like(name: str, n: int) -> tuple[PackingPlan, AttentionCost]:
    """A plan, and the joint cost of a vision encoder over single images and a language model over all tokens."""
    samples = samples_like(name, n)
    squares = samples.vision**2 // np.maximum(samples.images, 1)
    cost = AttentionCost(
        EncoderCost.transformer(1152, 27, tokens=samples.vision, pairs=squares),
        EncoderCost.transformer(4096, 32, gated=True, causal=True, feed_forward=14336),
    )
    return plan_packing(samples.lengths, samples.capacity, images=samples.images), cost


@pytest.mark.parametrize("name", LENGTHS)
def test_64_ranks_wait_for_at_most_two_percent(name):
    """On every distribution, with the default cost and a joint one; the padded last step counts."""
    plan, joint = plan_like(name, {"caption@4096": 200_000, "navit@4096": 200_000}.get(name, 100_000))
    for cost in (None, joint):
        schedule = balance_ranks(plan, 64, cost=cost)
        assert schedule.imbalance <= 1.02
        dealt = np.arange(plan.num_packs // 64 * 64).reshape(-1, 64)
        each = (cost or AttentionCost()).of_packs(plan)[dealt]
        assert schedule.imbalance < 1.001 * each.max(1).sum() / each.mean(1).sum() + 0.002  # at most round robin's
        assert plan.pack_lengths[schedule.packs[:-1]].max() <= plan.capacity


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 2)), max_size=80),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 2),
    st.sampled_from([1, 4, 4096]),
    st.sampled_from(["pad", "drop"]),
)
def test_every_pack_once_and_equal_steps(items, world_size, accum, seed, window, last):
    plan = plan_packing([length for length, _ in items], 40, images=[images for _, images in items])
    schedule = balance_ranks(plan, world_size, accum=accum, seed=seed, window=window, last=last)
    dealt = schedule.packs[schedule.packs >= 0]
    assert len(set(dealt.tolist())) == len(dealt)
    missing = plan.num_packs - len(dealt)
    assert missing == 0 if last == "pad" else 0 <= missing < world_size * accum
    assert (schedule.packs[:-1] >= 0).all()  # dummies only in the last step
    assert schedule.packs.shape == (schedule.num_steps, world_size, accum)
    costs = np.append(AttentionCost().of_packs(plan), 0.0)
    assert np.array_equal(schedule.costs, costs[schedule.packs])
    images = np.append(plan.pack_images, 0)[schedule.packs]
    assert np.array_equal(schedule.no_image, (images == 0).all(2))
    for step, rank in zip(*np.nonzero(schedule.no_image), strict=True):
        # A rank may lack an image only if no other rank of the step has one to spare.
        assert ((images[step] > 0).sum(1) <= 1).all(), (step, rank)
    assert schedule.position(0) == 0
    assert schedule.position(schedule.num_steps) == (len(dealt) if schedule.num_steps else 0)


@pytest.mark.parametrize(("before", "after", "accum"), [(8, 3, 1), (3, 8, 2), (4, 4, 1), (2, 5, 3)])
def test_another_world_size_continues_in_the_same_order(before, after, accum):
    """What is done after some steps is what one rank had done by then; each later step takes that rank's next packs."""
    plan, cost = plan_like("obelics@8192", 4000)
    alone = balance_ranks(plan, 1, cost=cost, seed=3).packs.ravel()
    first = balance_ranks(plan, before, accum=accum, cost=cost, seed=3)
    steps = 5
    start = first.position(steps)
    assert start == steps * before * accum
    then = balance_ranks(plan, after, accum=2, cost=cost, seed=3, start=start)
    assert set(first.packs[:steps].ravel()) == set(alone[:start])
    for step in range(then.num_steps - 1):
        begin = start + step * after * 2
        assert set(then.packs[step].ravel()) == set(alone[begin : begin + after * 2])
    same = balance_ranks(plan, before, accum=accum, cost=cost, seed=3, start=start)
    assert np.array_equal(same.packs, first.packs[steps:])  # the same world size: identical steps


SCHEDULE = """
import hashlib
from mmkernels import balance_ranks, plan_packing
from mmkernels.testing.lengths import samples_like
samples = samples_like("qwen2vl@16384", 5000)
plan = plan_packing(samples.lengths, samples.capacity, images=samples.images, seed=5)
schedule = balance_ranks(plan, 16, accum=2, seed=7)
digest = hashlib.sha256(schedule.packs.tobytes() + schedule.no_image.tobytes()).hexdigest()
"""


def test_every_process_computes_the_same_schedule():
    here: dict = {}
    exec(SCHEDULE, here)
    there = subprocess.run(
        [sys.executable, "-c", SCHEDULE + "print(digest)"], capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here["digest"]


def test_work_over_accumulated_packs_evens_out():
    """Two packs per rank and step: the rank with the most expensive first pack gets the cheapest second."""
    plan = plan_packing([10, 20, 30, 40, 50, 60, 70, 80], 100, max_samples=1)
    assert balance_ranks(plan, 4, accum=2, cost=AttentionCost(EncoderCost(1, 0))).imbalance == 1.0
    assert balance_ranks(plan, 4, accum=1, cost=AttentionCost(EncoderCost(1, 0))).imbalance > 1.1


def test_images_are_spread_over_ranks():
    """Half text-only and half image packs, separated by cost: every rank gets one of each."""
    lengths, images = [10] * 8 + [90] * 8, [0] * 8 + [1] * 8
    plan = plan_packing(lengths, 100, images=images, max_samples=1)
    schedule = balance_ranks(plan, 8, accum=2)
    assert not schedule.no_image.any()
    lone = balance_ranks(plan, 8, accum=1)
    assert lone.no_image.sum() == 8  # nothing to swap: flagged
    assert not balance_ranks(plan_packing(lengths, 100, max_samples=1), 8).no_image.any()  # images unknown


def test_ranks_take_turns_at_being_the_dearest():
    plan, cost = plan_like("qwen2vl@16384", 40_000)
    dearest = balance_ranks(plan, 8, cost=cost).costs.sum(2).argmax(1)
    assert np.bincount(dearest, minlength=8).max() < 2 * len(dearest) / 8


def test_costs_by_hand():
    plan = plan_packing([3, 5, 8], 8)
    assert [pack.tolist() for pack in plan] == [[0, 1], [2]]
    assert AttentionCost(EncoderCost(2, 1)).of_packs(plan).tolist() == [2 * 8 + 9 + 25, 2 * 8 + 64]
    vision = EncoderCost(1, 10, tokens=[2, 0, 4], pairs=[2, 0, 8])  # two images of the third item, two tokens each
    assert AttentionCost(vision, EncoderCost(1, 0)).of_packs(plan).tolist() == [8 + 2 + 20, 8 + 4 + 80]
    one = EncoderCost.transformer(16, 3)
    assert (one.linear, one.quadratic) == (3 * 24 * 256, 3 * 64)
    assert EncoderCost.transformer(16, gated=True, feed_forward=32, causal=True).linear == 8 * 256 + 6 * 16 * 32
    assert EncoderCost.transformer(16, causal=True).quadratic == 32
    assert EncoderCost.transformer(4096).linear / EncoderCost.transformer(4096).quadratic == EncoderCost().linear


def test_nothing_to_share():
    schedule = balance_ranks(plan_packing([], 8), 4)
    assert (schedule.num_steps, schedule.imbalance, schedule.position(0)) == (0, 1.0, 0)
    plan = plan_packing([8], 8)
    assert balance_ranks(plan, 4).packs.tolist().count([[0], [-1], [-1], [-1]]) <= 1
    assert (balance_ranks(plan, 4).packs == -1).sum() == 3
    assert balance_ranks(plan, 4, last="drop").num_steps == 0
    assert balance_ranks(plan, 4, start=1).num_steps == 0


# Problems that users reported


def test_ranks_with_different_step_counts_hang():
    """axolotl #494: each rank packed its own share, some got fewer batches, and the others hung."""
    for n, world_size in itertools.product((97, 1000, 1003), (2, 3, 7)):
        samples = samples_like("obelics@8192", n)
        schedule = balance_ranks(plan_packing(samples.lengths, samples.capacity), world_size)
        steps = {len(schedule.rank(rank)) for rank in range(world_size)}
        assert len(steps) == 1
        assert np.sort(schedule.packs[schedule.packs >= 0]).tolist() == list(
            range(len(plan_packing(samples.lengths, samples.capacity)))
        )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"world_size": 0}, ValueError, "world_size: expected an integer >= 1, got 0"),
        ({"accum": 0}, ValueError, "accum: expected an integer >= 1"),
        ({"cost": 3}, TypeError, "cost: expected an AttentionCost, got 3"),
        ({"start": 9}, ValueError, "start: expected at most the 1 packs of the plan, got 9"),
        ({"last": "keep"}, ValueError, "last: expected 'pad' or 'drop', got 'keep'"),
        ({"window": 0}, ValueError, "window: expected an integer >= 1"),
        ({"plan": [1]}, TypeError, r"plan: expected a PackingPlan, got \[1\]"),
        (
            {"cost": AttentionCost(EncoderCost(tokens=[1, 2]))},
            ValueError,
            r"tokens: expected \[1\] integers, got '\[2\] int64'",
        ),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        balance_ranks(**{"plan": plan_packing([4], 8), "world_size": 2, **arguments})


def test_bad_costs_ranks_and_steps():
    with pytest.raises(ValueError, match="linear: expected a number >= 0, got -1"):
        EncoderCost(-1)
    with pytest.raises(ValueError, match="quadratic: expected a number >= 0, got nan"):
        EncoderCost(1, float("nan"))
    with pytest.raises(TypeError, match=r"encoders\[0\]: expected an EncoderCost, got 3"):
        AttentionCost(3)
    schedule = balance_ranks(plan_packing([4], 8), 2)
    with pytest.raises(ValueError, match=r"rank: expected in \[0, 2\), got 2"):
        schedule.rank(2)
    with pytest.raises(ValueError, match=r"steps: expected in \[0, 1\], got 2"):
        schedule.position(2)
