"""Which streams a model encodes and projects, what it refuses, and what a queue's momentum twin is for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.small_model import Samples, built, collated, gradients, recipe
from torch import nn

from mmkernels.pretrain.encoders import Module
from mmkernels.pretrain.metrics import NearestNeighbours, Predictions, Retrieval
from mmkernels.pretrain.objectives import Answer, Contrast, NtXent
from mmkernels.pretrain.recipe import Ramp, Recipe, Stage, Stream
from mmkernels.pretrain.setup import expect_fields
from mmkernels.pretrain.state import Ema, Twins

TEACHER = Ema(0.9)


def vector(**options: Any) -> Stream:
    return Stream(Module(nn.Identity, out=4), **options)


def source(n: int = 6) -> Samples:
    random = np.random.default_rng(0)
    rows = [{"x": random.standard_normal(4).astype(np.float32), "kind": i % 2} for i in range(n)]
    return Samples(rows, concepts=[i // 2 for i in range(n)], classes={"kind": ("a", "b")})


def moco(**options: Any) -> Recipe:
    part = Contrast("query", "key", **{"queue": 4, "symmetric": False, "positives": "sample", **options})
    streams = {"query": vector(field="x", teacher=TEACHER), "key": vector(field="x", tied="query")}
    return recipe(streams=streams, objectives={"views": part})


def loss_of(of: Recipe, steps: int = 1) -> tuple[float, Any, Any]:
    """(the loss at the last of some steps, the model, its batch): float64, queues filled by the steps before."""
    model, data = built(of, source()), source()
    decays = {name: s.teacher.decay for name, s in of.streams.items() if s.teacher}
    twins, batch = Twins(model.streams, decays), collated(of, data)  # type: ignore[arg-type]
    for _ in range(steps):
        taught = {name: model.owner[name] for name in model.taught}
        teacher = twins.embeddings(batch.streams, taught, 4)
        rows = tuple(encoder(batch[name]) for encoder, name in zip(model.encoders(), model.encoded, strict=True))
        loss, _ = model.loss(batch, {"views": 1.0}, 3, teacher)(*rows)
        chance = model.objectives["views"].chance_loss(batch)
        model.objectives["views"].after_step()
    return loss.item(), model, chance


@pytest.mark.parametrize("part", [NtXent("a", "b"), Contrast("a", "b"), NtXent("a", "b", temperature=0.5)])
def test_the_projection_that_a_recipe_asks_for_is_there_and_learns(part: Any) -> None:
    streams = {"a": vector(field="x", project="mlp"), "b": vector(field="x", project="mlp", tied="a")}
    of = recipe(streams=streams, objectives={"views": part})
    model, data = built(of, source()), source()
    assert model.encoder("a").embeddings(collated(of, data)["a"]).shape[1] == of.model.embed_dim
    _, found = gradients(model, collated(of, data), 2)
    projections = [name for name in found if ".project." in name and name.startswith("streams.a.project")]
    assert len(projections) == 3 and all(found[name].any() for name in projections)


def test_a_queue_in_one_direction_encodes_queries_once_and_keys_once() -> None:
    """The model has the queries, the twin the keys; neither does the other's work."""
    _, model, _ = loss_of(moco())
    assert model.encoded == ("query",) and model.taught == {"key"}
    both = built(moco(symmetric=True), source())
    assert both.encoded == ("query", "key") and both.taught == {"query", "key"}
    plain = built(moco(queue=0), source())
    assert plain.encoded == ("key", "query") and not plain.taught, "keys go to other ranks while queries are encoded"


def test_a_queue_against_the_formula() -> None:
    """At the second step the first one's keys are further negatives, and chance counts them."""
    of = moco(init_scale=2.0)
    loss, model, chance = loss_of(of, steps=2)
    x = model.encoder("query").embeddings(collated(of, source())["query"])  # the twin is still the same
    logits = 2.0 * torch.cat([x @ x.T, x @ x[2:].T], 1)  # the newest four keys
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, torch.arange(6)).item(), rel=1e-6)
    assert chance == pytest.approx(math.log(6 + 4))
    assert loss_of(of)[2] == pytest.approx(math.log(6)), "the queue is empty at first"


def test_positives() -> None:
    """By concept, two samples of one concept belong together; by sample, they do not."""
    of = moco(queue=0, init_scale=2.0)
    loss, model, _ = loss_of(of)
    x = model.encoder("query").embeddings(collated(of, source())["query"])
    logits = 2.0 * x @ x.T
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, torch.arange(6)).item(), rel=1e-6)
    other, _, _ = loss_of(moco(queue=0, init_scale=2.0, positives="concept"))
    assert abs(other - loss) > 1e-3


