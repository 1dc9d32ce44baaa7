"""The gap between groups, against what accident makes of it where values are not independent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pretrain.test_metrics_more import Known, grouped

from mmkernels.pretrain.data import Data, FolderDataset, mix
from mmkernels.pretrain.metrics import Figure, Groups
from mmkernels.pretrain.metrics.base import Each
from mmkernels.pretrain.metrics.shuffled import Shuffled

Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def whole(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """40 clusters of 25, each of one of two groups."""
    clusters = np.repeat(np.arange(40), 25)
    return clusters, clusters % 2


def uneven(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    clusters = np.repeat(np.arange(80), random.integers(1, 31, 80))
    return clusters, clusters % 3


def large_ones_are_one_group(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    clusters = np.repeat(np.arange(505), [100] * 5 + [1] * 500)
    return clusters, (clusters >= 5).astype(np.int64)


def divided(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half of the clusters are of one group, each of the others of all."""
    clusters = np.repeat(np.arange(60), 10)
    return clusters, np.where(clusters < 30, clusters % 3, random.integers(0, 3, 600))


def nearly_whole(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    clusters = np.repeat(np.arange(40), 12)
    strays = np.arange(480) % 12 == 0
    return clusters, np.where(strays, 1 - clusters % 2, clusters % 2)


def gap_of(values: np.ndarray, clusters: np.ndarray, groups: np.ndarray) -> Figure:
    each = Each("a", values, np.arange(len(values)), clusters, guess=0.5)
    return Groups(Known(each), "kind").measure(None, grouped(groups.tolist()))[-1]


@pytest.mark.parametrize("alike", [0.0, 1.0])
@pytest.mark.parametrize("draw", [whole, uneven, large_ones_are_one_group, divided, nearly_whole])
def test_groups_that_make_no_difference(draw: Draw, alike: float) -> None:
    """The mean gap is chance, whether the values of a cluster are independent or all the same."""
    random, gaps, chances = np.random.default_rng(0), [], []
    for _ in range(40):
        clusters, groups = draw(random)
        hits = random.random(clusters.max() + 1) < 0.4
        same = random.random(len(clusters)) < alike
        gap = gap_of(np.where(same, hits[clusters], random.random(len(clusters)) < 0.4), clusters, groups)
        assert gap.chance is not None
        gaps.append(gap.value)
        chances.append(gap.chance)
    error = np.std(gaps) / np.sqrt(len(gaps))
    assert abs(np.mean(gaps) - np.mean(chances)) < 3 * error
    assert 0.2 < np.mean(np.array(gaps) > np.array(chances)) < 0.7


@pytest.mark.parametrize("draw", [whole, divided, nearly_whole])
def test_a_difference_is_no_accident(draw: Draw) -> None:
    random = np.random.default_rng(1)
    clusters, groups = draw(random)
    gap = gap_of(random.random(len(groups)) < np.where(groups == 1, 0.8, 0.4), clusters, groups)
    assert gap.chance is not None and gap.low is not None and gap.chance < 0.15 < gap.low


def test_clusters_stay_together_and_groups_as_large() -> None:
    clusters, groups = whole(np.random.default_rng(0))
    dealt = Shuffled(groups, np.arange(1000), clusters)
    first, second = dealt(), dealt()
    for each in (first, second):
        assert (each.reshape(40, 25) == each.reshape(40, 25)[:, :1]).all()
        assert np.bincount(each).tolist() == [500, 500]
    assert (first != second).any() and (Shuffled(groups, np.arange(1000), clusters)() == first).all()


def test_divided_clusters_are_divided_as_they_were() -> None:
    """Each has two items of one group and one of the other, with two values each."""
    clusters, items = np.repeat(np.arange(20), 6), np.repeat(np.arange(60), 2)
    groups = np.where(items % 3 == 0, 1 - clusters % 2, clusters % 2)
    order = np.random.default_rng(0).permutation(120)  # in which they come makes no difference
    found = np.empty(120, np.int64)
    found[order] = Shuffled(groups[order], items[order], clusters[order])()
    pairs = found.reshape(60, 2)
    assert (pairs[:, 0] == pairs[:, 1]).all(), "an item has one group"
    assert set(pairs[:, 0].reshape(20, 3).sum(1).tolist()) == {1, 2}
    assert np.bincount(found).tolist() == [60, 60] and (found != groups).any()


def test_samples_without_a_group_to_compare_take_no_part() -> None:
    """Neither those without a label, nor those of a small group."""
    random = np.random.default_rng(0)
    groups = np.repeat([0, 1], 60)
    values, clusters = random.random(120) < 0.5, np.arange(120) // 2
    alone = gap_of(values, clusters, groups)
    more = np.concatenate([groups, np.full(60, -1), np.full(9, 2)])
    extra = np.ones(69, bool)
    assert gap_of(np.concatenate([values, extra]), np.concatenate([clusters, 200 + np.arange(69)]), more) == alone


def test_a_class_that_no_training_sample_has_is_no_group(tmp_path: Path) -> None:
    cities = ["rome", "paris"] * 30 + ["oslo", None]
    rows = [{"question": f"number {i}", "city": city} for i, city in enumerate(cities)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = FolderDataset(tmp_path, fields=("question",), labels=("city",))
    source.learn_classes(range(60))
    each = Each("a", np.arange(62) % 2 == 0, np.arange(62), np.arange(62), guess=0.5)
    for held in (source, mix({"x": Data(source, {}), "y": Data(source, {})}).train):
        figures = Groups(Known(each), "city").measure(None, SimpleNamespace(source=held, train=source))
        assert [f.name.removeprefix("a, ") for f in figures[:2]] == ["city paris", "city rome"]
        assert [f.value for f in figures] == [0.0, 1.0, 1.0]
    for i in (60, 61):
        assert "city" not in source.peek(i) and "city" not in source[i].values
