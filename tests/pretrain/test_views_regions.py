"""Masked regions, and swapped values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.data import Collator, Sample
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import Words
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.region_columns import HIDDEN, columns
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.views import MaskRegions, MaskWords, Swap
from mmkernels.pretrain.views.mask_regions import overlaps


def pieces(counts: list[int]) -> list[Piece]:
    """Regions side by side, with the numbers of the tags 0, 1, ..."""
    made = []
    for n in counts:
        tokens = torch.rand(n, columns(2))
        tokens[:, 0], tokens[:, 2] = torch.arange(n) / 16, (torch.arange(n) + 1) / 16
        tokens[:, 1], tokens[:, 3], tokens[:, HIDDEN] = 0, 1, 0
        made.append(Piece(tokens, torch.arange(n)))
    return made


def draws(n: int, step: int = 0) -> Draws:
    return Draws(0, step, "x", np.arange(n))


def test_masked_regions_are_hidden_and_labelled() -> None:
    given = pieces([8] * 500 + [0, 1])
    out = MaskRegions(share=0.25, keep=0.2)(given, draws(502), {})
    counts: list[int] = []
    chosen = hidden = 0
    for before, after in zip(given, out, strict=True):
        at = after.labels >= 0
        assert (after.labels[at] == before.labels[at]).all()
        assert (after.tokens[:, HIDDEN] <= at).all(), "none is hidden that is not predicted, for none overlap"
        assert (before.tokens[:, HIDDEN] == 0).all(), "the piece itself is unchanged"
        same = torch.arange(columns(2)) != HIDDEN
        assert torch.equal(after.tokens[:, same], before.tokens[:, same])
        chosen, hidden = chosen + int(at.sum()), hidden + int(after.tokens[:, HIDDEN].sum())
        counts.append(int(at.sum()))
    assert chosen == pytest.approx(1001, abs=90), "a quarter; the standard deviation is 27"
    assert np.var(counts[:500]) == pytest.approx(8 * 0.25 * 0.75, rel=0.25), "each on its own"
    assert hidden / chosen == pytest.approx(0.8, abs=0.04)


def test_masks_depend_on_step_and_sample() -> None:
    given = pieces([8, 8, 8])
    first, again, other = (MaskRegions()(given, draws(3, step), {}) for step in (1, 1, 2))
    assert all(torch.equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert any(not torch.equal(a.labels, b.labels) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0].labels, first[1].labels)


def test_what_overlaps_a_hidden_region_is_hidden_too() -> None:
    given = pieces([3])
    given[0].tokens[1, :4] = given[0].tokens[0, :4]  # the same box; the third lies elsewhere
    seen = set()
    for step in range(60):
        (out,) = MaskRegions(share=0.3, keep=0.0)(given, draws(1, step), {})
        chosen = (out.labels >= 0).nonzero().flatten().tolist()
        hidden = out.tokens[:, HIDDEN].nonzero().flatten().tolist()
        assert hidden == [*([0, 1] if {0, 1} & set(chosen) else []), *([2] if 2 in chosen else [])]
        seen.add(tuple(chosen))
    assert {(), (0,), (1,), (2,)} <= seen


def test_overlaps() -> None:
    a = np.array([[0, 0, 2, 2], [0, 0, 0, 0]], np.float32)
    b = np.array([[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2]], np.float32)
    np.testing.assert_allclose(overlaps(a, b), [[1 / 7, 1, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"share": 1.1}, {"keep": -0.1}, {"overlap": 2.0}])
def test_wrong_shares(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
        MaskRegions(**wrong)
    if "share" in wrong and wrong["share"] > 1:
        with pytest.raises(ValueError, match="share: expected a share between 0 and 1"):
            Swap(share=1.1)


def swapped(values: list[Any], concepts: list[int], share: float = 0.5, step: int = 0) -> tuple[list[Any], list[int]]:
    labels = {"concept": np.array(concepts)}
    out = Swap(share)(values, draws(len(values), step), labels)
    return out, labels["matched"].tolist()


def test_half_of_the_values_come_from_another_concept() -> None:
    values, concepts = list(range(400)), [i // 2 for i in range(400)]
    out, matched = swapped(values, concepts)
    for own, got, label in zip(values, out, matched, strict=True):
        assert (label == 1) == (own == got)
        assert label == 1 or concepts[own] != concepts[got]
    assert sum(matched) == pytest.approx(200, abs=40)
    assert len(set(out)) > 250, "partners are spread over the batch"
    assert swapped(values, concepts) == (out, matched)
    assert swapped(values, concepts, step=1) != (out, matched)


def test_absent_values_and_lonely_concepts_are_never_swapped() -> None:
    out, matched = swapped([None, "a", "b", None], [0, 1, 2, 3], share=1.0)
    assert (out, matched) == ([None, "b", "a", None], [-100, 0, 0, -100])
    assert swapped(["a", "b"], [5, 5], share=1.0) == (["a", "b"], [1, 1])
    assert swapped(["a"], [5], share=1.0) == (["a"], [1])
    assert swapped([], []) == ([], [])


def test_two_swapped_fields_match_if_neither_was_swapped() -> None:
    labels = {"concept": np.arange(200)}
    first, second = Swap(0.5, salt=1), Swap(0.5, salt=2)
    a = first(list(range(200)), Draws(0, 0, "a", np.arange(200)), labels)
    b = second(list(range(200)), Draws(0, 0, "b", np.arange(200)), labels)
    assert labels["matched"].tolist() == [int(a[i] == i == b[i]) for i in range(200)]


def test_in_a_batch() -> None:
    """The label is the batch's, concepts are no label of it, and held-out losses use one objective's views alone."""
    tokenizer = TextTokenizer.train(["red green blue"], 300)
    views = (Swap(1.0, when=("matching",)), MaskWords(when=("words",)))
    collator = Collator({"text": Stream(Words(layers=0), views=views)}, tokenizer)
    samples = [Sample({"text": text}, i, text) for i, text in enumerate(("red", "green", "blue"))]
    plain = collator(samples, range(3), mode="plain")
    assert dict(plain.labels) == {}
    assert plain.concepts.tolist() == [0, 1, 2]
    matching = collator(samples, range(3), mode="loss", objective="matching")
    assert matching.labels["matched"].tolist() == [0, 0, 0]
    assert not torch.equal(matching["text"].tokens, plain["text"].tokens)
    words = collator(samples, range(3), mode="loss", objective="words")
    assert dict(words.labels) == {}
    assert (words["text"].labels != plain["text"].labels).any()
