"""Span corruption: input and target together are the text."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.data.collate import Collator
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import BOS, EOS, SPECIAL, TextTokenizer, sentinel
from mmkernels.pretrain.views import CorruptSpans

FIRST = len(SPECIAL)
SENTINELS = {sentinel(n) for n in range(32)}


def text(words: int) -> Piece:
    ids = torch.tensor([BOS, *range(FIRST, FIRST + words), EOS] if words else [], dtype=torch.int64)
    return Piece(ids, ids)


def corrupted(pieces: list[Piece], seed: int = 0, **options: Any) -> list[tuple[list[int], list[int]]]:
    """(input, target) of each."""
    both = []
    for part in ("input", "target"):
        draws = Draws(seed, 3, "text/CorruptSpans/0", np.arange(len(pieces)))
        both.append([piece.tokens.tolist() for piece in CorruptSpans(part=part, **options)(pieces, draws, {})])
    return list(zip(*both, strict=True))


def filled(given: list[int], target: list[int]) -> list[int]:
    """The text again: each sentinel of the input replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in target[1:-1]:
        if token in SENTINELS:
            spans[token] = []
            last = token
        else:
            spans[last].append(token)
    return [word for token in given for word in spans.get(token, [token])]


@pytest.mark.parametrize("options", [{}, {"share": 0.5, "mean": 1.0}, {"share": 0.9, "mean": 8.0}, {"share": 1.0}])
def test_both_parts_together_are_the_text(options: dict[str, float]) -> None:
    pieces = [text(n) for n in (1, 2, 3, 7, 20, 60) for _ in range(20)]
    for piece, (given, target) in zip(pieces, corrupted(pieces, **options), strict=True):
        assert filled(given, target) == piece.tokens.tolist()
        assert target[0] == BOS and target[-1] == EOS
        marks = [token for token in given if token in SENTINELS]
        assert marks == [sentinel(n) for n in range(len(marks))] == [t for t in target if t in SENTINELS]
        touching = [pair for pair in pairwise(given) if set(pair) <= SENTINELS]
        assert not touching, "two spans without a word between them are one"


def test_share_and_mean() -> None:
    pieces = [text(100)] * 200
    found = corrupted(pieces, share=0.15, mean=3.0)
    hidden = [sum(token >= FIRST for token in target) for _, target in found]
    spans = [sum(token in SENTINELS for token in target) for _, target in found]
    assert set(hidden) == {15} and set(spans) == {5}
    places = np.zeros(100)
    for given, _ in found:
        places[sorted({*range(100)} - {token - FIRST for token in given if token >= FIRST})] += 1
    assert places.min() > 0, "beginning and end are hidden too"


def test_draws_belong_to_the_sample_and_the_step() -> None:
    pieces = [text(50)] * 4
    assert corrupted(pieces) == corrupted(pieces)
    assert corrupted(pieces)[:2] == corrupted(pieces[:2])
    assert len({tuple(given) for given, _ in corrupted(pieces)}) == 4
    assert corrupted(pieces, seed=1) != corrupted(pieces)


def test_a_sample_without_the_text_stays_without() -> None:
    for part in ("input", "target"):
        (piece,) = CorruptSpans(part=part)([text(0)], Draws(0, 0, "x", np.arange(1)), {})
        assert len(piece.tokens) == 0


def test_labels_are_the_targets() -> None:
    draws = Draws(0, 0, "x", np.arange(1))
    (given,), (target,) = (CorruptSpans(part=part)([text(20)], draws, {}) for part in ("input", "target"))
    assert given.labels is None
    assert torch.equal(target.labels, target.tokens)


def test_lengths_are_bounds() -> None:
    for words in range(1, 200):
        piece = text(words)
        for options in ({}, {"share": 0.7, "mean": 1.0}):
            ((given, target),) = corrupted([piece], **options)
            assert len(given) <= CorruptSpans(part="input", **options).length(words + 2)
            bound = CorruptSpans(part="target", **options).length(words + 2)
            assert len(target) <= bound <= len(target) + 4
    assert CorruptSpans(part="target").length(0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 0.0}, "share: expected 0 <"), ({"mean": 0.5}, "mean: expected"), ({"part": "both"}, "part: expected")],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorruptSpans(**options)


@pytest.mark.parametrize(
    ("words", "view", "message"),
    [
        (Words(), CorruptSpans(part="target", share=0.3), r"streams\.a\.views\.share: expected 0\.3, as in streams\.b"),
        (Words(), CorruptSpans(part="target", salt=1), r"streams\.a\.views\.salt: expected 1, as in streams\.b"),
        (Words(max_tokens=9), CorruptSpans(part="target"), r"streams\.a\.encoder\.max_tokens: expected 9, .* got 128"),
    ],
)
def test_two_parts_that_would_not_fit_are_refused(words: Words, view: CorruptSpans, message: str) -> None:
    own = Stream(Words(), field="text", views=(CorruptSpans(),))
    tokenizer = TextTokenizer.train([], 300)
    with pytest.raises(ValueError, match=message):
        Collator({"a": own, "b": Stream(words, field="text", views=(view,))}, tokenizer)
    Collator({"a": own, "b": Stream(words, field="other", views=(view,))}, tokenizer)
