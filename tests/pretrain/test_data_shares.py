"""Epochs of several data sets by shares: kept exactly, all samples seen, resumed at any point."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mmkernels.pretrain.data import BatchSampler, Shares, TokenSampler


def counts(shares: Shares, items: np.ndarray) -> list[int]:
    """How many of the samples come from each part."""
    edges = np.cumsum([0, *shares.sizes])
    return np.histogram(items, edges)[0].tolist()


@pytest.mark.parametrize("weights", [(2, 1), (1, 5), (0.1, 0.2)])
def test_epochs_have_the_shares_exactly(weights: tuple[float, float]) -> None:
    shares, total = Shares("ab", (70, 20), weights), [0, 0]
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    for epoch in range(7):
        items = shares.order(3, epoch)
        assert len(items) == 90
        total = [a + b for a, b in zip(total, counts(shares, items), strict=True)]
        assert all(abs(a - share * 90 * (epoch + 1)) < 1 for a, share in zip(total, exact, strict=True))
    assert total == [share * 630 for share in exact], "seven epochs divide evenly"


def test_without_weights_an_epoch_is_one_pass_of_each_set() -> None:
    shares = Shares("ab", (70, 20))
    for epoch in range(3):
        assert sorted(shares.order(0, epoch).tolist()) == list(range(90))
    assert not np.array_equal(shares.order(0, 0), shares.order(0, 1))
    assert not np.array_equal(shares.order(0, 0), shares.order(1, 0))


def test_a_repeated_set_is_dealt_pass_after_pass_and_a_cut_one_goes_on() -> None:
    shares = Shares("ab", (70, 20), (1, 2))  # 30 and 60 of 90
    items = np.concatenate([shares.order(5, epoch) for epoch in range(7)])
    small, large = items[items >= 70], items[items < 70]
    for passes, size in ((small, 20), (large, 70)):
        whole = passes[: len(passes) // size * size].reshape(-1, size)
        assert len(whole) == (21 if size == 20 else 3)
        assert all(len(set(each.tolist())) == size for each in whole), "a pass has every sample once"
        assert len({tuple(each.tolist()) for each in whole}) == len(whole), "each is a fresh permutation"


def test_every_part_of_an_epoch_has_the_shares() -> None:
    shares = Shares("ab", (700, 200), (2, 1))
    for few in np.split(shares.order(1, 0), 9):
        assert abs(counts(shares, few)[0] - 66.7) <= 2


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 20)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    first=st.integers(0, 50),
)
def test_shares_and_coverage_hold_for_any_sizes(parts: list[tuple[int, float]], seed: int, first: int) -> None:
    sizes, weights = [size for size, _ in parts], [weight for _, weight in parts]
    n = sum(sizes)
    assume(all(weight / sum(weights) * n >= 1.001 for weight in weights))  # less than a sample an epoch is refused
    shares = Shares([str(i) for i in range(len(parts))], sizes, weights)
    assert shares.dealt(0) == [0] * len(parts)
    for epoch in range(first, first + 3):
        before, after = shares.dealt(epoch), shares.dealt(epoch + 1)
        items = shares.order(seed, epoch)
        assert counts(shares, items) == [b - a for a, b in zip(before, after, strict=True)]
        assert len(items) == n
        assert all(abs(a - share * n * epoch) < 1 for a, share in zip(before, shares.of, strict=True))
    slowest = max(2 * size / (share * n) for size, share in zip(sizes, shares.of, strict=True))
    seen = {i for epoch in range(first, first + int(slowest) + 2) for i in shares.order(seed, epoch).tolist()}
    assert seen == set(range(n)), "two passes' worth of any stretch has all"


def test_bad_weights_are_refused() -> None:
    for weights in ((1, 0), (1, -1), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ValueError, match="data_weights: expected positive numbers, got 1 "):
            Shares("ab", (3, 4), weights)
    with pytest.raises(ValueError, match="data_weights: expected one for each of a, b, got 1 2 3"):
        Shares("ab", (3, 4), (1, 2, 3))
    with pytest.raises(ValueError, match=r"at least one sample an epoch of each part, got .* of 7 samples for b"):
        Shares("ab", (3, 4), (100, 1))


# ------------------------------------------------------------------------------------------------ samplers


SHARES = Shares("ab", (120, 15), (1, 1))
CONCEPTS = np.concatenate([np.arange(120) // 3, 40 + np.arange(15)])
LENGTHS = np.random.default_rng(5).integers(3, 40, 135)


def by_count() -> BatchSampler:
    return BatchSampler(CONCEPTS, 16, seed=2, shares=SHARES)


def by_tokens() -> TokenSampler:
    return TokenSampler(LENGTHS, 200, seed=2, shares=SHARES)


def test_batches_have_distinct_concepts_and_the_shares() -> None:
    batches = list(islice(by_count(), 80))
    assert all(len(set(CONCEPTS[batch].tolist())) == 16 for batch in batches)
    a, b = counts(SHARES, np.concatenate(batches))
    assert abs(b / (a + b) - 0.5) < 0.02
    seen = Counter(np.concatenate(batches).tolist())
    assert len(seen) == 135
    assert min(seen[i] for i in range(120, 135)) > 30, "a small set is repeated"


def test_batches_by_tokens_have_what_the_epoch_deals() -> None:
    sampler, dealt = by_tokens(), dict[int, list[np.ndarray]]()
    while sampler.epoch < 3:
        batch = next(sampler)
        dealt.setdefault(sampler.epoch, []).append(batch)
    for epoch, batches in list(dealt.items())[:3]:
        assert all(LENGTHS[batch].sum() <= 200 for batch in batches)
        assert sorted(np.concatenate(batches).tolist()) == sorted(SHARES.order(2, epoch).tolist())


@pytest.mark.parametrize("make", [by_count, by_tokens])
def test_a_sampler_of_shares_resumes_at_any_point(make: Callable[[], BatchSampler | TokenSampler]) -> None:
    straight = make()
    states, batches = [], []
    for _ in range(60):
        states.append(json.dumps(straight.state_dict()))
        batches.append(next(straight))
    assert straight.epoch >= 3
    for stop in range(0, 55, 3):
        resumed = make()
        resumed.load_state_dict(json.loads(states[stop]))
        for batch in batches[stop : stop + 5]:
            np.testing.assert_array_equal(batch, next(resumed))


def test_a_sampler_refuses_other_shares() -> None:
    state = json.loads(json.dumps(by_count().state_dict()))
    for other in (Shares("ab", (120, 15), (2, 1)), Shares("ab", (119, 16), (1, 1)), None):
        with pytest.raises(ValueError, match=r"state: expected shares .* as in this run"):
            BatchSampler(CONCEPTS, 16, seed=2, shares=other).load_state_dict(state)
    with pytest.raises(ValueError, match="shares: expected those of 135 samples, got of 90"):
        BatchSampler(CONCEPTS, 16, shares=Shares("ab", (70, 20)))
    with pytest.raises(
        ValueError, match="expected at most 50% for b, with 15 concepts, each at most once in a batch of"
    ):
        BatchSampler(CONCEPTS, 30, shares=Shares("ab", (120, 15), (1, 3)))


def test_an_epoch_that_deals_too_few_concepts_for_a_batch_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such parts are refused; without that: of forty samples one has a concept of its own, and an epoch deals half of
    them, so that every other one lacks it."""
    monkeypatch.setattr(Shares, "fit", lambda *_: None)
    concepts = np.array([0] * 39 + [1, 2, 3])
    begun = 0
    for seed in range(8):
        shares = Shares("ab", (40, 2), (1, 1))
        if len(set(concepts[shares.order(seed, 0)].tolist())) < 4:
            with pytest.raises(ValueError, match="batch: expected at most the distinct concepts of an epoch, got 4"):
                BatchSampler(concepts, 4, seed, shares)
            continue
        batches = list(islice(sampler := BatchSampler(concepts, 4, seed, shares), 5))
        assert all(sorted(concepts[batch].tolist()) == [0, 1, 2, 3] for batch in batches)
        assert sampler.epoch >= 5
        begun += 1
    assert 0 < begun < 8


