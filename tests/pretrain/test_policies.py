"""Measured weights: against an oracle, undisturbed by chunks, workers, skipped steps and resuming; predicted times."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretrain.started import assert_equal, weights_of

from mmkernels.pretrain import Config, Stage, train
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.objective_weights import squared_gradients
from mmkernels.pretrain.policies import Measured, Policy, weighed
from mmkernels.pretrain.recipe import Ramp, Recipe
from mmkernels.pretrain.recipes import load
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.schedule import check_policy, shares_at
from mmkernels.pretrain.setup import open_source, tokenizer_for
from mmkernels.pretrain.step_time import StepTime
from mmkernels.pretrain.trainer import Outcome, Trainer

SMALL = {"model.width": 32, "model.heads": 2, "model.embed_dim": 32, "fusion.layers": 1}
NAMES = ("a", "b", "c")


@dataclasses.dataclass(frozen=True)
class Part:
    """As much of an objective as a schedule looks at."""

    weight: float | Ramp = 1.0


def recipe_of(policy: Policy, *, draw: bool = False, stages: tuple[Stage, ...] = (Stage(),), **weights: Any) -> Recipe:
    parts = {name: Part(weight) for name, weight in weights.items()}
    return Recipe("", "", "", {}, parts, policy=policy, draw=draw, stages=stages)


# ---------------------------------------------------------------------------------------------- the weights


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "norm"}, r"policy.kind: expected one of fixed, grad_norm, progress, got 'norm'"),
        ({"every": 0}, "policy.every: expected at least 1 step, got 0"),
        ({"floor": 1.5}, "policy.floor: expected a share between 0 and 1, got 1.5"),
        ({"alpha": -1.0}, "policy.alpha: expected at least 0, got -1.0"),
        ({"decay": 1.0}, "policy.decay: expected 0 <= decay < 1, got 1.0"),
        ({"temperature": 0.0}, "policy.temperature: expected a positive number, got 0.0"),
        ({"alpha": math.nan}, "policy.alpha"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Policy(**options)


def test_policies_that_cannot_work() -> None:
    with pytest.raises(ValueError, match=r"policy.kind: expected fixed, since a is the only objective, got progress"):
        check_policy(recipe_of(Policy("progress"), a=1.0), workers=0)
    drawn = recipe_of(Policy("progress", every=5), draw=True, a=1.0, b=1.0)
    with pytest.raises(ValueError, match=r"policy.every: expected at least 6, the batches that 3 workers read ahead"):
        check_policy(drawn, workers=3)
    check_policy(drawn, workers=2)
    check_policy(dataclasses.replace(drawn, draw=False), workers=3)


def oracle(policy: Policy, priors: np.ndarray, seen: np.ndarray, ahead: int) -> np.ndarray:
    """[steps, n] weights, from scratch at each step, from (relative loss, norm) [steps, n, 2]; NaN: nothing said."""
    steps, n, _ = seen.shape
    weights = np.empty((steps, n))
    for step in range(steps):
        factor = np.full(n, np.nan)
        norm, left = np.full(n, np.nan), np.full(n, np.nan)
        for window in range(max(0, step // policy.every - ahead)):
            part = seen[window * policy.every : (window + 1) * policy.every]
            for i in range(n):
                losses, norms = part[:, i, 0], part[:, i, 1]
                if np.isnan(losses).all():
                    continue
                mean = np.nanmean(losses)
                if policy.kind == "progress":
                    if not np.isnan(left[i]):
                        factor[i] = np.exp(mean / left[i] / policy.temperature)
                    left[i] = mean
                else:
                    first = norms[~np.isnan(norms)][0]
                    keep = 0.0 if np.isnan(norm[i]) else policy.decay
                    norm[i] = keep * np.nan_to_num(norm[i]) + (1 - keep) * first
                    left[i] = keep * np.nan_to_num(left[i]) + (1 - keep) * mean
                    factor[i] = left[i] ** policy.alpha / norm[i]
        known = ~np.isnan(factor)
        weights[step] = priors
        if known.any():
            product = priors[known] * factor[known]
            shares = product / product.sum() * priors[known].sum()
            weights[step, known] = (1 - policy.floor) * shares + policy.floor * priors[known]
    return weights


@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("silent", [0.0, 0.7])
def test_weights_are_those_of_an_oracle(kind: Any, ahead: int, silent: float) -> None:
    draws = np.random.default_rng(7)
    policy = Policy(kind, every=4, floor=0.05, alpha=0.8, decay=0.3, temperature=0.5)
    priors, chance, steps = np.array([1.0, 2.0, 0.5]), {"a": 6.0, "b": None, "c": 0.7}, 40
    losses, norms = draws.uniform(0.1, 8.0, (steps, 3)), 10.0 ** draws.uniform(-3, 3, (steps, 3))
    told = draws.random((steps, 3)) >= silent
    measured, found = Measured(policy, ahead), np.empty((steps, 3))
    for step in range(steps):
        found[step] = [*weighed(dict(zip(NAMES, priors, strict=True)), measured.factors(step), policy.floor).values()]
        own = {name: float(losses[step, i]) for i, name in enumerate(NAMES) if told[step, i]}
        wanted = measured.wanted(list(own))
        measured.see(own, chance, {name: float(norms[step, NAMES.index(name)]) for name in wanted})
        measured.done(step + 1)
    begun = losses[told[:, 1].argmax(), 1]  # b has no loss at chance: the first one
    seen = np.stack([losses / np.array([6.0, begun, 0.7]), norms], -1)
    expected = oracle(policy, priors, np.where(told[..., None], seen, np.nan), ahead)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), priors.sum(), rtol=1e-12)
    assert np.ptp(found, 0).max() > 0.1, "they do change"


def test_an_objective_of_a_hundred_times_the_gradient() -> None:
    """Balanced: what reaches the rows is the same of both."""
    x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).requires_grad_()
    parts = {"large": 100 * x.sin().sum(), "small": x.sin().sum()}
    squares = squared_gradients(parts, [x, torch.ones(3).requires_grad_()])
    norms = {name: square**0.5 for name, square in squares.items()}
    assert norms["large"] == pytest.approx(100 * norms["small"])
    assert norms["small"] == pytest.approx(float(x.detach().cos().square().sum().sqrt()))
    policy = Policy("grad_norm", every=1, floor=0.0, alpha=0.0)
    measured = Measured(policy)
    measured.see({"large": 5.0, "small": 5.0}, {}, norms)
    measured.done(1)
    weights = shares_at(recipe_of(policy, large=1.0, small=1.0), 1, measured.factors(1))
    assert weights["large"] * norms["large"] == pytest.approx(weights["small"] * norms["small"])
    assert sum(weights.values()) == pytest.approx(2.0)
    (x.sum() + weights["large"] * parts["large"]).backward()
    assert x.grad is not None, "the graph is still there"


def test_the_one_that_lags_behind_weighs_more() -> None:
    for policy in (Policy("grad_norm", every=1), Policy("progress", every=1)):
        measured = Measured(policy)
        for step, fast in enumerate((4.0, 2.0, 1.0)):
            measured.see({"fast": fast, "slow": 4.0 - 0.1 * step}, {}, {"fast": 1.0, "slow": 1.0})
            measured.done(step + 1)
        factors = measured.factors(3)
        assert factors["slow"] > factors["fast"]


def test_ramps_and_stages_hold_on_top() -> None:
    policy = Policy("grad_norm", floor=0.0)
    stages = (Stage(until=10, objectives=("a", "b")), Stage())
    recipe = recipe_of(policy, stages=stages, a=1.0, b=Ramp(0.0, 2.0, 8), c=3.0)
    factors = {"a": math.log(3.0), "b": 0.0}
    assert shares_at(recipe, 0, factors) == {"a": 1.0}
    assert shares_at(recipe, 4, factors) == pytest.approx({"a": 1.5, "b": 0.5})
    assert shares_at(recipe, 8, factors) == pytest.approx({"a": 1.8, "b": 1.2})
    later = shares_at(recipe, 10, factors)
    assert later == pytest.approx({"a": 1.8, "b": 1.2, "c": 3.0}), "what was never measured stays as it is"


def test_what_tells_nothing_changes_nothing() -> None:
    measured = Measured(Policy("grad_norm", every=1))
    measured.see({"a": 1.0, "b": 2.0}, {"a": 2.0}, {"a": 3.0, "b": 4.0})
    measured.done(1)
    before = dict(measured.factors(1))
    measured.see({"a": -1.0, "b": 0.0}, {}, {"a": math.inf, "b": 0.0})
    measured.see({"a": math.nan}, {}, {"a": math.nan})
    measured.done(2)
    assert measured.factors(2) == before
    with pytest.raises(RuntimeError, match="step: expected one of 2 to 2, got 3"):
        measured.factors(3)
    extreme = weighed({"a": 1.0, "b": 1.0}, {"a": 1e4, "b": -1e4}, 0.1)
    assert extreme == pytest.approx({"a": 1.9, "b": 0.1})


def test_its_state_is_json_and_complete() -> None:
    draws = np.random.default_rng(3)
    one, two = Measured(Policy("grad_norm", every=3), 1), Measured(Policy("grad_norm", every=3), 1)
    for step in range(20):
        told = {name: float(draws.uniform(1, 2)) for name in NAMES if draws.random() < 0.7}
        one.see(told, {}, dict.fromkeys(one.wanted(list(told)), float(draws.uniform(1, 2))))
        state = json.loads(json.dumps(one.state_dict()))
        two.load_state_dict(state)
        assert two.state_dict() == state
        one.done(step + 1)
        assert state == two.state_dict(), "what is being written does not change"
        two.done(step + 1)
        assert one.factors(step + 1) == two.factors(step + 1)
    assert Measured(Policy()).state_dict() == {}


# ------------------------------------------------------------------------------------------------- in a run


def config_of(recipe: str, folder: Path, parts: dict[str, Any], **changes: Any) -> Config:
    settings = {"steps": 60, "batch": 6, "chunk": 4, "warmup": 2, "threads": 1, "tensorboard": False, **changes}
    return Config.of(recipe, run=folder / "run", parts=SMALL | parts, **settings)


def trainer_of(config: Config) -> Trainer:
    data = open_source(config)
    return Trainer(config, data, tokenizer_for(config, data, RunFolder(config)), torch.device("cpu"))


def stepped(trainer: Trainer, count: int) -> list[tuple[Batch, Outcome]]:
    found = []
    for _ in range(count):
        trainer.begin()
        batch = next(trainer.loader)
        found.append((batch, trainer.backward(batch)))
        trainer.update()
    return found


@pytest.mark.parametrize("chunk", [4, 6])
@pytest.mark.parametrize("recipe", ["vilbert", "uniter"])
def test_measuring_disturbs_nothing(recipe: str, chunk: int, tmp_path: Path) -> None:
    """With a floor of 1 the weights stay the recipe's, and a run stays the same bit for bit, dropout included."""
    dropout = {"model.dropout": 0.1}
    fixed = trainer_of(config_of(recipe, tmp_path, dropout, chunk=chunk))
    parts = {"policy.kind": "grad_norm", "policy.every": 1, "policy.floor": 1.0}
    measured = trainer_of(config_of(recipe, tmp_path, dropout | parts, chunk=chunk))
    for (_, one), (_, other) in zip(stepped(fixed, 4), stepped(measured, 4), strict=True):
        assert one.loss == other.loss and one.norm == other.norm and one.parts == other.parts
        assert not one.shares and other.shares.keys() == {f"{name}/weight" for name in fixed.recipe.objectives}
    assert_equal(weights_of(fixed), weights_of(measured))


