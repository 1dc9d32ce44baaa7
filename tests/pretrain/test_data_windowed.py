"""Batches of a mixture whose shares change from window to window: exact shares and passes, resumed anywhere."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkernels.pretrain.blending import capped
from mmkernels.pretrain.data import BatchSampler, Shares, StagedSampler, TokenSampler, WindowedSampler

PARTS = ("a", "b", "c")
SIZES = (120, 15, 40)
CONCEPTS = np.concatenate([np.arange(120) // 3, 40 + np.arange(15), 100 + np.arange(40) // 2])
LENGTHS = np.random.default_rng(5).integers(3, 40, sum(SIZES))
STARTS = np.cumsum([0, *SIZES])


def shares_at(step: int) -> list[float]:
    """Other ones in each window of 6."""
    return np.random.default_rng(step // 6).dirichlet([4.0, 1.0, 2.0]).tolist()


def by_count(asked: Any = shares_at) -> WindowedSampler:
    return WindowedSampler(BatchSampler(CONCEPTS, 16, 2, Shares(PARTS, SIZES)), asked, 6)


def by_tokens(asked: Any = shares_at) -> WindowedSampler:
    return WindowedSampler(TokenSampler(LENGTHS, 200, 12, 2, Shares(PARTS, SIZES)), asked, 6)


def counts(items: np.ndarray) -> np.ndarray:
    return np.histogram(items, STARTS)[0]


@pytest.mark.parametrize("make", [by_count, by_tokens])
def test_each_window_has_its_shares(make: Any) -> None:
    sampler, owed = make(), np.zeros(3)
    for window in range(40):
        batches = [next(sampler) for _ in range(6)]
        state = sampler.state_dict()
        items = np.concatenate(batches)
        mix = np.array(state["mix"])
        assert mix.sum() == pytest.approx(1.0)
        if make is by_count:
            np.testing.assert_allclose(mix, capped(shares_at(6 * window), [1.0, 15 / 16, 1.0]))
        drawn = np.array(sampler._ended.dealt) - np.array(sampler._begun.dealt)
        owed += mix * drawn.sum() - drawn
        assert np.abs(owed).max() < 1.5, "no share is lost by rounding"
        waiting = counts(np.array(sampler._ended.waiting)) - counts(np.array(sampler._begun.waiting))
        np.testing.assert_array_equal(counts(items), drawn - waiting)
        assert len(sampler._ended.waiting) <= 40
    assert sampler.step == 240


@pytest.mark.parametrize("make", [by_count, by_tokens])
def test_every_pass_has_each_sample_once(make: Any) -> None:
    sampler = make()
    seen = Counter(np.concatenate([next(sampler) for _ in range(300)]).tolist())
    waiting = set(sampler._ended.waiting)
    for part, (start, end) in enumerate(pairwise(STARTS.tolist())):
        passes = sampler._ended.dealt[part] / SIZES[part]
        times = [seen[i] for i in range(start, end) if i not in waiting]
        assert math.floor(passes) <= min(times) and max(times) <= math.ceil(passes) and min(times) > 3


@pytest.mark.parametrize("make", [by_count, by_tokens])
def test_batches_are_as_others(make: Any) -> None:
    for batch in islice(make(), 200):
        assert len(set(batch.tolist())) == len(batch)
        if make is by_count:
            assert len(batch) == 16 == len(set(CONCEPTS[batch].tolist()))
        else:
            assert LENGTHS[batch].sum() <= 200 and len(batch) <= 12
    fill = np.mean([LENGTHS[batch].sum() for batch in islice(by_tokens(), 200)])
    assert fill > 0.9 * 200


@pytest.mark.parametrize("make", [by_count, by_tokens])
def test_a_sampler_resumes_anywhere(make: Any) -> None:
    """Without asking again for the shares of a window that has begun."""
    straight, states, batches = make(), [], []
    for _ in range(40):
        states.append(json.dumps(straight.state_dict()))
        batches.append(next(straight))
    for stop in range(30):
        first = -(-stop // 6) * 6

        def asked(step: int, first: int = first) -> list[float]:
            assert step >= first and step % 6 == 0
            return shares_at(step)

        resumed = make(asked)
        resumed.load_state_dict(json.loads(states[stop]))
        assert json.dumps(resumed.state_dict()) == states[stop] and resumed.step == stop
        for batch in batches[stop : stop + 9]:
            np.testing.assert_array_equal(batch, next(resumed))


def test_a_sampler_refuses_other_states() -> None:
    state = json.loads(json.dumps(by_count().state_dict()))
    fixed = BatchSampler(CONCEPTS, 16, 2, Shares(PARTS, SIZES))
    with pytest.raises(ValueError, match="state: expected that of a run whose shares change"):
        by_count().load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match="state: expected that of a run with fixed shares"):
        fixed.load_state_dict(state)
    with pytest.raises(ValueError, match="state: expected batch 200 as in this run, got 16"):
        by_tokens().load_state_dict(state)


def test_a_stage_begins_within_a_window() -> None:
    asked: list[int] = []

    def ask(step: int) -> list[float]:
        asked.append(step)
        return shares_at(step)

    def staged() -> StagedSampler:
        return StagedSampler([(8, by_count(ask)), (None, by_tokens(ask))])

    sampler = staged()
    batches, states = [], []
    for _ in range(20):
        states.append(sampler.state_dict())
        batches.append(next(sampler))
    assert asked == [0, 6, 8, 12, 18]
    for stop, state in enumerate(states):
        resumed = staged()
        resumed.load_state_dict(state)
        for batch in batches[stop:]:
            np.testing.assert_array_equal(batch, next(resumed))


def test_a_part_has_no_more_than_batches_can_have() -> None:
    """15 concepts of 16 in a batch, and a share that asks for more."""
    sampler = by_count(lambda step: [0.01, 0.98, 0.01])
    for _ in range(20):
        batches = np.concatenate([next(sampler) for _ in range(6)])
        assert len(sampler._ended.waiting) < 60, "nothing piles up"
    assert counts(batches)[1] / len(batches) == pytest.approx(15 / 16, abs=0.02)


def possible(sampler: WindowedSampler, windows: int = 30) -> np.ndarray:
    """The last window's samples: nothing piles up, and no time is lost."""
    for _ in range(windows):
        items = np.concatenate([next(sampler) for _ in range(sampler.every)])
        state = sampler.state_dict()
        assert len(sampler._ended.waiting) <= 8 * sampler.base.size_of(state["mix"]) + 1
    return items


