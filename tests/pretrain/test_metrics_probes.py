"""Nearest neighbours and the linear probe, on features whose classes are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretrain.small_model import Samples, built, held_out, recipe
from torch import nn

from mmkernels.pretrain.encoders import Module
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.metrics import LinearProbe, NearestNeighbours
from mmkernels.pretrain.metrics.linear_probe import Ridge, chosen_ridge
from mmkernels.pretrain.metrics.nearest_neighbours import vote
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.objectives import Answer
from mmkernels.pretrain.recipe import Recipe, Stream

CLASSES = {"kind": ("a", "b", "c")}


def vectors() -> Recipe:
    return recipe(streams={"vector": Stream(Module(nn.Identity, out=4))}, objectives={"kind": Answer("vector", "kind")})


def made(n: int, seed: int, noise: float = 0.1, first: int = 0) -> Samples:
    """Around one of three directions each; concepts beside the labels, from `first`."""
    random = np.random.default_rng(seed)
    kinds = np.arange(n) % 3
    points = np.eye(4)[kinds] + noise * random.standard_normal((n, 4))
    rows = [{"vector": x.astype(np.float32), "kind": int(k)} for x, k in zip(points, kinds, strict=True)]
    return Samples(rows, concepts=(kinds + first).tolist(), classes=CLASSES)


def model_of(source: Samples) -> Model:
    """Features are the vectors themselves."""
    model = built(vectors(), source).float()
    encoder = model.encoder("vector").encoder
    with torch.no_grad():
        encoder.project.weight.copy_(torch.eye(16, 4))
        encoder.project.bias.zero_()
    return model.eval()


@pytest.mark.parametrize("metric", [NearestNeighbours("vector"), LinearProbe("vector")])
@pytest.mark.parametrize("label", ["", "kind"])
def test_separate_classes_are_recognised(metric: object, label: str) -> None:
    train, test = made(30, 0), made(14, 1)
    metric = type(metric)("vector", label)
    with torch.no_grad():
        (figure,) = metric.measure(model_of(train), held_out(vectors(), train, test))
    assert figure.value == 1.0 and figure.chance == pytest.approx(5 / 14)
    assert (label or "concept") in figure.name


@pytest.mark.parametrize("metric", [NearestNeighbours("vector"), LinearProbe("vector")])
def test_classes_without_training_samples(metric: object) -> None:
    """Unseen concepts are not scored; a split that has only such gives no figure, and encodes nothing."""
    train, model = made(30, 0), model_of(made(30, 0))
    with torch.no_grad():
        (figure,) = metric.measure(model, held_out(vectors(), train, made(15, 1, first=2)))  # type: ignore[attr-defined]
        assert figure.chance == 1.0 and figure.value == 0.0  # concept 2 is another direction there
        model.streams = None  # type: ignore[assignment]
        assert metric.measure(model, held_out(vectors(), train, made(9, 1, first=3))) == []  # type: ignore[attr-defined]


def test_samples_without_the_stream_or_the_label_are_left_out() -> None:
    train, test = made(30, 0), made(6, 1)
    test.values = [{"kind": 0}, {"vector": test.values[1]["vector"]}, *test.values[2:]]
    with torch.no_grad():
        (figure,) = NearestNeighbours("vector", "kind").measure(model_of(train), held_out(vectors(), train, test))
    assert figure.value == 1.0 and figure.chance == 0.5  # of c, a, b, c


def test_neighbours_against_every_similarity() -> None:
    train, test = made(30, 0, noise=0.8), made(20, 1, noise=0.8)
    part = NearestNeighbours("vector", k=4, temperature=0.3)
    with torch.no_grad():
        (figure,) = part.measure(model_of(train), held_out(vectors(), train, test))
    keys, queries = (
        F.normalize(torch.from_numpy(np.stack([row["vector"] for row in source.values])), dim=1)
        for source in (train, test)
    )
    right = 0
    for i, similar in enumerate(queries @ keys.T):
        votes = torch.zeros(3)
        for j in similar.argsort(descending=True)[:4].tolist():
            votes[j % 3] += float((similar[j] / 0.3).exp())
        right += int(votes.argmax()) == i % 3
    assert figure.value == pytest.approx(right / 20) and 0.3 < figure.value < 1


def test_votes() -> None:
    cosine = torch.tensor([[0.9, 0.8, 0.8], [0.9, 0.5, 0.5], [0.5, 0.5, 0.5], [torch.nan, 0.1, 0.1]])
    classes = torch.tensor([[1, 2, 2], [1, 2, 2], [3, 1, 2], [1, 1, 1]])
    assert vote(cosine, classes, 1.0).tolist() == [2, 2, 3, -1]
    assert vote(cosine, classes, 0.1).tolist() == [1 if 2 * np.exp(-1) < 1 else 2, 1, 3, -1]


def test_ridge_is_least_squares() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(50, 6, dtype=torch.float64, generator=random) * torch.tensor([1, 5, 0.1, 1, 1, 0.0]).double() + 3
    classes = torch.randint(0, 4, (50,), generator=random)
    found = Ridge(x, classes, 0.1)
    z = ((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-9))[:, :5]
    weight = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    residual = z @ weight + F.one_hot(classes).double().mean(0) - F.one_hot(classes)
    (residual.square().sum() + 0.1 * 50 * weight.square().sum()).backward()
    assert weight.grad is not None
    # One Newton step of a quadratic from zero is its minimum.
    gram = 2 * (z.T @ z + 0.1 * 50 * torch.eye(5))
    torch.testing.assert_close(found.weight[:5], -torch.linalg.solve(gram, weight.grad))
    assert not found.weight[5].any()


def test_noise_asks_for_a_large_ridge() -> None:
    random = torch.Generator().manual_seed(0)
    classes = torch.arange(60) % 3
    signal = F.one_hot(classes).double()
    noisy = torch.cat([signal + torch.randn(60, 3, generator=random), torch.randn(60, 80, generator=random)], 1)
    assert chosen_ridge(noisy, classes) > 1e-2
    assert chosen_ridge(signal, torch.arange(60)) == 1.0  # no class has two samples: nothing to choose by


def test_wrong_settings_are_named() -> None:
    train = made(6, 0)
    with pytest.raises(ValueError, match="stream: expected one of vector, got 'image'"):
        LinearProbe("image").measure(model_of(train), held_out(vectors(), train, train))
    with pytest.raises(ValueError, match="label: expected a label of the data"):
        NearestNeighbours("vector", "colour").measure(model_of(train), held_out(vectors(), train, train))
    for wrong in ({"k": 0}, {"limit": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            NearestNeighbours("vector", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit"):
        LinearProbe("vector", limit=0)


def test_an_evaluation_encodes_the_training_samples_once() -> None:
    """Two metrics on two splits read them; a second evaluation reads them again, as the weights may have changed."""
    train, test = made(30, 0), made(14, 1)
    model, reads = model_of(train), list[int]()
    read_some = train.read_some
    train.read_some = lambda items: (reads.extend(items), read_some(items))[1]  # type: ignore[method-assign]
    metrics = [NearestNeighbours("vector"), LinearProbe("vector")]
    splits = {name: replace(held_out(vectors(), train, test), name=name) for name in ("one", "two")}
    found = evaluate(model, metrics, splits)
    assert sorted(reads) == list(range(30))
    with torch.no_grad():
        assert found["two"] == [f for metric in metrics for f in metric.measure(model, splits["two"])]
    reads.clear()
    with torch.no_grad():
        model.encoder("vector").encoder.project.weight.zero_()
    assert evaluate(model, metrics, splits) != found and len(reads) == 30
