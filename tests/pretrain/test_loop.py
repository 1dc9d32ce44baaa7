"""The loop learns, reports what it does, and stops where it must."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pretrain.runs import TINY

from mmkernels.pretrain import Config, Facts, Shape, checkpoint, load_model, main, train
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data import TooManyBrokenError
from mmkernels.pretrain.evaluate import evaluate
from mmkernels.pretrain.guards import LossWatch, NotFiniteError, StepGuard
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives import Contrast, Sigmoid
from mmkernels.pretrain.recipes import load
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError
from mmkernels.pretrain.schedule import learning_rate
from mmkernels.pretrain.setup import open_source
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.trainer import Trainer

Make = Callable[..., Config]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_learns(name: str, tiny: Make) -> None:
    outcome = train(tiny(recipe=name, steps=60, batch=16, chunk=10, lr=2e-2, warmup=10, eval_every=0))
    steps = outcome.folder.records("step")
    losses = [record["loss"] for record in steps]
    assert sum(losses[-10:]) / 10 < 0.9 * steps[-1]["chance"]
    (record,) = outcome.folder.records("eval")
    assert record["step"] == 60
    first = record["figures"][0]
    assert first["name"] == "image → text R@1"
    assert first["value"] > 2 * first["chance"]


def test_what_the_log_holds(tiny: Make) -> None:
    outcome = train(tiny(tensorboard=True))
    steps = outcome.folder.records("step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    for record in steps:
        assert record["tokens_per_s"] > record["samples_per_s"] > 0
        assert record["tokens"] > 4 * 8, "four tokens an image, and words"
        assert 0 <= record["padding_saved"] < 1
        assert 0 <= record["data_wait"] <= 1
        assert record["peak_memory"] > 1e7
        assert all(
            math.isfinite(record[name]) for name in ("loss", "lr", "grad_norm", "contrast/logit_scale", "seconds")
        )
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


def test_an_evaluation_without_any_figure_is_pointed_out(tiny: Make) -> None:
    """Concepts that are left out to validate are not those that a probe has learned."""
    config = Config.of("moco", run=tiny().run, steps=1, batch=8, eval_limit=32, validate=True, tensorboard=False)
    config = dataclasses.replace(config, parts={"model.width": 32, "model.heads": 2})
    (warning,) = train(config).folder.records("warning")
    message = "nothing could be measured: NearestNeighbours, LinearProbe give no figure of validation"
    assert warning["message"] == message


def objective(name: str, part: Any) -> Any:
    return part.build(Facts(Shape(), 300, {}, load(name).streams))


def test_chance_loss() -> None:
    """The loss of the best constant logit."""
    for n in (2, 16, 300):
        ends = torch.arange(n + 4).clamp(max=n)  # the last three samples lack both
        held = SimpleNamespace(cu_seqlens=ends, cu_seqlens_host=ends.tolist())
        streams: Any = {"image": held, "text": held}
        batch = Batch(streams, {}, torch.arange(n + 3), ["x"] * (n + 3), list(range(n + 3)), 0)
        assert objective("clip", Contrast()).chance_loss(batch) == pytest.approx(math.log(n))
        bias = torch.linspace(-12, 4, 4001)
        pairs = -torch.nn.functional.logsigmoid(bias) - (n - 1) * torch.nn.functional.logsigmoid(-bias)
        assert objective("siglip", Sigmoid()).chance_loss(batch) == pytest.approx(pairs.min().item(), rel=1e-3)


def test_the_scale_is_clamped() -> None:
    for name, part in (("clip", Contrast()), ("siglip", Sigmoid())):
        built = objective(name, part)
        built.loss.log_scale.data.fill_(7.0)
        built.after_step()
        assert built.metrics()["logit_scale"] == pytest.approx(100.0)


def test_learning_rate() -> None:
    rates = [learning_rate(2.0, 10, 100, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert all(a >= b for a, b in pairwise(rates[10:]))
    assert learning_rate(2.0, 0, 5, 0) == pytest.approx(2.0)


def test_the_run_folder_forgets_what_comes_after_a_checkpoint(tiny: Make) -> None:
    folder = RunFolder(tiny())
    folder.begin(tiny(), "{}", {})
    lines = [{"kind": "start", "step": 0}, *({"kind": "step", "step": i} for i in (1, 2, 3))]
    folder.log.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "st', encoding="utf-8")
    assert len(folder.records()) == 4
    folder.keep_log_until(2)
    assert [record["step"] for record in folder.records("step")] == [1, 2]
    assert folder.log.read_text(encoding="utf-8").endswith("}\n")


def test_a_run_folder_that_cannot_be(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taken while the data were opened, or below a file."""
    opened = open_source

    def opening(config: Config) -> Any:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text("{}", encoding="utf-8")
        return opened(config)

    with monkeypatch.context() as patch:
        patch.setattr("mmkernels.pretrain.loop.open_source", opening)
        with pytest.raises(RunFolderError, match="run holds files already"):
            train(tiny())
    assert (tmp_path / "run" / "config.json").read_text(encoding="utf-8") == "{}"
    with pytest.raises(RunFolderError, match=r"run: expected a folder that can be made, got .*config\.json/below"):
        train(tiny(run=tmp_path / "run" / "config.json" / "below"))


