"""What a swapped sample is labelled as is what it has, whoever holds or cannot read its partner."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from pretrain.small_model import TOKENIZER, Samples, recipe

from mmkernels.pretrain import Config
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data import BatchSampler, Collator, TrainLoader
from mmkernels.pretrain.data.base import BrokenImageError, Sample
from mmkernels.pretrain.data.dealing import Dealer
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.launch import launched
from mmkernels.pretrain.objectives import NextToken
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.views import Captions, Swap

COUNT = 24
Found = dict[int, tuple[int, dict[str, int]]]
"""By the number of a sample: its label, and whose value each stream has."""


class Numbered(Samples):
    """Texts that tell whose they are; some samples cannot be read, and two lack a field."""

    def __init__(self) -> None:
        super().__init__([{"text": word(i), "other": word(i)} for i in range(COUNT)], [i // 2 for i in range(COUNT)])
        self.broken.limit(1.0)
        del self.values[3]["text"], self.values[4]["other"]  # type: ignore[attr-defined]

    def __getitem__(self, index: int) -> Sample:
        if index in (6, 7, 13, 20):
            raise BrokenImageError("torn")
        return super().__getitem__(index)

    def peek(self, index: int) -> Any:
        return self.values[index]


def word(i: int) -> str:
    return "".join("ab"[int(bit)] + "cd"[int(bit)] for bit in f"{i:05b}")


def decoded(batch: Batch) -> Found:
    found: Found = {}
    for i, number in enumerate(batch.numbers):
        streams = {}
        for name, packed in batch.streams.items():
            causal = name == "a"
            own = {tuple(ids_of(word(i), causal)): i for i in range(COUNT)}
            first, end = packed.cu_seqlens_host[i : i + 2]
            if end > first:
                streams[name] = own[tuple(packed.tokens[first:end].tolist())]
        found[number] = int(batch.labels["matched"][i]), streams
    return found


def ids_of(text: str, causal: bool) -> list[int]:
    ids: list[int] = Words(layers=0, causal=causal).prepare([text], TOKENIZER)[0].tokens.tolist()
    return ids


STREAMS = {
    "one": {
        "a": Stream(Words(layers=0, causal=True), field="text", views=(Swap(),)),
        "b": Stream(Words(layers=0), field="other"),
    },
    "two": {
        "a": Stream(Words(layers=0, causal=True), field="text", views=(Swap(),)),
        "b": Stream(Words(layers=0), field="other", views=(Swap(),)),
    },
    "twice": {
        "a": Stream(Words(layers=0, causal=True), field="text", views=(Swap(), Captions(), Swap(0.9, salt=1))),
        "b": Stream(Words(layers=0), field="other"),
    },
    "alike": {
        "a": Stream(Words(layers=0, causal=True), field="text", views=(Swap(),)),
        "b": Stream(Words(layers=0), field="text", views=(Swap(),)),
    },
}


def batches(rank: int, world: int, kind: str) -> list[Found]:
    torch.set_num_threads(1)
    source, streams = Numbered(), STREAMS[kind]
    of = recipe(streams=streams, objectives={"next": NextToken("a")})
    collator = Collator(of.streams, TOKENIZER)
    with launched(Config(batch=12)) as (peers, _):
        dealer = None if world == 1 else Dealer(source, collator, peers, lambda lengths: lengths.sum(1).astype(float))
        loader = TrainLoader(source, BatchSampler(np.arange(COUNT), 12), collator, dealer=dealer)
        return [decoded(dataclasses.replace(next(loader), among=None)) for _ in range(6)]


@pytest.mark.parametrize("kind", STREAMS)
def test_labels_are_true_on_one_rank_and_on_two(kind: str) -> None:
    (one,) = ranks.run(1, batches, kind)
    two = ranks.run(2, batches, kind)
    swapped = 0
    for step, found in enumerate(one):
        for number, (label, streams) in found.items():
            concepts = {which // 2 for which in streams.values()}
            if kind == "alike" and streams:
                assert len(set(streams.values())) == 1, "the same draws, the same partner"
                assert label == int(streams["a"] == number)
                swapped += label == 0
            elif len(streams) == 2:
                assert label == int(len(concepts) == 1), (number, streams)
                swapped += label == 0
                if label:
                    assert set(streams.values()) == {number}
        every: Found = {}
        for each in two:
            every |= {number: told for number, told in each[step].items() if number >= 0}
        assert {n: each for n, each in every.items() if each[1]} == {n: each for n, each in found.items() if each[1]}
    assert swapped > 10