def test_gradient_norms_are_those_of_each_objective_alone(tmp_path: Path) -> None:
    """And do not depend on the chunk."""
    found = []
    for chunk in (2, 6):
        trainer = trainer_of(config_of("albef", tmp_path, {"policy.kind": "grad_norm"}, chunk=chunk))
        trainer.begin()
        batch = next(trainer.loader)
        trainer.backward(batch)
        found.append(dict(trainer.weights.squares))
    assert found[0].keys() == set(trainer.recipe.objectives)
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    taught = {name: trainer.model.owner[name] for name in trainer.model.taught}
    for name, square in found[1].items():
        teacher = trainer.twins.embeddings(batch.streams, taught, 6)
        rows = [trainer.model.encoder(each)(batch[each]).detach().requires_grad_() for each in trainer.model.encoded]
        loss, _ = trainer.model.loss(batch, {name: 1.0}, 6, teacher)(*rows)
        loss.backward()
        alone = sum(float(row.grad.double().square().sum()) for row in rows if row.grad is not None)
        assert square == pytest.approx(alone, rel=1e-3), name


@pytest.mark.parametrize(
    ("recipe", "kind"), [("vilbert", "grad_norm"), ("uniter", "grad_norm"), ("uniter", "progress")]
)
def test_a_resumed_run_goes_on_as_it_would_have(recipe: str, kind: str, tmp_path: Path) -> None:
    """Stopped in the middle of a window."""
    config = config_of(recipe, tmp_path, {"policy.kind": kind, "policy.every": 3})
    whole = trainer_of(config)
    steps = stepped(whole, 14)
    first = trainer_of(config)
    stepped(first, 8)
    path = first.save(tmp_path / "checkpoints", wait=True)
    second = trainer_of(config)
    second.load(path)
    rest = stepped(second, 6)
    assert [found for _, found in rest] == [found for _, found in steps[8:]]
    assert_equal(weights_of(whole), weights_of(second))
    assert len({tuple(found.shares.values()) for _, found in steps}) > 1, "weights have changed"