def test_a_trained_model_can_be_used(tiny: Make) -> None:
    config = tiny(steps=3)
    with pytest.raises(RunFolderError, match="no run"):
        load_model(config.folder)
    train(config)
    pretrained = load_model(str(config.folder))
    data = open_source(config)
    held_out = {
        name: HeldOut(name, source, pretrained.collator, torch.device("cpu"), data.train)
        for name, source in data.held_out.items()
    }
    found = evaluate(pretrained.model, config.wiring().metrics, held_out)
    record = RunFolder(dataclasses.replace(config, resume=True)).records("eval")[-1]
    assert [figure.to_dict() for figure in found["held_out"]] == record["figures"]
    assert not pretrained.model.training

    sample = data.held_out["held_out"][0]
    image, text = pretrained.embed("image", [sample.image] * 2), pretrained.embed("text", ["a red bar", "x"])
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    assert text.shape == (2, 8)
    nothing = pretrained.embed("text", [])
    assert nothing.shape == (0, 8) and nothing.dtype == text.dtype
    for values in ([None], []):
        with pytest.raises(ValueError, match="values: expected some of the streams image, text, got sound"):
            pretrained.embed("sound", values)


def test_averaged_weights_are_evaluated_and_loaded(tiny: Make) -> None:
    config = tiny(steps=6, ema=0.5, eval_every=0)
    outcome = train(config)
    weights = checkpoint.load_weights(checkpoint.latest(outcome.folder.checkpoints))
    name = "streams.image.project.0.weight"
    average, newest = weights[f"average.module.{name}"], weights[f"model.{name}"]
    assert not torch.equal(average, newest)
    assert torch.equal(load_model(config.folder).model.state_dict()[name], average)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = Trainer.backward

    def failing(self: Trainer, batch: Batch) -> Any:
        found = backward(self, batch)
        return found._replace(loss=float("nan")) if batch.step in (3, 7, 9) else found

    monkeypatch.setattr(Trainer, "backward", failing)
    folder = train(tiny(skip=3, checkpoint_every=4, eval_every=0)).folder
    assert [record["step"] for record in folder.records("step")] == [1, 2, 3, 5, 6, 7, 9, 11, 12]
    assert len(folder.records("warning")) == 3
    with pytest.raises(NotFiniteError, match="step 9: the loss is nan"):
        train(tiny(skip=2, run=folder.path.parent / "fewer", eval_every=0))


def test_a_spike_is_a_fault() -> None:
    guard = StepGuard(allowed=1, spike=5.0)
    assert not any(guard.fault(1.0, 1.0 + 0.1 * (i % 3)) for i in range(30))
    assert "running mean" in guard.fault(1.0, 9.0)
    other = StepGuard(allowed=1, spike=5.0)
    assert other.fault(1.0, 9.0) == "", "nothing is known yet"
    other.load_state_dict(guard.state_dict())
    assert "running mean" in other.fault(1.0, 9.0)
    assert guard.may_skip() and not guard.may_skip()


def gradients(config: Config) -> dict[str, torch.Tensor]:
    """Of the first batch."""
    data = open_source(config)
    trainer = Trainer(config, data, TextTokenizer.train([], 400), torch.device("cpu"))
    trainer.begin()
    trainer.backward(next(trainer.loader))
    return {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("change", [{"chunk": 8}, {"chunk": 1}, {"recompute": True}, {"workers": 2}, {"compile": True}])
def test_the_gradient_does_not_depend_on_how_it_is_computed(
    change: dict[str, Any], tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks (which accumulate), recomputed activations, workers, compiled blocks: the scale's gradient too."""
    # Traced and differentiated as usual; that Inductor, which takes half a minute, can lower the ops is their test.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    still = {**TINY, "model.dropout": 0.0}
    expected, got = gradients(tiny(parts=still)), gradients(tiny(parts=still, **change))
    assert expected.keys() == got.keys()
    assert "objectives.contrast.loss.log_scale" in got
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_batches_bounded_by_tokens(tiny: Make) -> None:
    folder = train(tiny(tokens=60, batch=6, eval_every=0)).folder
    steps = folder.records("step")
    assert len(steps) == 12
    assert all(record["tokens"] <= 60 for record in steps)
    assert sum(record["tokens"] for record in steps) > 0.5 * 60 * len(steps)
    with pytest.raises(ValueError, match="tokens: expected at least the longest sample's, got 5, but sample 0 has 7"):
        train(tiny(tokens=5, run=folder.path.parent / "few"))


def test_what_the_data_lacks_is_said_before_the_first_step(tiny: Make, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text(MINE, encoding="utf-8")
    with pytest.raises(ValueError, match="expected values in every field that is read, got none in 'sound'"):
        train(tiny(recipe=str(recipe), parts={}))
    lacks = r"the field 'sound', which streams\.a of recipe .*mine\.py reads, got emoji, which has image, text"
    with pytest.raises(ValueError, match=lacks):
        train(tiny(recipe=str(recipe), parts={}, data="emoji"))
    assert not (tmp_path / "run").exists()


MINE = """
from mmkernels.pretrain.encoders import HashedWords
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Stream

RECIPE = Recipe(
    "Mine", source="mine", data="emoji",
    streams={"a": Stream(HashedWords(), field="sound"), "b": Stream(HashedWords(), field="text")},
    objectives={"contrast": Contrast("a", "b")},
)
"""


def test_what_workers_get_can_be_sent(tiny: Make) -> None:
    """Where processes are spawned, not forked, it is pickled."""
    config = tiny(parts=TINY)
    trainer = Trainer(config, open_source(config), TextTokenizer.train([], 400), torch.device("cpu"))
    sent = pickle.loads(pickle.dumps(trainer.loader._builder))
    assert list(sent.collator.streams) == ["image", "text"]
