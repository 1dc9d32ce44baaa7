"""Means and their bootstrap intervals, against what statistics says they are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmkernels.pretrain.metrics import Figure
from mmkernels.pretrain.metrics.figure import interval


def test_the_interval_of_a_mean_is_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).random(2000) < 0.3
    figure = Figure.of_each("share", torch.from_numpy(values), 0.1, headline=True)
    error = math.sqrt(values.mean() * (1 - values.mean()) / len(values))
    assert figure.value == values.mean() and figure.chance == 0.1 and figure.headline
    assert figure.low == pytest.approx(figure.value - 1.96 * error, abs=0.25 * error)
    assert figure.high == pytest.approx(figure.value + 1.96 * error, abs=0.25 * error)
    assert Figure.of_each("share", values, 0.1, headline=True) == figure, "always the same draws"


def test_it_covers_the_truth_as_often_as_it_says() -> None:
    random, covered = np.random.default_rng(2), 0
    for _ in range(100):
        figure = Figure.of_each("mean", random.normal(5, 2, 100))
        assert figure.low is not None and figure.high is not None
        covered += figure.low <= 5 <= figure.high
    assert 87 <= covered <= 99  # 95 +- 3.5 standard errors, and a little less for a small sample


def test_values_of_a_cluster_are_drawn_together() -> None:
    """Each value ten times over says nothing new."""
    values = np.random.default_rng(3).random(200)
    alone = Figure.of_each("x", values)
    clusters = torch.arange(200).repeat_interleave(10)
    together = Figure.of_each("x", values.repeat(10), clusters=clusters)
    careless = Figure.of_each("x", values.repeat(10))
    assert (together.low, together.high) == (pytest.approx(alone.low), pytest.approx(alone.high))

    def width(figure: Figure) -> float:
        assert figure.low is not None and figure.high is not None
        return figure.high - figure.low

    assert width(careless) == pytest.approx(width(alone) / math.sqrt(10), rel=0.1)


def test_a_statistic_of_sums() -> None:
    """exp of a ratio, as perplexity; many samples are drawn in parts."""
    losses = np.random.default_rng(4).normal(2, 0.5, 5000)
    counts = np.ones_like(losses)
    figure = Figure.of_sums(
        "perplexity", np.stack([losses, counts], 1), lambda s: np.exp(s[:, 0] / s[:, 1]), percent=False
    )
    mean = Figure.of_each("loss", losses)
    assert figure.value == pytest.approx(math.exp(mean.value))
    assert mean.low is not None and figure.low == pytest.approx(math.exp(mean.low))


@pytest.mark.parametrize("values", [[0.5], [1.0, 1.0]])
def test_few_or_equal_values(values: list[float]) -> None:
    figure = Figure.of_each("x", np.array(values))
    expected = (None, None) if len(values) == 1 else (1.0, 1.0)
    assert (figure.low, figure.high) == expected
    assert figure.shown_interval() == ("" if len(values) == 1 else "100.0 to 100.0")


def test_no_interval_of_a_statistic_without_a_value() -> None:
    sums = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert interval(sums, lambda s: s[:, 0] / np.where(s[:, 1] == 0, np.nan, s[:, 1])) == (None, None)
    nan = Figure.of_each("x", np.array([1.0, np.nan]))
    assert math.isnan(nan.value) and nan.low is None
