"""Perplexity, and the n-grams beside it, against definitions in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmkernels.pretrain.data import BrokenLog, Collator, Sample, Source
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.metrics import HeldOut, Perplexity
from mmkernels.pretrain.metrics.perplexity import Bigrams
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer

VOCABULARY = 7


def pairs(n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    before = random.integers(0, 5, n)
    return before, (before + random.integers(0, 3, n)) % 6  # tokens 5 and 6 never come before, 6 never after


def test_probabilities_add_up() -> None:
    counted, every = Bigrams(*pairs(), VOCABULARY), np.arange(VOCABULARY)
    assert np.exp(counted.unigram(every)).sum() == pytest.approx(1)
    for before in range(VOCABULARY):
        assert np.exp(counted.bigram(np.full(VOCABULARY, before), every)).sum() == pytest.approx(1)


def test_kneser_ney_by_its_definition() -> None:
    before, after = pairs()
    counted, seen = Bigrams(before, after, VOCABULARY), Counter(zip(before.tolist(), after.tolist(), strict=True))
    once, twice = (sum(times == n for times in seen.values()) for n in (1, 2))
    assert once and twice
    discount = once / (once + 2 * twice)
    for v in range(VOCABULARY):
        total = sum(times for pair, times in seen.items() if pair[0] == v)
        kinds = sum(pair[0] == v for pair in seen)
        for w in range(VOCABULARY):
            backed = (sum(pair[1] == w for pair in seen) + 1) / (len(seen) + VOCABULARY)
            own = max(seen[v, w] - discount, 0) / total + discount * kinds / total * backed if total else backed
            assert math.exp(counted.bigram(np.array([v]), np.array([w]))[0]) == pytest.approx(own)
    single = Counter(after.tolist())
    assert math.exp(counted.unigram(np.array([2]))[0]) == pytest.approx((single[2] + 1) / (60 + VOCABULARY))


class Lines(Source):
    fields = ("text",)

    def __init__(self, lines: list[str]) -> None:
        self.lines, self.concepts = lines, np.arange(len(lines))
        self.broken = BrokenLog(len(lines), 0.0)

    def __getitem__(self, index: int) -> Sample:
        return Sample({"text": self.lines[index]} if self.lines[index] else {}, index, str(index))

    def name(self, index: int) -> str:
        return str(index)


class Uniform(torch.nn.Module):
    """A next-token objective that knows nothing."""

    stream = "text"

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary

    def logits(self, batch: Any) -> Any:
        labels = batch["text"].next_labels()
        targets = labels[labels >= 0]
        return torch.zeros(len(targets), self.vocabulary), targets

    def owners(self, batch: Any) -> Any:
        lengths = batch["text"].cu_seqlens.diff().long()
        return torch.arange(len(lengths)).repeat_interleave(lengths)[batch["text"].next_labels() >= 0]


def test_figures() -> None:
    """Of a uniform model, the vocabulary; a bigram model beats unigrams where the next word follows from the last."""
    lines = ["one two three four", "two three four one", "three four one two", ""] * 5
    tokenizer = TextTokenizer.train(lines, 310)
    source = Lines(lines)
    collator = Collator({"text": Stream(Words(layers=0, causal=True))}, tokenizer)
    held_out = HeldOut("x", source, collator, torch.device("cpu"), source)
    model = SimpleNamespace(objectives={"words": Uniform(len(tokenizer))}, whole=lambda batch, objective: batch)
    ours, bigrams = Perplexity("words").measure(model, held_out)
    assert ours.value == pytest.approx(len(tokenizer))
    assert 1 < bigrams.value < ours.chance < ours.value
    assert not Perplexity("words").measure(model, HeldOut("x", Lines([""]), collator, torch.device("cpu"), source))


def test_an_objective_of_other_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = TextTokenizer.train(["one two"], 310)
    source = Lines(["one two"])
    held_out = HeldOut("x", source, Collator({"text": Stream(Words(layers=0))}, tokenizer), torch.device("cpu"), source)
    masked = Uniform(len(tokenizer))
    monkeypatch.setattr(masked, "logits", lambda batch: (torch.zeros(1, len(tokenizer)), torch.tensor([40])))
    for objective in (masked, torch.nn.Module()):
        model = SimpleNamespace(objectives={"words": objective}, whole=lambda batch, objective: batch)
        with pytest.raises(ValueError, match="expected an objective of next tokens, got 'words'"):
            Perplexity("words").measure(model, held_out)
