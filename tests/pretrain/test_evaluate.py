"""Recall against brute force, and where a careless count would be too high."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import comb

import numpy as np
import pytest
import torch
from pretrain.runs import TINY

from mmkernels.pretrain import Config, Facts
from mmkernels.pretrain.data import BrokenLog, Collator, Sample, Source
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.metrics import HeldOut, NearestNeighbours, Retrieval
from mmkernels.pretrain.metrics.retrieval import KS, Embedded, embed, ranks
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.tokenizer import TextTokenizer


def brute_force(embedded: Embedded, k: int) -> tuple[float, float]:
    """Sort every gallery; a query counts if its answer is among the first k."""
    scores = (embedded.a @ embedded.b.T).numpy()
    targets = embedded.targets.tolist()
    images = [targets[i] in np.argsort(-scores[i])[:k] for i in range(len(targets))]
    captions = [j in {targets[i] for i in np.argsort(-scores[:, j])[:k]} for j in range(scores.shape[1])]
    return float(np.mean(images)), float(np.mean(captions))


def embedded(images: int, captions: int) -> Embedded:
    targets = torch.cat([torch.arange(captions), torch.randint(captions, (images - captions,))])
    anchors = torch.randn(captions, 8, dtype=torch.float64)
    near = anchors[targets] + 2.0 * torch.randn(images, 8, dtype=torch.float64)
    return space_of(near, anchors, targets)


def space_of(a: torch.Tensor, b: torch.Tensor, targets: torch.Tensor) -> Embedded:
    return Embedded(a, b, targets, list(range(len(a))), list(range(len(b))))


@pytest.mark.parametrize(("images", "captions"), [(40, 40), (90, 30), (1200, 700)])
def test_brute_force(images: int, captions: int) -> None:
    space = embedded(images, captions)
    of_images, of_captions = ranks(space)
    for k in KS:
        expected = brute_force(space, k)
        assert 0 < expected[0] < 1
        assert (of_images < k).double().mean().item() == pytest.approx(expected[0])
        assert (of_captions < k).double().mean().item() == pytest.approx(expected[1])


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_a_collapsed_or_broken_model_finds_nothing(value: float) -> None:
    space = space_of(torch.full((50, 4), value), torch.full((50, 4), value), torch.arange(50))
    for rank in ranks(space):
        assert rank.shape == (50,) and bool((rank >= KS[-1]).all())


def test_ties_count_as_wrong_answers_before_the_right_one() -> None:
    """Against counting, with scores that agree often."""
    random = torch.Generator().manual_seed(0)
    a = torch.randint(-2, 3, (300, 3), generator=random).float()
    b = torch.randint(-2, 3, (40, 3), generator=random).float()
    space = space_of(a, b, torch.cat([torch.arange(40), torch.randint(40, (260,), generator=random)]))
    right = space.targets[:, None] == torch.arange(40)
    for rank, scores, of in zip(ranks(space), (a @ b.T, (a @ b.T).T), (right, right.T), strict=True):
        best = scores.masked_fill(~of, -torch.inf).amax(1, keepdim=True)
        counted = ((scores >= best) & ~of).sum(1)
        for k in KS:
            assert (rank < k).tolist() == (counted < k).tolist()
        assert 0 < int((counted < 10).sum()) < len(counted)


def test_several_right_images() -> None:
    space = space_of(torch.tensor([[0.9, 0], [0.8, 0], [0, 1.0]]), torch.eye(2), torch.tensor([0, 0, 1]))
    assert ranks(space)[1].tolist() == [0, 0]
    space = space_of(torch.tensor([[0.1, 0], [0.8, 0], [0.9, 1.0]]), torch.eye(2), torch.tensor([0, 0, 1]))
    assert ranks(space)[1].tolist() == [1, 0]
    assert ranks(space)[0].tolist() == [0, 0, 0]


class Pictures(Source):
    """Random pictures of `concepts` things, the first of each concept in order."""

    fields = ("image", "text")

    def __init__(self, samples: int, concepts: int) -> None:
        self.pixels = np.random.default_rng(0).integers(0, 256, (samples, 16, 16, 4), np.uint8)
        self.concepts = np.arange(samples) % concepts
        self.broken = BrokenLog(samples, 0.0)

    def __getitem__(self, index: int) -> Sample:
        concept = int(self.concepts[index])
        return Sample.of_pair(self.pixels[index], (f"thing {concept}",), (), concept, self.name(index))

    def name(self, index: int) -> str:
        return f"{index}.png"


def model_and_sets(**parts: object) -> tuple[Model, dict[str, HeldOut]]:
    recipe = Config(parts={**TINY, **parts}).wiring()
    tokenizer = TextTokenizer.train([], 400)
    model = Model(recipe, Facts(recipe.model, len(tokenizer), {}, recipe.streams))
    collator = Collator(recipe.streams, tokenizer)
    sets = {"A": Pictures(60, 20), "B": Pictures(24, 24)}
    return model, {name: HeldOut(name, s, collator, torch.device("cpu"), s, samples=25) for name, s in sets.items()}


def test_evaluate_leaves_no_trace_and_shows_chance() -> None:
    model, sets = model_and_sets(**{"model.dropout": 0.5})
    before = torch.get_rng_state()
    found = evaluate(model, [Retrieval()], sets)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert evaluate(model, [Retrieval()], sets) == found, "dropout is off"
    for name, concepts in (("A", 20), ("B", 24)):
        figures = {figure.name: figure for figure in found[name]}
        assert figures["image → text R@5"].chance == pytest.approx(5 / concepts)
        for way in ("image → text", "text → image"):
            values = [figures[f"{way} R@{k}"].value for k in KS]
            assert all(a <= b for a, b in pairwise(values))
    missed = comb(60 - 3, 5) / comb(60, 5)  # three pictures of each concept
    assert next(f.chance for f in found["A"] if f.name == "text → image R@5") == pytest.approx(1 - missed)


def test_figures_of_one_name_are_told_apart() -> None:
    model, sets = model_and_sets()
    near, far = NearestNeighbours(k=1), NearestNeighbours(k=15)
    alone = [evaluate(model, [metric], sets)["A"][0] for metric in (near, far)]
    assert alone[0].name == alone[1].name and alone[0].value != alone[1].value
    name = alone[0].name
    assert evaluate(model, [near, far], sets)["A"] == [alone[0], replace(alone[1], name=f"{name} (2)")]


def test_the_gallery_has_each_concept_once_and_only_samples_with_both() -> None:
    model, sets = model_and_sets()
    source = sets["A"].source
    whole = source.__class__.__getitem__

    class Lacking(Pictures):
        def __getitem__(self, index: int) -> Sample:
            sample = whole(self, index)
            values = {name: value for name, value in sample.values.items() if name != "image" or index % 4}
            return Sample(values, sample.concept, sample.name)

    lacking = Lacking(60, 20)
    held_out = HeldOut("x", lacking, sets["A"].collator, torch.device("cpu"), lacking, samples=7)
    space = embed(model.eval(), held_out, "image", "text")
    assert space.items_a == [i for i in range(60) if i % 4]
    assert len(space.b) == 15, "concepts 0, 4, ... are only ever seen without a picture"
    assert [lacking.concepts[i] for i in space.items_a] == [
        lacking.concepts[space.items_b[j]] for j in space.targets.tolist()
    ]


def test_an_empty_or_limited_set() -> None:
    model, sets = model_and_sets()
    one = sets["A"]
    nothing = HeldOut("x", Pictures(0, 1), one.collator, one.device, one.train)
    assert evaluate(model, [Retrieval()], {"x": nothing}) == {"x": []}
    limited = HeldOut("x", one.source, one.collator, one.device, one.train, limit=7)
    assert len(limited.items()) == 7
    assert sum(batch.samples for batch in limited.batches()) == 7


def test_a_caption_means_the_same_alone_and_in_a_batch() -> None:
    """Packed tokens see only their own segment."""
    model, sets = model_and_sets()
    model = model.double().eval()
    collator = sets["A"].collator
    captions = ["red", "a very long caption of many words", "two words", "", "x y z"]
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 4), np.uint8)
    samples = [Sample.of_pair(images[i], (caption,), (), i, str(i)) for i, caption in enumerate(captions)]

    def embedded_of(some: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        batch = collator(some, range(len(some)), mode="plain")
        media = batch["image"].media[1]
        object.__setattr__(media, "values", media.values.double())
        return model.encoder("image").embeddings(batch["image"]), model.encoder("text").embeddings(batch["text"])

    together = embedded_of(samples)
    for i, sample in enumerate(samples):
        for one, all_of_them in zip(embedded_of([sample]), together, strict=True):
            torch.testing.assert_close(one[0], all_of_them[i], rtol=1e-9, atol=1e-12)