def test_draws_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    parts = {"policy.kind": "grad_norm", "policy.every": 4, "policy.alpha": 0.0}
    alone = stepped(trainer_of(config_of("uniter", tmp_path, parts)), 20)
    trainer = trainer_of(config_of("uniter", tmp_path, parts, workers=2))
    helped = stepped(trainer, 20)
    for (batch, found), (other, same) in zip(alone, helped, strict=True):
        assert batch.names == other.names and found == same
        for name in batch.streams:
            assert torch.equal(batch[name].tokens, other[name].tokens)
    assert alone[-1][1].shares != alone[0][1].shares
    with pytest.raises(ValueError, match=r"policy.every: expected at least 6, the batches that 3 workers read ahead"):
        trainer_of(config_of("uniter", tmp_path, parts, workers=3))


def test_a_skipped_step_tells_nothing(tmp_path: Path) -> None:
    trainer = trainer_of(config_of("vilbert", tmp_path, {"policy.kind": "grad_norm", "policy.every": 4}))
    stepped(trainer, 2)
    before = trainer.weights.state_dict()
    trainer.begin()
    trainer.backward(next(trainer.loader))
    trainer.skip()
    assert trainer.step == 3 and trainer.weights.state_dict() == before


def test_the_log_of_a_run(tmp_path: Path) -> None:
    parts = {"policy.kind": "progress", "policy.every": 2}
    outcome = train(config_of("vilbert", tmp_path, parts, steps=26, eval_every=0, eval_limit=4))
    records = outcome.folder.records("step")
    weights = [[record[f"{name}/weight"] for name in load("vilbert").objectives] for record in records]
    assert weights[0] == [1.0, 1.0, 1.0] != weights[-1]
    assert all(sum(each) == pytest.approx(3.0) for each in weights)
    predicted = ["seconds_predicted" in record for record in records]
    assert predicted == [False] * 23 + [True] * 3
    assert all(record["seconds_predicted"] > 0 for record in records[23:])


