"""Groups, zero-shot, precision and calibration, alignment, re-ranking: on predictions and vectors that are known."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain.small_model import Samples, built, collator, held_out, recipe
from sklearn.metrics import precision_recall_fscore_support
from torch import Tensor

from mmkernels.pretrain.data import Regions as RegionValues
from mmkernels.pretrain.data import Sample, Text
from mmkernels.pretrain.encoders import Module, Regions, Words
from mmkernels.pretrain.fusion import Cross, Merged
from mmkernels.pretrain.metrics import (
    Alignment,
    Classified,
    Grounding,
    Groups,
    HeldOut,
    Matched,
    Reranked,
    Retrieval,
    ZeroShot,
)
from mmkernels.pretrain.metrics.alignment import uniformity
from mmkernels.pretrain.metrics.base import Each
from mmkernels.pretrain.metrics.judged import Judged
from mmkernels.pretrain.metrics.pairs import pairs_of
from mmkernels.pretrain.metrics.reranked import drawn
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objectives import Contrast, MaskedTokens, Matching
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskWords, Swap


class Known:
    """A metric whose values are given."""

    def __init__(self, each: Each | None) -> None:
        self.given = each

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        return self.given


def grouped(kinds: list[int]) -> Any:
    source = Samples([{} if kind < 0 else {"kind": kind} for kind in kinds], classes={"kind": ("x", "y", "z")})
    return SimpleNamespace(source=source, train=source)


def test_groups_and_the_gap_between_them() -> None:
    """Two answers of each sample; a sample without a group is in none, a small group is not compared."""
    kinds = [0] * 40 + [1] * 40 + [2] * 3 + [-1] * 5
    items = np.repeat(np.arange(88), 2)
    right = np.where(np.repeat(kinds, 2) == 0, np.arange(176) % 4 != 0, np.arange(176) % 4 == 0)
    each = Each("answer: accuracy", right, items, items, targets=np.arange(176) % 2)
    figures = {f.name: f for f in Groups(Known(each), "kind").measure(None, grouped(kinds))}
    names = [f"answer: accuracy, kind {name}" for name in "xyz"]
    gap = figures.pop("answer: accuracy: gap between the best and the worst kind")
    assert list(figures) == names
    assert [figures[name].value for name in names] == [0.75, 0.25, pytest.approx(1 / 6, abs=0.2)]
    assert all(figures[name].chance == 0.5 for name in names)
    assert gap.value == 0.5 and not gap.higher_is_better
    assert gap.low is not None and gap.high is not None and 0.3 < gap.low < 0.5 < gap.high < 0.7
    assert gap.chance is not None and 0.02 < gap.chance < 0.15, "shuffled groups differ by accident alone"
    assert gap.low > gap.chance


def test_groups_of_nothing_or_one() -> None:
    assert Groups(Known(None), "kind").measure(None, grouped([])) == []
    each = Each("a", np.ones(30), np.arange(30), np.arange(30), guess=0.1)
    one = Groups(Known(each), "kind").measure(None, grouped([1] * 30))
    assert [f.name for f in one] == ["a, kind y"] and one[0].chance == 0.1
    assert Groups(Known(each), "colour").measure(None, grouped([1] * 30)) == []
    with pytest.raises(ValueError, match="of: expected a metric that judges samples one by one, got Alignment"):
        Groups(Alignment(), "kind")
    with pytest.raises(ValueError, match="label: expected a label field"):
        Groups(Retrieval(), "")


def guessed(n: int, classes: int) -> Judged:
    random = np.random.default_rng(0)
    targets = random.integers(classes - 1, size=n)  # the last class never occurs
    guesses = np.where(random.random(n) < 0.6, targets, random.integers(classes, size=n))
    return Judged(np.arange(n) // 2, np.arange(n) // 2, targets, guesses, random.random(n), np.zeros(n), classes)


def test_precision_recall_f1_as_scikit_learn_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    found = guessed(500, 7)
    monkeypatch.setattr("mmkernels.pretrain.metrics.classified.judged", lambda *_: found)
    *figures, _ = Classified("kind").measure(None, None)  # type: ignore[arg-type]
    options: Any = {"average": "macro", "zero_division": 0}
    expected = precision_recall_fscore_support(found.targets, found.guesses, **options)[:3]
    most = np.full_like(found.targets, np.bincount(found.targets).argmax())
    chance = precision_recall_fscore_support(found.targets, most, **options)[:3]
    assert [f.value for f in figures] == pytest.approx(expected)
    assert [f.chance for f in figures] == pytest.approx(chance)
    for figure in figures:
        assert figure.low is not None and figure.high is not None
        assert figure.low < figure.value < figure.high < figure.low + 0.2


def test_calibration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sure by 0.9 and right in half of the cases, by 0.2 and right in a tenth: .5 * .4 + .5 * .1."""
    right = np.array([1, 0] * 10 + [1, 0, 0, 0, 0, 0, 0, 0, 0, 0] * 2)
    confidence = np.array([0.9] * 20 + [0.2] * 20)
    found = Judged(np.arange(40), np.arange(40), np.ones(40, np.int64), right, confidence, np.zeros(40), 4)
    monkeypatch.setattr("mmkernels.pretrain.metrics.classified.judged", lambda *_: found)
    error = Classified("kind").measure(None, None)[-1]  # type: ignore[arg-type]
    assert error.value == pytest.approx(0.5 * 0.4 + 0.5 * 0.1)
    assert error.chance == pytest.approx(0.3 - 0.25) and not error.higher_is_better
    sure = found._replace(confidence=np.ones(40), targets=right)
    monkeypatch.setattr("mmkernels.pretrain.metrics.classified.judged", lambda *_: sure)
    assert Classified("kind").measure(None, None)[-1].value == 0.0  # type: ignore[arg-type]