def test_a_part_with_one_frequent_concept_cannot_have_a_large_share() -> None:
    """Each batch takes the concept once; the rest of the part would be left over, and its share be smaller."""
    concepts = np.concatenate([np.zeros(100), np.arange(1, 101), np.arange(1000, 3000)]).astype(np.int64)
    shares = Shares(["skewed", "even"], [200, 2000], (1, 1))
    with pytest.raises(ValueError, match=r"data_weights: expected at most 3\.12% for skewed, since 50% of its samples"):
        BatchSampler(concepts, 64, shares=shares)
    BatchSampler(concepts, 4, shares=shares)


def test_a_batch_by_tokens_has_a_sample_once() -> None:
    """Though an epoch has it several times."""
    sampler = TokenSampler(np.full(40, 5), 40, seed=1, shares=Shares(["few", "many"], [4, 36], (3, 1)))
    dealt = []
    for _ in range(sampler.batches_per_epoch):
        batch = next(sampler)
        assert len(np.unique(batch)) == len(batch) and 5 * len(batch) <= 40
        dealt += batch.tolist()
    assert len(dealt) == 40 and sum(index < 4 for index in dealt) == 30


@pytest.mark.parametrize("weights", [(1, "x"), (True, 1), (1, float("nan"))])
def test_weights_are_numbers(weights: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="data_weights: expected positive numbers"):
        Shares(["a", "b"], [4, 4], weights)