@pytest.mark.parametrize(
    ("streams", "part", "message"),
    [
        ({"a": vector(), "b": vector(tied="c")}, NtXent("a", "b"), r"streams\.b\.tied: expected .* \(a\), got c"),
        (
            {"a": vector(), "b": Stream(Module(nn.Identity, out=3), tied="a")},
            NtXent("a", "b"),
            r"streams\.b\.encoder: expected Module\(.*out=4.* got Module\(.*out=3",
        ),
        ({"a": vector(), "b": vector(tied="a", pool="max")}, NtXent("a", "b"), r"streams\.b\.pool: expected mean, as"),
        (
            {"a": vector(), "b": vector(project="mlp")},
            Answer("a", "kind"),
            r"streams\.b\.project: expected 'linear' or 'none', since no objective compares .* got 'mlp'",
        ),
        (
            {"a": vector(teacher=TEACHER), "b": vector(teacher=TEACHER)},
            Contrast("a", "b", queue=4, symmetric=False),
            r"streams\.b\.tied: expected 'a', since without symmetric nothing else trains",
        ),
        ({"a": vector(), "b": vector(tied="a")}, Contrast("a", "b", queue=4), r"streams\.a: expected a teacher"),
        ({"a": vector(), "b": vector()}, Contrast("a", "b", distil=0.5), r"streams\.a: expected a teacher"),
    ],
)
def test_refused(streams: dict[str, Stream], part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(recipe(streams=streams, objectives={"x": part}), source())


def test_an_objective_that_names_no_streams_is_refused() -> None:
    class Nameless:
        def build(self, facts: Any) -> Any:
            return NtXent("a", "b").build(facts)

    with pytest.raises(ValueError, match=r"objectives\.x: expected a part with a property compares, got .*Nameless"):
        built(recipe(streams={"a": vector(), "b": vector()}, objectives={"x": Nameless()}), source())


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (NearestNeighbours("quary"), r"metrics\.NearestNeighbours\.stream: .* got 'quary'; did you mean query\?"),
        (NearestNeighbours("query", "kinds"), r"the label 'kinds', which metrics\.NearestNeighbours of recipe r reads"),
        (Retrieval("query", "image"), r"metrics\.Retrieval\.b: expected one of query, key, got 'image'"),
        (Retrieval("query", "key", through="maps"), r"metrics\.Retrieval\.through: expected one of views, got 'maps'"),
        (Predictions("words"), r"metrics\.Predictions\.objective: expected one of views, got 'words'"),
    ],
)
def test_a_metric_that_cannot_be_measured_is_refused_before_the_run(metric: Any, message: str) -> None:
    of = dataclasses.replace(moco(), metrics=(metric,))
    expect_fields("r", dataclasses.replace(of, metrics=(NearestNeighbours("query", "kind"),)), "d", source())
    with pytest.raises(ValueError, match=message):
        expect_fields("r", of, "d", source())


def test_one_metric_one_stage_or_one_view_without_a_comma_is_refused() -> None:
    for name, value in (("metrics", Retrieval("a", "b")), ("stages", Stage())):
        example = rf"\({type(value).__name__}\(...\),\)"
        with pytest.raises(TypeError, match=f"{name}: expected a tuple, such as {example}, got"):
            recipe(streams={"x": vector()}, objectives={}, **{name: value})
    with pytest.raises(TypeError, match=r"views: expected a tuple, such as \(Identity\(...\),\), got"):
        vector(views=nn.Identity())


def test_an_objective_that_reads_what_is_not_there_is_refused() -> None:
    of = recipe(streams={"x": vector()}, objectives={"kind": Answer("merged", "kind")})
    with pytest.raises(ValueError, match=r"objectives\.kind\.read: expected one of x, got 'merged'"):
        expect_fields("r", of, "d", source())


def test_a_step_without_the_objective_leaves_its_queue_alone() -> None:
    """So does one in which no sample has both streams; a resumed run, which has no latest keys, then agrees."""
    _, model, _ = loss_of(moco(queue=20))
    queue = model.objectives["views"].queues["key"]
    assert len(queue) == 6
    model.objectives["views"].forget()
    model.objectives["views"].after_step()
    assert len(queue) == 6


def test_a_twin_of_a_tied_stream_is_refused() -> None:
    streams = {"a": vector(), "b": vector(tied="a", teacher=TEACHER)}
    with pytest.raises(ValueError, match=r"streams\.b\.teacher: expected None, streams\.a may have one, got Ema"):
        built(recipe(streams=streams, objectives={"x": NtXent("a", "b")}), source())


def test_settings_of_contrast_are_checked() -> None:
    for options, name in (
        ({"queue": -1}, "queue"),
        ({"distil": Ramp(0.0, 2.0, 5)}, "distil"),
        ({"distil": -0.1}, "distil"),
    ):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            Contrast("a", "b", **options)