def test_a_wrong_objective_is_named() -> None:
    model = SimpleNamespace(objectives={"contrast": object()})
    with pytest.raises(ValueError, match=r"objective: expected one that chooses among classes \(none\), got 'words'"):
        Classified("words").measure(model, None)  # type: ignore[arg-type]


def test_uniformity_and_alignment_against_every_pair() -> None:
    x = F.normalize(torch.randn(700, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)
    every = torch.exp(-2 * torch.pdist(x).square()).mean().log().item()
    assert uniformity(x) == pytest.approx(every)
    assert uniformity(torch.ones(9, 2).double()) == pytest.approx(0.0)


def towers() -> Recipe:
    """Vectors, and words."""
    return recipe(
        streams={"vector": Stream(Module(torch.nn.Identity, out=4)), "text": Stream(Words())},
        fusion=Cross(into=("text",), context="vector", layers=1),
        objectives={"contrast": Contrast("vector", "text"), "matching": Matching("vector", "text")},
    )


def pairs(n: int) -> Samples:
    random = np.random.default_rng(1)
    rows = [{"vector": random.standard_normal(4).astype(np.float32), "text": Text((f"thing {i}",))} for i in range(n)]
    return Samples(rows, classes={"kind": ("cat", "dog")})


def test_alignment() -> None:
    source = pairs(6)
    model, sets = built(towers(), source).float().eval(), held_out(towers(), source, source)
    with torch.no_grad():
        aligned, *_ = Alignment("vector", "text").measure(model, sets)
        batch = collator(towers(), source)([source[i] for i in range(6)], range(6), mode="plain")
        a, b = (model.encoder(name).embeddings(batch[name]).double() for name in ("vector", "text"))
    assert aligned.value == pytest.approx((a - b).square().sum(1).mean().item(), rel=1e-5)
    assert aligned.chance == pytest.approx(torch.cdist(a, b).square().mean().item(), rel=1e-5)
    assert Alignment("vector", "text").measure(model, held_out(towers(), source, pairs(1))) == []


def test_zero_shot_by_concept_and_by_label() -> None:
    """Against the mean of the phrases. A sample without a class and a concept without a text are left out."""
    source = pairs(8)
    source.concepts = np.array([0, 1, 2, 3, 4, 4, 5, 6])
    del source.values[6]["text"]
    for i in range(6):
        source.values[i]["kind"] = i % 2
    model, sets = built(towers(), source).float().eval(), held_out(towers(), source, source)
    part = ZeroShot("vector", "text", templates=("{}", "a {}"))

    def embedded(stream: str, rows: list[dict[str, Any]]) -> Tensor:
        some = Samples(rows)
        batch = collator(towers(), some)([some[i] for i in range(len(rows))], range(len(rows)), mode="plain")
        return model.encoder(stream).embeddings(batch[stream])

    def expected(names: list[str]) -> Tensor:
        each = [embedded("text", [{"text": Text((t.format(n),))} for n in names]) for t in part.templates]
        return embedded("vector", source.values) @ F.normalize(sum(each), dim=1).T

    with torch.no_grad():
        (concept,) = part.measure(model, sets)
        nearest = expected(["thing 0", "thing 1", "thing 2", "thing 3", "thing 4", "thing 7"]).argmax(1)
        right = [int(nearest[i]) == at for i, at in enumerate([0, 1, 2, 3, 4, 4, None, 5]) if at is not None]
        assert concept.value == pytest.approx(np.mean(right)) and concept.chance == pytest.approx(2 / 7)
        (kind,) = ZeroShot("vector", "text", "kind", part.templates).measure(model, sets)
        nearest = expected(["cat", "dog"]).argmax(1)[:6]
        assert kind.value == pytest.approx(float((nearest == torch.tensor([0, 1] * 3)).double().mean()))
        assert kind.chance == 0.5
        assert part.measure(model, held_out(towers(), source, pairs(0))) == []
    with pytest.raises(ValueError, match=r"templates: expected phrases with one \{\} each"):
        ZeroShot(templates=("a picture",))


def test_candidates_are_judged_one_by_one() -> None:
    """Against a fusion of each pair alone, beside the similarity by which wrong pairs are drawn."""
    of, source = towers(), pairs(7)
    source.concepts = np.array([0, 1, 2, 2, 3, 4, 5])
    model, sets = built(of, source).float().eval(), held_out(of, source, source)
    with torch.no_grad():
        plain, better = Reranked("matching", candidates=3).measure(model, sets)
        batch = collator(of, source)([source[i] for i in range(7)], range(7), mode="plain")
        a, b = (model.encoder(name).embeddings(batch[name]) for name in ("vector", "text"))
        answers = [0, 1, 2, 4, 5, 6]
        right, first = [], []
        for i in range(7):
            nearest = [answers[j] for j in (a[i] @ b[answers].T).topk(3).indices.tolist()]
            scores = []
            for j in nearest:
                pair = Samples([{"vector": source.values[i]["vector"], "text": source.values[j]["text"]}])
                chunk = model.whole(collator(of, pair)([pair[0]], [0], mode="plain"), "matching")
                pooled = chunk.fused["text"].x.mean(0, keepdim=True)
                wrong, matched = model.objectives["matching"].head(pooled)[0].tolist()
                scores.append(matched - wrong + of.objectives["matching"].scale * float(a[i] @ b[j]))
            chosen = nearest[int(np.argmax(scores))]
            right.append(source.concepts[chosen] == source.concepts[i])
            first.append(source.concepts[nearest[0]] == source.concepts[i])
    assert better.value == pytest.approx(np.mean(right)) and plain.value == pytest.approx(np.mean(first))
    assert better.chance == pytest.approx(1 / 6) and math.isclose(plain.chance or 0, 1 / 6)
    assert better.headline and not plain.headline
    assert [plain.name, better.name] == ["vector → text, nearest R@1", "vector → text, re-ranked R@1"]
    two = dataclasses.replace(of, objectives={**of.objectives, "again": Matching("vector", "text")})
    with torch.no_grad():
        figures = Reranked("again").measure(built(two, source).float().eval(), held_out(two, source, source))
    assert [f.name for f in figures] == [f"again: {name}" for name in (plain.name, better.name)]
    with pytest.raises(
        ValueError, match=r"objective: expected one that scores pairs in a fusion \(matching\), got 'contrast'"
    ):
        Reranked("contrast").measure(model, sets)


TAGS = {"tag": ("cat", "dog", "hat")}


def single() -> Recipe:
    """Words and regions in one stream."""
    return recipe(
        streams={"text": Stream(Words(layers=0), views=(Swap(),)), "regions": Stream(Regions(side=2))},
        fusion=Merged(("text", "regions"), layers=1),
        objectives={"matching": Matching("regions", "text", read="merged", negatives="swapped")},
    )


def objects(tags: list[list[int]]) -> Samples:
    random = np.random.default_rng(2)
    rows = []
    for i, own in enumerate(tags):
        boxes, crops = random.random((len(own), 4)), random.integers(0, 255, (len(own), 2, 2, 3), np.uint8)
        shown = RegionValues(boxes.astype(np.float32), crops, np.array(own, np.int64))
        rows.append({"regions": shown, "text": Text((f"thing {i}",))})
    return Samples(rows, classes=TAGS)


def matched(model: Model, of: Recipe, row: dict[str, Any]) -> float:
    """What the objective says of one sample alone."""
    one = Samples([row], classes=TAGS)
    chunk = model.whole(collator(of, one)([one[0]], [0], mode="plain"), "matching")
    wrong, right = model.objectives["matching"].head(chunk.fused["merged"].x.mean(0, keepdim=True))[0].tolist()
    return float(right - wrong)


def test_matched_against_each_pair_alone() -> None:
    of, source = single(), objects([[0], [1, 2], [2], [0, 0], [1]])
    source.concepts = np.array([0, 1, 2, 2, 3])
    model, sets = built(of, source).float().eval(), held_out(of, source, source)
    others = drawn(source.concepts, 2)
    assert others is not None and others.shape == (5, 2)
    assert all(source.concepts[j] != source.concepts[i] for i, row in enumerate(others) for j in row)
    with torch.no_grad():
        (figure,) = Matched("matching", candidates=3).measure(model, sets)
        right = []
        for i in range(5):
            texts = [source.values[j]["text"] for j in (i, *others[i])]
            own, *rest = (matched(model, of, {**source.values[i], "text": text}) for text in texts)
            right.append(own > max(rest))
    assert figure.value == pytest.approx(np.mean(right)) and figure.chance == pytest.approx(1 / 3)
    assert Matched("matching").measure(model, held_out(of, source, objects([[0]]))) == []


def test_masked_words_tell_pairs_apart() -> None:
    """By the mean log probability of a text's masked words beside another's regions."""
    of = recipe(
        streams={"text": Stream(Words(layers=0), views=(MaskWords(0.4),)), "regions": Stream(Regions(side=2))},
        fusion=Merged(("text", "regions"), layers=1),
        objectives={"words": MaskedTokens("text")},
    )
    source = objects([[0], [1, 2], [2]])
    model = built(of, source).float().eval()
    with torch.no_grad():
        found = pairs_of(model, held_out(of, source, source), "words", 10)
        assert found is not None
        a, b = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 1])
        scores = found.scores({"text": a, "regions": b})
        objective = model.objectives["words"]
        for score, i, j in zip(scores.tolist(), a.tolist(), b.tolist(), strict=True):
            samples = [source[k] for k in range(3)]  # each in its place, since masks are drawn by it
            samples[i] = Sample({**source.values[i], "regions": source.values[j]["regions"]}, i, "")
            chunk = model.whole(collator(of, source)(samples, range(3), mode="loss", objective="words"), "words")
            logits, targets = objective.logits(chunk)
            own = objective.owners(chunk) == i
            assert score == pytest.approx(-F.cross_entropy(logits[own], targets[own]).item(), rel=1e-4)


