"""Dealing a batch to ranks: everything once, nearly the same work for each, and the same result on all."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from pretrain.small_model import Samples, collator, recipe

from mmkernels.pretrain import Config
from mmkernels.pretrain.data.dealing import Dealer, Hand, deal
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.ranks import ALONE, Ranks
from mmkernels.pretrain.recipe import Shape, Stream
from mmkernels.pretrain.recipes import load
from mmkernels.pretrain.roster import Roster
from mmkernels.pretrain.workload import workload


def loads(costs: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(owners, costs, count)


@pytest.mark.parametrize("seed", range(20))
def test_no_rank_has_more_than_four_thirds_of_the_least_possible(seed: int) -> None:
    """Against every way to deal."""
    draws = np.random.default_rng(seed)
    costs, count = draws.integers(1, 20, 7).astype(float), 3
    best = min(loads(costs, np.array(way), count).max() for way in itertools.product(range(count), repeat=7))
    assert best <= loads(costs, deal(costs, count), count).max() <= (4 / 3) * best


def test_equal_samples_are_dealt_in_equal_numbers() -> None:
    assert np.bincount(deal(np.ones(130), 8)).tolist() == [17, 17, 16, 16, 16, 16, 16, 16]
    assert np.bincount(deal(np.zeros(9), 4), minlength=4).tolist() == [3, 2, 2, 2], "samples without work, too"
    assert deal(np.zeros(0), 4).tolist() == []
    assert sorted(deal(np.array([5.0, 1.0]), 4).tolist()) == [0, 1], "more ranks than samples"


# Tokens of an image, of a text: as they vary in the field.
LENGTHS = {
    "captions": lambda draws, n: (np.full(n, 256), draws.lognormal(3.1, 0.7, n).clip(1, 512)),
    "documents": lambda draws, n: (64 * draws.geometric(0.4, n), draws.lognormal(6.17, 1.03, n).clip(1, 8192)),
    "resolutions": lambda draws, n: (draws.uniform(64, 384, n) ** 2 / 256, draws.lognormal(3.1, 0.7, n).clip(1, 512)),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_64_ranks_have_nearly_the_same_work(kind: str) -> None:
    """The work of all modalities jointly; the slowest rank has at most 1.02 times the mean."""
    of = dataclasses.replace(load("caption"), model=Shape(1024, 16, 512))
    count, draws = 64, np.random.default_rng(0)
    most, in_turn = [], []
    for _ in range(5):
        lengths = np.stack([each.astype(np.int64) for each in LENGTHS[kind](draws, 32 * count)], 1)
        costs = workload(of, lengths)
        for found, owners in ((most, deal(costs, count)), (in_turn, np.arange(len(costs)) % count)):
            each = loads(costs, owners, count)
            found.append(each.max() / each.mean())
    assert max(most) <= 1.02
    if kind == "documents":
        assert np.mean(in_turn) > 1.3, "as hard as it is meant to be"


def test_work_grows_with_layers_and_with_the_square_of_tokens() -> None:
    def of(layers: int) -> Any:
        return recipe(streams={"text": Stream(Words(layers=layers, causal=True))}, objectives={"next": NextToken()})

    one, two, four = (workload(of(layers), np.array([[1000], [2000]])) for layers in (1, 2, 4))
    assert two[0] - one[0] == pytest.approx((four[0] - two[0]) / 2)
    assert 2 * one[0] < one[1] < 4 * one[0]


def _hands(rank: int, world: int) -> tuple[list[Hand], int]:
    source = Samples([{"text": "a red cat " * (i % 7 + 1)} if i % 5 else {} for i in range(40)])
    of = recipe(streams={"text": Stream(Words(causal=True))}, objectives={"next": NextToken()})
    looked = 0
    peek = source.peek

    def counted(index: int) -> Any:
        nonlocal looked
        looked += 1
        return peek(index)

    source.peek = counted  # type: ignore[method-assign]
    with launched(Config(batch=8)) as (peers, _):
        dealer = Dealer(source, collator(of, source), peers, lambda lengths: lengths.sum(1).astype(float))
        return dealer.hands([np.arange(0, 20), np.arange(20, 40)]), looked


def test_ranks_come_to_the_same_result_and_look_at_their_share() -> None:
    found = ranks.run(4, _hands)
    for batch in range(2):
        hands = [hands[batch] for hands, _ in found]
        assert sorted(np.concatenate([hand.places for hand in hands]).tolist()) == list(range(20))
        for hand in hands:
            assert hand.present["text"].tolist() == [(20 * batch + i) % 5 != 0 for i in range(20)]
    assert [looked for _, looked in found] == [10] * 4


def _roster(rank: int, world: int) -> tuple[Roster, torch.Tensor, torch.Tensor]:
    with launched(Config(batch=8)) as (peers, _):
        places = [[4, 0], [-1], [3, 1, 2]][rank]
        concepts = torch.tensor([10 + place for place in places])
        found = Roster.of(
            concepts, {"text": torch.tensor([max(place, 0) for place in places])}, places, peers, (2, 1, 3)
        )
        mine = torch.tensor([[float(place)] for place in places], requires_grad=True)
        rows = found.rows(mine)
        (rows * torch.arange(5.0)[:, None]).sum().backward()
        assert mine.grad is not None
        return dataclasses.replace(found, ranks=ALONE), rows.detach(), mine.grad


def test_a_roster_is_in_the_order_of_the_batch() -> None:
    found = ranks.run(3, _roster)
    for roster, rows, _ in found:
        assert roster.concepts.tolist() == [10, 11, 12, 13, 14]
        assert roster.owners.tolist() == [0, 2, 2, 2, 0]
        assert roster.lengths["text"].tolist() == [0, 1, 2, 3, 4] and roster.tokens == 10
        assert roster.present("text").tolist() == [False, True, True, True, True]
        assert rows.flatten().tolist() == [0, 1, 2, 3, 4]
    assert [roster.mine.tolist() for roster, _, _ in found] == [[4, 0], [-1], [3, 1, 2]]
    assert [gradient.flatten().tolist() for _, _, gradient in found] == [[12, 0], [0], [9, 3, 6]], (
        "3 ranks' mean is 1/3"
    )


def test_one_process_exchanges_nothing() -> None:
    assert isinstance(ALONE, Ranks) and ALONE.leads and ALONE.size == 1
    assert ALONE.of_leader(lambda: 3) == 3 and ALONE.objects("x") == ["x"]
    assert ALONE.table([1, 2]).tolist() == [[1, 2]]
    x = torch.ones(2, 1)
    assert ALONE.rows(x, [2]) is x and ALONE.dealt(x, [2], [2]) is x