def test_concepts_that_do_not_fit() -> None:
    """Most samples of each part have one concept; or one concept is in both parts; or nearly all have it."""
    lonely = np.concatenate([np.zeros(60), np.ones(60), [2, 3]]).astype(np.int64)
    sampler = WindowedSampler(BatchSampler(lonely, 4, 2, Shares("ab", (60, 62))), lambda step: [0.5, 0.5], 6)
    assert sorted(lonely[possible(sampler)].tolist()) == sorted([0, 1, 2, 3] * 6)
    once = np.where(np.arange(2000) % 10, np.arange(2000), 0)
    twice = BatchSampler(np.concatenate([once, once]), 16, 2, Shares("ab", (2000, 2000)))
    items = possible(WindowedSampler(twice, lambda step: [0.5, 0.5], 50))
    assert (np.concatenate([once, once])[items] == 0).sum() == 50 and abs((items < 2000).mean() - 0.5) < 0.1
    rare = np.where(np.arange(40000) % 400, 0, np.arange(40000))
    sampler = WindowedSampler(BatchSampler(rare, 16, 2, Shares("ab", (20000, 20000))), lambda step: [0.5, 0.5], 6)
    assert (rare[possible(sampler, 3)] == 0).sum() == 6


def test_shares_that_are_just_possible() -> None:
    """All concepts are in every batch."""
    whole = WindowedSampler(BatchSampler(np.arange(6), 6, 0, Shares("ab", (1, 5))), lambda step: [0.9, 0.1], 4)
    assert np.bincount(possible(whole)).tolist() == [4] * 6
    packs = WindowedSampler(TokenSampler(np.full(6, 5), 30, None, 0, Shares("ab", (1, 5))), lambda step: [0.9, 0.1], 4)
    assert np.bincount(possible(packs)).max() <= 4


@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.98])
def test_more_of_a_part_of_short_samples(share: float) -> None:
    """A batch has more samples the shorter they are, but none of the part twice."""
    lengths = np.repeat([100, 2], [1000, 50])
    base = TokenSampler(lengths, 1000, None, 2, Shares("ab", (1000, 50)))
    sampler = WindowedSampler(base, lambda step: [1 - share, share], 6)
    items = possible(sampler)
    assert lengths[items].sum() / 6000 > 0.9
    mix = sampler.state_dict()["mix"]
    assert mix[1] == pytest.approx(min(share, 0.847), abs=0.01)
    assert (items >= 1000).mean() == pytest.approx(mix[1], abs=0.06)


def test_a_tiny_share_is_dealt_in_the_end() -> None:
    sampler = by_count(lambda step: [0.999, 0.0005, 0.0005])
    dealt = counts(np.concatenate([next(sampler) for _ in range(600)]))
    np.testing.assert_allclose(dealt[1:], 0.0005 * 16 * 600, atol=2)


@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(0.01, 1.0)), min_size=1, max_size=6))
def test_bounded_shares(pairs: list[tuple[float, float]]) -> None:
    weights, most = map(list, zip(*pairs, strict=True))
    if math.fsum(most) < 1:
        return
    found = capped(weights, most)
    assert math.fsum(found) == pytest.approx(1.0)
    assert all(share <= bound * (1 + 1e-12) for share, bound in zip(found, most, strict=True))
    free = [i for i in range(len(most)) if found[i] < most[i] * (1 - 1e-9)]
    for i in free:
        for j in range(len(most)):
            assert found[j] / found[i] <= weights[j] / weights[i] * (1 + 1e-6), "nobody is bounded without need"
