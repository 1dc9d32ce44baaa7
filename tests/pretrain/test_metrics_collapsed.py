"""A model that is NaN, or says the same of everything, scores zero: no tie is broken in its favour."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.small_model import Samples, built, held_out
from pretrain.test_metrics_more import guessed, objects, pairs, single, towers
from pretrain.test_metrics_probes import made, vectors
from torch import Tensor

from mmkernels.pretrain.metrics import (
    Alignment,
    Classified,
    Figure,
    Grounding,
    LinearProbe,
    Matched,
    NearestNeighbours,
    Predictions,
    Reranked,
    Retrieval,
    ZeroShot,
)
from mmkernels.pretrain.metrics.alignment import uniformity
from mmkernels.pretrain.metrics.classified import _counts
from mmkernels.pretrain.metrics.guessing import best_column, of_others
from mmkernels.pretrain.metrics.linear_probe import Ridge
from mmkernels.pretrain.metrics.reranked import _chosen
from mmkernels.pretrain.metrics.zero_shot import nearest_key
from mmkernels.pretrain.recipe import Recipe

NAN = math.nan


@pytest.fixture(autouse=True)
def _no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def collapsed(of: Recipe, source: Samples, value: float, *metrics: Any) -> dict[str, Figure]:
    """The figures of a model all of whose parameters have a value."""
    model = built(of, source).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
        sets = held_out(of, source, source)
        return {figure.name: figure for metric in metrics for figure in metric.measure(model, sets)}


def test_the_best_column_is_the_only_one() -> None:
    scores = torch.tensor([[0.0, 2, 1], [2, 2, 1], [0, 0, 0], [0, NAN, 1], [NAN] * 3, [-math.inf, -math.inf, 0]])
    assert best_column(scores).tolist() == [1, -1, -1, -1, -1, 2]
    assert best_column(torch.zeros(2, 0)).tolist() == [-1, -1] and best_column(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_guessed_classes(value: float) -> None:
    of, source = vectors(), made(9, 0)
    for i, row in enumerate(source.values):
        row["kind"] = 0 if i < 5 else 2  # what the first column would be right of
    found = collapsed(of, source, value, Predictions("kind"), Classified("kind"), NearestNeighbours("vector", "kind"))
    for name in ("accuracy", "macro precision", "macro recall", "macro F1"):
        assert found[f"kind: {name}"].value == 0.0
    error = found["kind: expected calibration error"]
    assert error.value == pytest.approx(1.0 if math.isnan(value) else 1 / 3) and error.low == pytest.approx(error.value)
    if math.isnan(value):
        assert math.isnan(found["kind: loss"].value)
        assert collapsed(of, source, value, LinearProbe("vector", "kind")).popitem()[1].value == 0.0


def test_a_probe_that_cannot_decide() -> None:
    x, classes = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
    assert Ridge(x, classes, 0.1)(x).tolist() == [-1] * 4, "both are as frequent"
    assert Ridge(x[:3], classes[:3], 0.1)(x).tolist() == [0] * 4, "of constant features: the most frequent"
    fitted = Ridge(torch.eye(4), torch.arange(4), 0.1)
    assert fitted(torch.stack([torch.eye(4)[2], torch.full((4,), NAN)])).tolist() == [2, -1]


def test_no_guess_is_no_class() -> None:
    """Means are over the classes that occur or are guessed, as if a sample without a guess had been asked only."""
    found = guessed(300, 5)
    none = np.arange(300) % 7 == 0
    table = _counts(found.items, found.targets, np.where(none, -1, found.guesses)).sum(0).reshape(3, -1)
    classes = np.unique(np.concatenate([found.targets, found.guesses[~none]]))
    assert table.shape == (3, len(classes))
    right = (found.targets == found.guesses) & ~none
    for column, each in enumerate(classes):
        assert table[0, column] == (right & (found.targets == each)).sum()
        assert table[1, column] == ((found.guesses == each) & ~none).sum()
        assert table[2, column] == (found.targets == each).sum()


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_retrieval_from_a_small_gallery(value: float) -> None:
    """Of NaN nothing is found, though all answers are among the ten nearest."""
    source = pairs(5)
    for i, row in enumerate(source.values):
        row["kind"] = int(i > 2)
    part = Retrieval("vector", "text"), ZeroShot("vector", "text"), ZeroShot("vector", "text", "kind")
    found = collapsed(towers(), source, value, *part, Reranked("matching", candidates=3))
    for name, figure in found.items():
        sure = not math.isnan(value) and name.endswith(("R@5", "R@10"))
        assert figure.value == (1.0 if sure else 0.0), name
        assert not sure or figure.chance == 1.0


def test_the_nearest_key_is_the_only_one() -> None:
    queries, keys = torch.eye(3)[[0, 1, 2]], torch.eye(3)[[0, 1, 1]]
    assert nearest_key(queries, keys).tolist() == [0, -1, -1]
    queries[0, 0] = NAN
    assert nearest_key(queries, torch.eye(3)).tolist() == [-1, 1, 2]
    assert nearest_key(torch.eye(3), torch.tensor([[1.0, 0, 0], [0, NAN, 0]])).tolist() == [-1] * 3


def test_re_ranked_candidates() -> None:
    scores, right = torch.tensor([[1.0, 2], [2, 2], [NAN, 1], [2, 1]]), torch.tensor([[False, True]] * 4)
    assert _chosen(scores, right).tolist() == [True, False, False, False]


@pytest.mark.parametrize("value", [NAN, 0.0])
def test_judged_pairs(value: float) -> None:
    source = objects([[0, 1, 2], [1, 2], [2, 0], [0, 1]])
    found = collapsed(single(), source, value, Matched("matching", candidates=3), Grounding("matching"))
    assert len(found) == 2 and all(figure.value == 0.0 for figure in found.values())


def test_vectors_of_nan_are_not_spread_evenly() -> None:
    assert math.isnan(uniformity(torch.full((4, 2), NAN, dtype=torch.float64)))
    found = collapsed(towers(), pairs(4), NAN, Alignment("vector", "text"))
    assert len(found) == 3 and all(math.isnan(figure.value) for figure in found.values())


@pytest.mark.parametrize(
    ("concepts", "others"),
    [
        ([0, 1, 2, 3], [1, 2, 3, 0]),
        ([0, 0, 1, 1, 1, 2], [2, 2, 5, 5, 5, 0]),
        ([0, 1, 0, 0], [1, 2, 1, 1]),
        ([3, 3], None),
        ([3], None),
        ([], None),
    ],
)
def test_another_sample_is_of_another_concept(concepts: list[int], others: list[int] | None) -> None:
    found: Tensor | None = of_others(torch.tensor(concepts, dtype=torch.int64))
    assert (found if found is None else found.tolist()) == others
