"""Samples of one concept are not independent: every figure draws them together for its interval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.small_model import Samples, built, held_out, recipe
from pretrain.test_metrics_captions import CAPTIONER, CAPTIONS, DOCUMENTS, document
from pretrain.test_metrics_more import objects, pairs, single, towers
from pretrain.test_metrics_probes import made, vectors

from mmkernels.pretrain import metrics
from mmkernels.pretrain.data import Text
from mmkernels.pretrain.encoders import Patches, Regions, Words
from mmkernels.pretrain.fusion import Merged
from mmkernels.pretrain.metrics import (
    Ablation,
    Alignment,
    Captioning,
    Classified,
    Grounding,
    Groups,
    LinearProbe,
    Matched,
    NearestNeighbours,
    Perplexity,
    Predictions,
    Reconstruction,
    Reranked,
    Retrieval,
    Shots,
    ZeroShot,
)
from mmkernels.pretrain.objectives import MaskedPatches, MaskedRegions, MaskedTokens
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskPatches, MaskRegions, MaskWords

SAMPLES, CONCEPTS = 12, 4


def hidden() -> Recipe:
    """Masked words beside masked regions."""
    return recipe(
        streams={
            "text": Stream(Words(layers=0), views=(MaskWords(0.5),)),
            "regions": Stream(Regions(side=2), views=(MaskRegions(0.5),)),
        },
        fusion=Merged(("text", "regions"), layers=1),
        objectives={"words": MaskedTokens("text"), "crops": MaskedRegions("regions", target="features")},
    )


def patches() -> Recipe:
    image = Stream(Patches(layers=1, size=16, patch=8, stem="linear"), views=(MaskPatches(0.5),), project="none")
    return recipe(streams={"image": image}, objectives={"patches": MaskedPatches("image", layers=1)})


def classed() -> Samples:
    source = pairs(SAMPLES)
    for i, row in enumerate(source.values):
        row["kind"] = i % 2
    return source


def pictures() -> Samples:
    images = np.random.default_rng(0).integers(0, 256, (SAMPLES, 16, 16, 3), np.uint8)
    return Samples([{"image": image, "text": Text((CAPTIONS[i % 5],))} for i, image in enumerate(images)])


def several() -> Samples:
    return objects([[i % 3, (i + 1) % 3] for i in range(SAMPLES)])


def documents() -> Samples:
    return Samples([document("dog", CAPTIONS[i % 5]) for i in range(SAMPLES)])


CASES: list[tuple[Any, Recipe, Any]] = [
    (Ablation("words", "regions"), hidden(), several),
    (Alignment("vector", "text"), towers(), classed),
    (Captioning("words", scores=("CIDEr",), most_tokens=2), CAPTIONER, pictures),
    (Classified("kind"), vectors(), lambda: made(SAMPLES, 0)),
    (Grounding("matching"), single(), several),
    (Groups(Predictions("kind"), "kind", least=2), vectors(), lambda: made(SAMPLES, 0)),
    (Groups(Retrieval("vector", "text"), "kind", least=2), towers(), classed),
    (LinearProbe("vector", "kind"), vectors(), lambda: made(SAMPLES, 0)),
    (Matched("matching"), single(), several),
    (NearestNeighbours("vector", "kind"), vectors(), lambda: made(SAMPLES, 0)),
    (Perplexity("words"), hidden(), several),
    (Predictions("crops"), hidden(), several),
    (Predictions("kind"), vectors(), lambda: made(SAMPLES, 0)),
    (Predictions("words"), hidden(), several),
    (Reconstruction("patches"), patches(), pictures),
    (Reranked("matching"), towers(), classed),
    (Retrieval("vector", "text"), towers(), classed),
    (Shots("words", shots=(0, 1), most_tokens=2), DOCUMENTS, documents),
    (ZeroShot("vector", "text"), towers(), classed),
    (ZeroShot("vector", "text", "kind"), towers(), classed),
]


def test_every_metric_is_here() -> None:
    every = {name for name in metrics.__all__ if hasattr(getattr(metrics, name), "measure")}
    assert {type(case[0]).__name__ for case in CASES} == every


@pytest.mark.parametrize(("metric", "of", "make"), CASES, ids=lambda x: repr(x) if hasattr(x, "measure") else "")
@torch.no_grad()
def test_a_concept_is_drawn_as_one(metric: Any, of: Recipe, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted(sums: np.ndarray, statistic: Any, clusters: np.ndarray | None = None) -> tuple[None, None]:
        drawn.append(len(sums) if clusters is None else len(np.unique(clusters)))
        return None, None

    monkeypatch.setattr("mmkernels.pretrain.metrics.figure.interval", counted)
    source = make()
    source.concepts = np.arange(SAMPLES) * CONCEPTS // SAMPLES + 7
    model = built(of, source).float().eval()
    assert metric.measure(model, replace(held_out(of, source, source), samples=SAMPLES))
    assert drawn and set(drawn) == {CONCEPTS}


@pytest.mark.parametrize("metric", [Predictions("kind"), Classified("kind"), LinearProbe("vector", "kind")])
@torch.no_grad()
def test_what_is_there_several_times_says_nothing_new(metric: Any) -> None:
    train, once = made(30, 0), made(40, 1, noise=1.0)
    once.concepts = np.arange(40)
    again = Samples([row for row in once.values for _ in range(5)], np.repeat(np.arange(40), 5).tolist(), once.classes)
    model = built(vectors(), train).float().eval()
    for one, five in zip(*(metric.measure(model, held_out(vectors(), train, x)) for x in (once, again)), strict=True):
        assert one.low is not None and one.high is not None and one.low < one.high
        for name in ("value", "chance", "low", "high"):
            assert getattr(five, name) == pytest.approx(getattr(one, name), abs=1e-6), (one.name, name)
