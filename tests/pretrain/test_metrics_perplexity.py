"""Perplexity, and the n-grams beside it, against definitions in plain Python."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain.small_model import TOKENIZER, Samples, built, held_out, recipe

from mmkernels.pretrain.data import BrokenLog, Collator, Sample, Source, Text
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.metrics import HeldOut, Perplexity
from mmkernels.pretrain.metrics.perplexity import Bigrams
from mmkernels.pretrain.objectives import MaskedTokens, NextToken
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import BOS, EOS, TextTokenizer
from mmkernels.pretrain.views import MaskWords

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

    def followed(self, batch: Any) -> Any:
        labels = batch["text"].next_labels()
        return torch.nonzero(labels >= 0).flatten(), labels[labels >= 0]

    def logits(self, batch: Any) -> Any:
        _, targets = self.followed(batch)
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
    sets = HeldOut("x", source, collator, torch.device("cpu"), source)
    model = SimpleNamespace(objectives={"words": Uniform(len(tokenizer))}, whole=lambda batch, objective: batch)
    ours, bigrams = Perplexity("words").measure(model, sets)
    assert ours.value == pytest.approx(len(tokenizer))
    assert 1 < bigrams.value < ours.chance < ours.value
    assert not Perplexity("words").measure(model, HeldOut("x", Lines([""]), collator, torch.device("cpu"), source))


def test_masked_words() -> None:
    """The same words are asked of the n-grams; the one before is the right one, also where it is masked."""
    stream = Stream(Words(layers=1), views=(MaskWords(0.5),))
    of = recipe(streams={"text": stream}, objectives={"words": MaskedTokens()})
    lines = [f"{a} {b} {c}" for a in ("red", "blue") for b in ("cat", "dog", "hat") for c in ("runs", "sits")]
    source = Samples([{"text": line} for line in lines])
    model, sets = built(of, source).eval().float(), held_out(of, source, source)
    with torch.no_grad():
        ours, bigrams = Perplexity("words").measure(model, sets)
        ids = [[BOS, *TOKENIZER.encode(line), EOS] for line in lines]
        before, after = (np.array([t for line in ids for t in line[part]]) for part in (slice(0, -2), slice(1, -1)))
        counted = Bigrams(before, after, len(TOKENIZER))
        losses, of_bigrams, of_unigrams = [], [], []
        for batch in sets.batches("loss"):
            chunk = model.whole(batch, "words")
            logits, targets = model.objectives["words"].logits(chunk)
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
            rows = torch.nonzero(batch["text"].labels >= 0).flatten().tolist()
            whole = [token for item in batch.numbers for token in ids[item]]
            of_bigrams += [counted.bigram(np.array([whole[r - 1]]), np.array([whole[r]]))[0] for r in rows]
            of_unigrams += [counted.unigram(np.array([whole[r]]))[0] for r in rows]
    assert ours.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert bigrams.value == pytest.approx(math.exp(-np.mean(of_bigrams)))
    assert ours.chance == bigrams.chance == pytest.approx(math.exp(-np.mean(of_unigrams)))


@pytest.mark.parametrize("masked", [False, True])
def test_every_text_of_a_training_sample_is_counted(masked: bool) -> None:
    """As if each were a sample of its own; of a held-out sample the first is asked for."""
    each = ["a red cat", "a blue dog", "red cat a", "blue dog a blue cat"]
    train = Samples([{"text": Text((each[0], *each[2:]), ("dog",))}, {}, {"text": each[1]}])
    alone = Samples([{"text": text} for text in each])
    held = Samples([{"text": Text(("a blue cat", "dog dog dog"))}, {"text": "a red dog"}])
    stream = Stream(Words(layers=1, causal=not masked), views=(MaskWords(0.5),) if masked else ())
    of = recipe(streams={"text": stream}, objectives={"words": MaskedTokens() if masked else NextToken("text")})
    model = built(of, held).eval().float()
    with torch.no_grad():
        found = Perplexity("words").measure(model, held_out(of, train, held))
        assert found == Perplexity("words").measure(model, held_out(of, alone, held))
        first = Samples([{"text": text} for text in each[:2]])
        assert found != Perplexity("words").measure(model, held_out(of, first, held))
        assert found[0].value == Perplexity("words").measure(model, held_out(of, first, held))[0].value
        limited = Perplexity("words", texts=1).measure(model, held_out(of, train, held))
        rest = Samples([{"text": text} for text in (each[0], *each[2:])])
        assert limited == Perplexity("words").measure(model, held_out(of, rest, held)), "the limit is one of samples"


def test_an_objective_of_other_things() -> None:
    model = SimpleNamespace(objectives={"words": torch.nn.Module()})
    for name in ("words", "none"):
        with pytest.raises(ValueError, match=f"expected an objective of next or masked tokens, got '{name}'"):
            Perplexity(name).measure(model, None)  # type: ignore[arg-type]