def test_the_command_line() -> None:
    config = parse(["--recipe", "albef", "--policy", "grad_norm", "--policy.alpha", "0.5"])
    assert config.wiring().policy == Policy("grad_norm", alpha=0.5)
    assert parse(["--recipe", "albef"]).wiring().policy == Policy()
    with pytest.raises(SystemExit):
        parse(["--recipe", "albef", "--policy.every", "-1"])


# ----------------------------------------------------------------------------------------- predicted seconds


def test_seconds_are_predicted_from_the_work() -> None:
    times, draws = StepTime(), np.random.default_rng(0)
    for step in range(40):
        work = float(draws.uniform(1e9, 3e9))
        times.begin("all", work)
        assert bool(times.predicted()) == (step >= 23)
        if step >= 23:
            assert times.predicted()["seconds_predicted"] == pytest.approx(0.5 + work / 1e10, rel=1e-3)
        times.see((0.5 + work / 1e10) if step >= 3 else 100.0)
    times.begin("others", 1e9)
    assert not times.predicted(), "steps of another kind are not known"


@pytest.mark.parametrize("slope", [0.0, -1.0])
def test_work_that_explains_nothing(slope: float) -> None:
    """The same work in each step, or less time for more of it: the usual seconds."""
    times = StepTime()
    for step in range(23):
        work = 2.0 if slope == 0 else 2.0 + step % 3
        times.begin("all", work)
        times.see(9.0 + slope * work + (50.0 if step == 10 else 0.0))
    times.begin("all", 2.0)
    assert times.predicted()["seconds_predicted"] == pytest.approx(9.0 if slope == 0 else 6.0, rel=0.01)