def test_grounding_against_each_region_alone() -> None:
    of, source = single(), objects([[0, 1, 0], [2], [1, 2], [2, 2]])
    model, sets = built(of, source).float().eval(), held_out(of, source, source)
    with torch.no_grad():
        (figure,) = Grounding("matching", template="a {}").measure(model, sets)
        right = []
        for i, kind in ((0, 0), (0, 1), (2, 1), (2, 2)):
            shown, phrase = source.values[i]["regions"], Text((f"a {TAGS['tag'][kind]}",))
            each = [RegionValues(*(part[r : r + 1] for part in shown)) for r in range(len(shown.tags))]
            scores = [matched(model, of, {"text": phrase, "regions": region}) for region in each]
            right.append(shown.tags[int(np.argmax(scores))] == kind)
    assert figure.value == pytest.approx(np.mean(right))
    assert figure.chance == pytest.approx(np.mean([2 / 3, 1 / 3, 1 / 2, 1 / 2]))
    assert Grounding("matching").measure(model, held_out(of, source, objects([[1], [2, 2]]))) == []


def test_a_region_with_an_unknown_tag_is_not_asked_about() -> None:
    """It is no object of any class: neither the last one nor one that names lack; preferring it is wrong."""
    of, known = single(), objects([[0, 1, 0], [1, 2]])
    source = objects([[0, 1, 0], [1, 2], [-100, 2], [-100, -100]])
    for have, row in zip(known.values, source.values, strict=False):
        row |= have
    boxes, crops, tags = source.values[0]["regions"]
    model, part = built(of, source).float().eval(), Grounding("matching", template="a {}")
    with torch.no_grad():
        before = part.measure(model, held_out(of, known, known))
        assert part.measure(model, held_out(of, known, source)) == before
        source.values[0]["regions"] = RegionValues(boxes, crops, np.where(tags == 0, -100, tags))
        source.values[1]["regions"] = RegionValues(*(part[:1] for part in source.values[1]["regions"]))
        assert part.measure(model, held_out(of, known, source)) == []
        tags[2] = -100
        source.values[0]["regions"] = RegionValues(boxes, crops, tags)
        (figure,) = part.measure(model, held_out(of, known, source))
    assert figure.chance == pytest.approx(1 / 3), "each of two kinds is one region of three"
