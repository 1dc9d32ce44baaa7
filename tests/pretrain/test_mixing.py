"""Measured shares of a mixture: against oracles, undisturbed by workers, ranks and resuming; measuring is unseen."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from pretrain.started import SMALL, started
from torch import Tensor

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.mixing import MeasuredMix, Mixing, Taught
from mmkernels.pretrain.picture import picture
from mmkernels.pretrain.run_folder import stored_records
from mmkernels.pretrain.trainer import Trainer

# -------------------------------------------------------------------------------------------------- the factors


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "loss"}, r"mixing.kind: expected one of fixed, ramp, grad_norm, progress, got 'loss'"),
        ({"every": 0}, "mixing.every: expected at least 1, got 0"),
        ({"samples": 0}, "mixing.samples: expected at least 1, got 0"),
        ({"floor": 0.0}, "mixing.floor: expected a share above 0, at most 1, got 0.0"),
        ({"floor": math.nan}, "mixing.floor: expected a share above 0, at most 1, got nan"),
        ({"alpha": -1.0}, "mixing.alpha: expected at least 0, got -1.0"),
        ({"decay": 1.0}, "mixing.decay: expected 0 <= decay < 1, got 1.0"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixing(**options)


PARTS, OBJECTIVES = ("a", "b", "c"), ("x", "y")


def oracle(
    mixing: Mixing, losses: np.ndarray, norms: np.ndarray, weights: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """[n + 1, parts]: the factor of each part in each window, from scratch; NaN: none. `losses` [n, parts, objectives],
    NaN where nothing was said, `norms` and `shares` [n, parts] (the shares of the window before)."""
    n, parts, _ = losses.shape
    factors = np.full((n + 1, parts), np.nan)
    for window in range(1, n + 1):
        means = np.full(parts, np.nan)
        for part in range(parts):
            before = np.full(losses.shape[2], np.nan)
            for t in range(window):
                now, gain = losses[t, part], np.nan
                if mixing.kind == "grad_norm":
                    gain = norms[t, part] if norms[t, part] > 0 else np.nan
                else:
                    both = ~np.isnan(now) & ~np.isnan(before)
                    if both.any():
                        falls = np.log(before[both] / now[both])
                        gain = max(0.0, np.average(falls, weights=weights[both])) / shares[t, part]
                if not np.isnan(now).all():
                    before = now
                if not np.isnan(gain):
                    keep = 0.0 if np.isnan(means[part]) else mixing.decay
                    means[part] = keep * np.nan_to_num(means[part]) + (1 - keep) * gain
        if np.nanmax(np.append(means, 0.0)) > 0:
            factors[window] = means**mixing.alpha
            factors[window] /= np.nanmax(factors[window])
        elif window:
            factors[window] = factors[window - 1]
    return factors


@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
@pytest.mark.parametrize("silent", [0.0, 0.5])
def test_factors_are_those_of_an_oracle(kind: Any, silent: float) -> None:
    draws, n = np.random.default_rng(11), 30
    mixing = Mixing(kind, every=4, alpha=0.7, decay=0.3)
    losses, norms = draws.uniform(0.5, 4.0, (n, 3, 2)), draws.uniform(0.01, 9.0, (n, 3))
    losses[draws.random(losses.shape) < silent] = np.nan
    norms[draws.random(norms.shape) < silent] = 0.0
    shares, weights = draws.dirichlet(np.ones(3), n), np.array([1.0, 0.3])
    measured, found = MeasuredMix(mixing), np.full((n + 1, 3), np.nan)
    for t in range(n):
        assert measured.due(4 * t)
        told = {
            part: Taught(
                {name: float(x) for name, x in zip(OBJECTIVES, losses[t, i], strict=True) if not np.isnan(x)},
                float(norms[t, i]),
            )
            for i, part in enumerate(PARTS)
        }
        of = dict(zip(PARTS, shares[t].tolist(), strict=True))
        measured.see(told, dict(zip(OBJECTIVES, weights.tolist(), strict=True)), of)
        assert not any(measured.due(4 * t + i) for i in range(4))
        known = measured.factors(4 * t + 4)
        found[t + 1] = [known.get(part, np.nan) for part in PARTS]
    np.testing.assert_allclose(found, oracle(mixing, losses, norms, weights, shares), rtol=1e-12)
    assert np.nanmax(np.ptp(found[5:], 0)) > 0.1, "they do change"


def test_what_teaches_most_is_drawn_most() -> None:
    measured = MeasuredMix(Mixing("progress", every=1))
    for window, fast in enumerate((4.0, 2.0, 1.0)):
        told = {"fast": Taught({"x": fast}), "slow": Taught({"x": 4.0 - 0.1 * window}), "noise": Taught({"x": 4.0})}
        measured.see(told, {"x": 1.0}, dict.fromkeys(told, 1 / 3))
    factors = measured.factors(3)
    assert factors["fast"] == 1.0 > factors["slow"] > factors["noise"] == 0.0


def test_what_cannot_be_measured_changes_nothing() -> None:
    measured = MeasuredMix(Mixing("grad_norm", every=1))
    assert measured.see({"a": Taught({}, 2.0), "b": Taught({}, 0.0)}, {}, {}) == {"a": 2.0}
    assert measured.factors(1) == {"a": 1.0}, "of b nothing is known"
    measured.see({"a": Taught({}, 1.0), "b": Taught({}, 3.0)}, {}, {})
    before = measured.factors(2)
    measured.see({"a": Taught({}, math.inf), "b": Taught({}, math.nan)}, {}, {})
    assert measured.factors(3) == before
    with pytest.raises(RuntimeError, match="step: expected one of 2 to 3, got 4"):
        measured.factors(4)
    growing = MeasuredMix(Mixing("progress", every=1))
    for loss in (1.0, 2.0, math.nan, 3.0):
        assert growing.see({"a": Taught({"x": loss})}, {"x": 1.0}, {"a": 1.0}) in ({}, {"a": 0.0})
    assert growing.factors(4) == {}


def test_all_ranks_take_the_same_factors_to_the_last_bit() -> None:
    """Those of rank 0: another logarithm would draw other samples."""
    measured = MeasuredMix(Mixing("grad_norm", every=1), lambda values: [value / 2 for value in values])
    measured.see({"a": Taught({}, 1.0), "b": Taught({}, 4.0)}, {}, {})
    assert measured.factors(1) == {"a": 0.125, "b": 0.5}


def test_its_state_is_json_and_complete() -> None:
    draws = np.random.default_rng(3)
    one, two = MeasuredMix(Mixing("progress", every=3)), MeasuredMix(Mixing("progress", every=3))
    for window in range(8):
        state = json.loads(json.dumps(one.state_dict()))
        two.load_state_dict(state)
        assert two.state_dict() == state
        told = {part: Taught({"x": float(draws.uniform(1, 2))}) for part in PARTS if draws.random() < 0.7}
        one.see(told, {"x": 1.0}, dict.fromkeys(PARTS, 1 / 3))
        assert state == two.state_dict(), "what is being written does not change"
        two.see(told, {"x": 1.0}, dict.fromkeys(PARTS, 1 / 3))
        assert one.factors(3 * window + 3) == two.factors(3 * window + 3)


# ---------------------------------------------------------------------------------------------------- in a run

MIXED = {"data": "emoji::scenes", "batch": 12, "chunk": 5, "threads": 1, "tensorboard": False, "steps": 60, "warmup": 2}


def config_of(recipe: str, folder: Path, kind: str, parts: dict[str, Any] | None = None, **changes: Any) -> Config:
    mixing = {"mixing.kind": kind, "mixing.every": 4, "mixing.samples": 6, "mixing.decay": 0.0}
    return Config.of(recipe, run=folder / "run", parts=SMALL | mixing | (parts or {}), **MIXED | changes)


def stepped(trainer: Trainer, count: int) -> list[dict[str, Any]]:
    found = []
    for _ in range(count):
        trainer.measure()
        trainer.begin()
        batch = next(trainer.loader)
        outcome = trainer.backward(batch)
        trainer.update()
        samples = [number for number, name in zip(batch.numbers, batch.names, strict=True) if name]
        shares = {name: value for name, value in outcome.shares.items() if name != "mixing_seconds"}
        found.append({"samples": samples, "loss": outcome.loss, "shares": shares})
    return found


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.carried.state_dict().items()}


def assert_equal(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


def test_runs_that_cannot_work(tmp_path: Path) -> None:
    def begun(**changes: Any) -> None:
        with started(config_of("clip", tmp_path, "progress", **changes)):
            pass

    with pytest.raises(ValueError, match=r"mixing.kind: expected fixed, since the data are no mixture \(A::B\), got"):
        begun(data="emoji")
    with pytest.raises(ValueError, match=r"mixing.every: expected at least 8, the batches that 2 workers read ahead"):
        begun(workers=2)
    with pytest.raises(ValueError, match=r"mixing.kind: expected fixed, since the data are no mixture"):
        train(config_of("clip", tmp_path, "progress", data="emoji"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
@pytest.mark.parametrize("recipe", ["moco", "albef"])
def test_measuring_leaves_no_trace(recipe: str, kind: str, tmp_path: Path) -> None:
    """Of queues, twins and dropout; the batches are the same too, since the floor is 1."""
    with started(config_of(recipe, tmp_path, kind, {"mixing.floor": 1.0, "model.dropout": 0.1})) as trainer:
        found = stepped(trainer, 9)
        weights = weights_of(trainer)
    with started(config_of(recipe, tmp_path, kind, {"mixing.floor": 1.0, "model.dropout": 0.1})) as trainer:
        trainer.measure()  # shares have to be known of two windows
        factors = trainer.mixing._measured
        trainer.measure = lambda: factors._go_on({}) if factors.due(trainer.step) else None  # type: ignore[method-assign]
        alone = stepped(trainer, 9)
        assert_equal(weights, weights_of(trainer))
    assert [each["loss"] for each in found] == [each["loss"] for each in alone]
    assert any(name.endswith("/gain") for name in found[8]["shares"])


@pytest.mark.parametrize("recipe", ["clip", "albef"])
def test_what_is_measured_is_loss_and_gradient_of_the_samples(recipe: str, tmp_path: Path) -> None:
    with started(config_of(recipe, tmp_path, "grad_norm")) as trainer:
        trainer.begin()
        model, data = trainer.model, trainer.loader.source
        assert data.shares is not None
        ((odds, weights),) = trainer.mixing.objectives(0)
        assert odds == 1.0 and weights.keys() == trainer.recipe.objectives.keys()
        for part, items in enumerate(trainer.mixing.probes.values()):
            start = sum(data.shares.sizes[:part])
            assert len(set(data.concepts[items].tolist())) == len(items) == 6
            assert start <= items.min() and items.max() < start + data.shares.sizes[part]
            told = trainer._taught(items, [(1.0, weights)])
            assert all(parameter.grad is None for parameter in trainer.parameters)
            batch = trainer.loader.built(items, frozenset(weights))
            teacher = trainer._teachers(batch)
            rows = [model.encoder(name)(batch[name]) for name in model.encoded]
            loss, parts = model.loss(batch, weights, 6, teacher)(*rows)
            loss.backward()
            squares = [float(p.grad.double().square().sum()) for p in trainer.parameters if p.grad is not None]
            assert told.norm == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-4)
            chance = {"contrast": math.log(6)}
            expected = {name: float(value.detach()) / chance.get(name, 1.0) for name, value in parts.items()}
            assert told.losses == pytest.approx(expected, rel=1e-4)
            trainer.undo()


def test_losses_without_gradients_are_the_same(tmp_path: Path) -> None:
    found = []
    for kind in ("grad_norm", "progress"):
        with started(config_of("albef", tmp_path, kind, {"model.dropout": 0.1})) as trainer:
            trainer.begin()
            every = trainer.mixing.objectives(0)
            found.append({name: trainer._taught(items, every) for name, items in trainer.mixing.probes.items()})
    for name, told in found[0].items():
        assert found[1][name].losses == pytest.approx(told.losses, rel=1e-5) and found[1][name].norm == 0 < told.norm


def test_drawn_objectives_are_measured_one_by_one(tmp_path: Path) -> None:
    with started(config_of("uniter", tmp_path, "grad_norm", data="scenes::scenes")) as trainer:
        trainer.begin()
        every = trainer.mixing.objectives(0)
        assert all(len(weights) == 1 for _, weights in every) and math.fsum(odds for odds, _ in every) == 1.0
        items = next(iter(trainer.mixing.probes.values()))
        told = trainer._taught(items, every)
        alone = [trainer._taught(items, [(1.0, weights)]) for _, weights in every]
        assert told.losses == {name: loss for each in alone for name, loss in each.losses.items()}
        expected = math.fsum(odds * each.norm for (odds, _), each in zip(every, alone, strict=True))
        assert told.norm == pytest.approx(expected)


def test_a_part_to_which_no_objective_has_anything_to_say(tmp_path: Path) -> None:
    """Texts alone, beside pairs: it keeps its share."""
    for kind in ("grad_norm", "progress"):
        with started(config_of("clip", tmp_path / kind, kind, data="emoji::languages")) as trainer:
            shares = [each["shares"] for each in stepped(trainer, 13)]
        assert "languages/gain" not in {name for each in shares for name in each} and "emoji/gain" in shares[12]
        assert shares[12]["languages/share"] == pytest.approx(shares[0]["languages/share"])


@pytest.mark.parametrize("at", [4, 6, 11])
@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
def test_a_resumed_run_goes_on_as_it_would_have(kind: str, at: int, tmp_path: Path) -> None:
    """Stopped at the end of a window, before it was measured, or within; with workers, who have read ahead."""
    parts, workers = {"mixing.every": 8} if at == 11 else {}, 2 * (at == 11)
    config = config_of("moco", tmp_path, kind, parts, data_weights=(1.0, 1.0))
    with started(config) as whole:
        steps = stepped(whole, 18)
        weights = weights_of(whole)
    assert len({tuple(v for k, v in each["shares"].items() if k.endswith("share")) for each in steps}) >= 2
    with started(dataclasses.replace(config, workers=workers)) as first:
        assert stepped(first, at) == steps[:at]
        path = first.save(tmp_path / "checkpoints", wait=True)
    with started(config) as second:
        second.load(path)
        assert stepped(second, 18 - at) == steps[at:]
        assert_equal(weights, weights_of(second))


def of_ranks(rank: int, world: int, run: str, kind: str, more: dict[str, Any], saved: int, path: str) -> Any:
    with started(config_of("albef", Path(run), kind, data_weights=(1.0, 1.0), **more)) as trainer:
        if path:
            trainer.load(Path(path))
        found = stepped(trainer, 10 - trainer.step if path else saved or 10)
        if saved:
            trainer.save(Path(run) / "checkpoints", wait=True)
        return found


@pytest.mark.parametrize(("kind", "parallel"), [("grad_norm", "ddp"), ("grad_norm", "fsdp"), ("progress", "fsdp")])
def test_over_ranks(kind: str, parallel: str, tmp_path: Path) -> None:
    """The same samples, losses and gains as in one process; and a run of two goes on in one."""
    (one,) = ranks.run(1, of_ranks, str(tmp_path / "1"), kind, {}, 0, "")
    two = ranks.run(2, of_ranks, str(tmp_path / "2"), kind, {"parallel": parallel}, 6, "")
    path = next((tmp_path / "2/checkpoints").iterdir())
    (rest,) = ranks.run(1, of_ranks, str(tmp_path / "3"), kind, {}, 0, str(path))
    for step, (each, *others) in enumerate(zip(one, *([*mine, *rest] for mine in two), strict=True)):
        samples = others[0]["samples"] + (others[1]["samples"] if step < 6 else [])
        assert sorted(samples) == sorted(each["samples"]), step
        assert others[0]["loss"] == pytest.approx(each["loss"], rel=1e-4)
        assert others[0]["shares"] == pytest.approx(each["shares"], rel=0.02)
        assert others[0]["shares"] == others[1]["shares"]
    assert one[8]["shares"]["emoji/share"] != one[0]["shares"]["emoji/share"]


def test_a_run_logs_and_shows_them(tmp_path: Path) -> None:
    argv = ["--recipe", "clip", "--mixing", "grad_norm", "--mixing.every", "4", "--mixing.samples", "6"]
    argv += ["--run-folder", str(tmp_path / "run"), "--eval-every", "0", "--eval-limit", "8", "--steps", "9"]
    argv += [
        "--data",
        "emoji::scenes",
        "--batch",
        "12",
        "--no-tensorboard",
        "--model.width",
        "32",
        "--model.heads",
        "2",
    ]
    config = parse(argv)
    assert config.parts["mixing.kind"] == "grad_norm"
    assert "shares of the data follow: Mixing(kind='grad_norm', every=4, samples=6)" in picture("clip", config.wiring())
    train(config)
    steps = stored_records(tmp_path / "run", "step")
    assert all({"emoji/share", "scenes/share"} <= each.keys() for each in steps)
    assert [each["step"] for each in steps if "emoji/gain" in each] == [1, 5, 9]
    assert [each["step"] for each in steps if each.get("mixing_seconds", 0) > 0] == [1, 5, 9]
    page = (tmp_path / "run/report.html").read_text("utf-8")
    assert "emoji/share" in page and "scenes/gain" in page


def test_a_ramp(tmp_path: Path) -> None:
    """Window by window, from the run's shares to others, which stay; nothing is measured."""
    parts = {"mixing.to": (1.0, 3.0), "mixing.steps": 16}
    config = config_of("clip", tmp_path, "ramp", parts, data_weights=(9.0, 1.0), batch=20)
    with started(config) as trainer:
        steps = stepped(trainer, 30)
        assert not trainer.mixing.probes and not trainer.mixing.state_dict()
    shares = [each["shares"]["emoji/share"] for each in steps]
    expected = [max(0.25, 0.9 - 0.65 * (step // 4 * 4) / 16) for step in range(30)]
    assert shares == pytest.approx(expected)
    assert all(each["shares"].keys() == {"emoji/share", "scenes/share"} for each in steps)
    of_first = [sum(number < trainer.mixing.sizes[0] for number in each["samples"]) for each in steps]
    assert sum(of_first[:4]) == pytest.approx(72, abs=2) and sum(of_first[16:28]) == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "mixing.to, mixing.steps: expected shares and a step, got None and 0"),
        ({"mixing.to": (1.0, 1.0)}, "mixing.to, mixing.steps: expected shares and a step"),
        ({"mixing.to": (1.0,), "mixing.steps": 5}, "mixing.to: expected a positive number for each of emoji, scenes"),
        ({"mixing.to": (1.0, 0.0), "mixing.steps": 5}, r"mixing.to: expected a positive number for .* got 1.0 0.0"),
    ],
)
def test_bad_ramps(parts: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said), started(config_of("clip", tmp_path, "ramp", parts)):
        pass
    with pytest.raises(ValueError, match=r"mixing.to, mixing.steps: expected none unless kind is ramp, got None, 3"):
        Mixing("progress", steps=3)
