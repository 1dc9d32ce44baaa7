"""The loop learns, reports what it does, and stops where it must."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from mmkernels.pretrain import Config, load_model, main, train
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.guards import LossWatch
from mmkernels.pretrain.loop import open_source
from mmkernels.pretrain.recipes import recipe
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError
from mmkernels.pretrain.trainer import learning_rate

Make = Callable[..., Config]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_learns(name: str, tiny: Make) -> None:
    outcome = train(tiny(recipe=name, steps=60, batch=16, chunk=10, lr=2e-2, warmup=10, eval_every=0))
    losses = [record["loss"] for record in outcome.folder.records("step")]
    chance_loss = recipe(name).objective(tiny(recipe=name)).chance_loss(16)
    assert sum(losses[-10:]) / 10 < 0.9 * chance_loss
    (record,) = outcome.folder.records("eval")
    assert record["step"] == 60
    assert record["image_to_text"]["1"] > 2 * record["chance_image_to_text"]["1"]


def test_what_the_log_holds(tiny: Make) -> None:
    outcome = train(tiny(tensorboard=True))
    steps = outcome.folder.records("step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert record["tokens_per_s"] > record["samples_per_s"] > 0
        assert 0 <= record["data_wait"] <= 1
        assert record["peak_memory"] > 1e7
        assert all(math.isfinite(record[name]) for name in ("loss", "lr", "grad_norm", "logit_scale", "seconds"))
    assert steps[0]["lr"] == pytest.approx(0.5 * 1.5e-3)
    assert [record["step"] for record in outcome.folder.records("eval")] == [5, 10, 12]
    (start,) = outcome.folder.records("start")
    assert start["environment"]["torch"] == torch.__version__
    assert list((outcome.folder.path / "tensorboard").glob("events.*"))


def test_bfloat16_and_a_profile(tiny: Make) -> None:
    outcome = train(tiny(precision="bfloat16", steps=5, profile=(2, 2)))
    trace = json.loads((outcome.folder.path / "profile.json").read_text(encoding="utf-8"))
    assert sum("addmm" in event.get("name", "") for event in trace["traceEvents"]) > 0
    assert all(math.isfinite(record["loss"]) for record in outcome.folder.records("step"))


def test_a_broken_image_is_named(tiny: Make, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pictures / "red-cross.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture")
    outcome = train(tiny(max_broken=0.1, steps=8))
    (warning,) = outcome.folder.records("warning")
    assert "red-cross.png" in warning["message"]
    assert "red-cross.png" in capsys.readouterr().err
    assert "red-cross.png" in outcome.folder.report.read_text(encoding="utf-8")


def test_too_many_broken_images_stop_the_run(tiny: Make, pictures: Path, capsys, monkeypatch) -> None:
    for path in pictures.glob("blue-*.png"):
        path.write_bytes(b"")
    monkeypatch.setattr("mmkernels.pretrain.cli.parse", lambda argv: tiny(max_broken=0.1))
    assert main([]) == 1
    message = capsys.readouterr().err
    listing = message[message.index("4 of 30 samples could not be read") :]
    assert len(set(re.findall(r"blue-\w+\.png", listing))) == 4
    with pytest.raises(TooManyBrokenError):
        train(tiny(max_broken=0.1, resume=True))


def test_a_loss_that_does_not_move_is_pointed_out(tiny: Make) -> None:
    watch = LossWatch(patience=10)
    said = [watch.see(2.77, math.log(16)) for _ in range(30)]
    assert [i for i, text in enumerate(said) if text] == [9], "once, after ten steps"
    assert "chance is 2.773" in str(said[9])
    watch = LossWatch(patience=10)
    assert not any(watch.see(2.77 * 0.95**i, math.log(16)) for i in range(40))


def test_the_log_has_that_warning(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.pretrain.loop.LossWatch", partial(LossWatch, patience=4, margin=0.5))
    (warning,) = train(tiny(steps=6, lr=1e-9)).folder.records("warning")
    assert warning["step"] == 4
    assert "the loss has stayed" in warning["message"]


def test_chance_loss() -> None:
    """The loss of the best constant logit."""
    config = Config()
    for n in (2, 16, 300):
        assert recipe("clip").objective(config).chance_loss(n) == pytest.approx(math.log(n))
        bias = torch.linspace(-12, 4, 4001)
        pairs = -torch.nn.functional.logsigmoid(bias) - (n - 1) * torch.nn.functional.logsigmoid(-bias)
        assert recipe("siglip").objective(config).chance_loss(n) == pytest.approx(pairs.min().item(), rel=1e-3)


def test_the_scale_is_clamped() -> None:
    for name in ("clip", "siglip"):
        objective = recipe(name).objective(Config(recipe=name))
        objective.log_scale.data.fill_(7.0)
        objective.clamp_()
        assert objective.metrics()["logit_scale"] == pytest.approx(100.0)


def test_learning_rate() -> None:
    config = Config(steps=100, warmup=10, lr=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(Config(steps=5, warmup=0, lr=2.0), 0) == pytest.approx(2.0)


def test_the_run_folder_forgets_what_comes_after_a_checkpoint(tiny: Make) -> None:
    folder = RunFolder(tiny())
    lines = [{"kind": "start", "step": 0}, *({"kind": "step", "step": i} for i in (1, 2, 3))]
    folder.log.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st', encoding="utf-8")
    assert len(folder.records()) == 4
    folder.keep_log_until(2)
    assert [record["step"] for record in folder.records("step")] == [1, 2]
    assert folder.log.read_text(encoding="utf-8").endswith("}\n")


def test_a_trained_model_can_be_used(tiny: Make) -> None:
    config = tiny(steps=3)
    with pytest.raises(RunFolderError, match="no run"):
        load_model(config.folder)
    train(config)
    model, tokenizer = load_model(str(config.folder))
    held_out = open_source(config).evals
    recalls = evaluate(model, held_out, tokenizer)
    record = RunFolder(dataclasses.replace(config, resume=True)).records("eval")[-1]
    assert recalls["held_out"].to_dict() == {name: record[name] for name in recalls["held_out"].to_dict()}
    assert not model.training
