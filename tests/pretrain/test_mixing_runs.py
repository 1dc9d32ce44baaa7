"""Runs with measured shares: undisturbed by measuring, workers, ranks and resuming; ramps; what is measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from pretrain.started import SMALL, assert_equal, started, weights_of

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.mixing import Mixing, Taught
from mmkernels.pretrain.picture import picture
from mmkernels.pretrain.run_folder import stored_records
from mmkernels.pretrain.statistics import Statistics
from mmkernels.pretrain.trainer import Trainer

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


def test_runs_that_cannot_work(tmp_path: Path) -> None:
    def begun(**changes: Any) -> None:
        with started(config_of("clip", tmp_path, "progress", **changes)):
            pass

    with pytest.raises(ValueError, match=r"mixing.kind: expected fixed, since the data are no mixture \(A::B\), got"):
        begun(data="emoji")
    with pytest.raises(ValueError, match=r"mixing.every: expected at least 8, as many batches .*--workers 2"):
        begun(workers=2)
    with pytest.raises(ValueError, match=r"mixing.kind: expected fixed, since the data are no mixture"):
        train(config_of("clip", tmp_path, "progress", data="emoji"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["grad_norm", "progress"])
@pytest.mark.parametrize("recipe", ["moco", "albef", "cca"])
def test_measuring_leaves_no_trace(recipe: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of queues, twins, running covariances, the optimizer and random numbers; the batches are the same too, since the
    floor is 1."""
    settings = {"mixing.floor": 1.0, "model.dropout": 0.1, "model.embed_dim": 8}
    runs = []
    for measures in (True, False):
        if not measures:
            monkeypatch.setattr(Trainer, "_taught", lambda self, part, every: Taught({"nothing": 1.0}))
        with started(config_of(recipe, tmp_path, kind, settings, batch=16)) as trainer:
            found = stepped(trainer, 9)
            optimizer = trainer.optimizer.state_dict()["state"]
            runs.append((found, weights_of(trainer), optimizer, torch.get_rng_state(), trainer.flops.state_dict()))
    (found, weights, optimizer, state, flops), (alone, others, its_optimizer, its_state, its_flops) = runs
    assert_equal(weights, others)
    assert [each["loss"] for each in found] == [each["loss"] for each in alone] and flops == its_flops
    assert torch.equal(state, its_state)
    for number, values in optimizer.items():
        assert all(torch.equal(value, its_optimizer[number][name]) for name, value in values.items())
    assert recipe == "cca" or any(name.endswith("/gain") for name in found[8]["shares"])


def test_measuring_leaves_no_trace_in_batch_norm(tmp_path: Path) -> None:
    config = config_of("clip", tmp_path, "progress")
    with started(config) as trainer:
        norm = torch.nn.BatchNorm1d(32)
        encoder = trainer.model.encoder("text").encoder
        encoder.register_forward_hook(lambda module, _, x: norm(x) if torch.is_tensor(x) else x)
        encoder.norm_of_test = norm
        trainer.statistics = Statistics(trainer.model)
        trainer.begin()
        kept = norm.running_mean.clone()
        trainer._taught("emoji", trainer.mixing.objectives(0))
        assert torch.equal(norm.running_mean, kept) and int(norm.num_batches_tracked) == 0
        trainer._probed(trainer._probe("emoji", frozenset({"contrast"})), {"contrast": 1.0})
        assert int(norm.num_batches_tracked) > 0, "the layer does run"


@pytest.mark.parametrize("recipe", ["clip", "albef"])
def test_what_is_measured_is_loss_and_gradient_of_the_samples(recipe: str, tmp_path: Path) -> None:
    with started(config_of(recipe, tmp_path, "grad_norm")) as trainer:
        trainer.begin()
        model, data = trainer.model, trainer.loader.source
        assert data.shares is not None
        ((odds, weights),) = trainer.mixing.objectives(0)
        assert odds == 1.0 and weights.keys() == trainer.recipe.objectives.keys()
        for part, (name, items) in enumerate(trainer.mixing.probes.items()):
            start = sum(data.shares.sizes[:part])
            assert len(set(data.concepts[items].tolist())) == len(items) == 6
            assert start <= items.min() and items.max() < start + data.shares.sizes[part]
            told = trainer._taught(name, [(1.0, weights)])
            assert all(parameter.grad is None for parameter in trainer.parameters)
            batch = trainer._probe(name, frozenset(weights))
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
            found.append({name: trainer._taught(name, every) for name in trainer.mixing.probes})
    for name, told in found[0].items():
        assert found[1][name].losses == pytest.approx(told.losses, rel=1e-5) and found[1][name].norm == 0 < told.norm


def test_they_are_measured_in_the_precision_of_the_run(tmp_path: Path) -> None:
    found = []
    for precision in ("float32", "bfloat16"):
        with started(config_of("clip", tmp_path, "grad_norm", precision=precision)) as trainer:
            trainer.begin()
            found.append(trainer._taught("emoji", trainer.mixing.objectives(0)))
    assert (
        found[0].losses["contrast"] != found[1].losses["contrast"] == pytest.approx(found[0].losses["contrast"], 0.02)
    )
    assert found[0].norm != found[1].norm == pytest.approx(found[0].norm, 0.1)


def test_a_stage_has_shares_of_its_own(tmp_path: Path) -> None:
    """From within a window on."""
    parts = {"stages.stage_0.until": 3, "stages.stage_0.data_weights": (9.0, 1.0), "stages.stage_1.until": 30}
    config = config_of("progressive", tmp_path, "progress", {**parts, "mixing.floor": 1.0}, data_weights=(1.0, 1.0))
    with started(config) as trainer:
        shares = [each["shares"]["emoji/share"] for each in stepped(trainer, 9)]
    assert shares == pytest.approx([0.9] * 3 + [0.5] * 6)


def test_drawn_objectives_are_measured_one_by_one(tmp_path: Path) -> None:
    with started(config_of("uniter", tmp_path, "grad_norm", data="scenes::scenes")) as trainer:
        trainer.begin()
        every = trainer.mixing.objectives(0)
        assert all(len(weights) == 1 for _, weights in every) and math.fsum(odds for odds, _ in every) == 1.0
        part = next(iter(trainer.mixing.probes))
        told = trainer._taught(part, every)
        alone = [trainer._taught(part, [(1.0, weights)]) for _, weights in every]
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


@pytest.mark.parametrize(
    ("kind", "parallel"), [("grad_norm", "ddp"), ("progress", "ddp"), ("grad_norm", "fsdp"), ("progress", "fsdp")]
)
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


def test_a_run_says_what_it_cannot_measure(tmp_path: Path) -> None:
    """Once for each part; and that it is over before anything changes."""
    train(config_of("clip", tmp_path, "grad_norm", data="emoji::languages", steps=4, eval_every=0, eval_limit=8))
    train(config_of("clip", tmp_path / "2", "progress", data="emoji::languages", steps=13, eval_every=0, eval_limit=8))
    short, longer = ([each["message"] for each in stored_records(tmp_path / at / "run", "warning")] for at in ("", "2"))
    over = "mixing.every: the run ends at step 4; what is measured changes shares from step 4 on"
    silent = [message for message in longer if "nothing could be measured" in message]
    assert over in short and not any("what is measured" in message for message in longer)
    assert len(silent) == 1 and silent[0].startswith("mixing: of languages nothing could be measured: too few samples")


def test_a_skipped_step_counts_and_does_not_take_the_log_away(tmp_path: Path) -> None:
    with started(config_of("clip", tmp_path, "grad_norm")) as trainer:
        for skipped in (True, False, False):
            trainer.measure()
            trainer.begin()
            shares = trainer.backward(next(trainer.loader)).shares
            assert ("emoji/gain" in shares) == (trainer.step < 2), "once, in the first step that is in the log"
            trainer.skip() if skipped else trainer.update()
        assert math.fsum(trainer.mixing.state_dict()["mixing"]["dealt"].values()) == pytest.approx(3.0)


def test_batches_by_tokens(tmp_path: Path) -> None:
    """Within the bound, by measured shares, and from where a run was saved."""
    config = config_of("clip", tmp_path, "grad_norm", {"mixing.floor": 0.1}, batch=12, tokens=400, train_fraction=0.05)
    with started(config) as whole:
        steps = stepped(whole, 14)
    assert all(0 < len(each["samples"]) <= 12 for each in steps)
    assert steps[0]["shares"]["emoji/share"] != steps[13]["shares"]["emoji/share"]
    with started(config) as first:
        assert stepped(first, 6) == steps[:6]
        path = first.save(tmp_path / "checkpoints", wait=True)
    with started(config) as second:
        second.load(path)
        assert stepped(second, 8) == steps[6:]
