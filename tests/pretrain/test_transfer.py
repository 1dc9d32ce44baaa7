"""Transfer: what learns and what stays in runs that begin with other runs, and the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.conftest import COLOURS, SHAPES, draw
from pretrain.runs import TINY
from pretrain.test_data_filter import list_of
from pretrain.test_export import OWN
from pretrain.test_resume import assert_same_end, state
from pretrain.test_tasks import on_meta
from torch import Tensor

from mmkernels.pretrain import Config, Transfer, checkpoint, finetuned, load_model, main, train
from mmkernels.pretrain.config import from_dict, to_dict
from mmkernels.pretrain.evaluate_cli import Evaluation, evaluate_run
from mmkernels.pretrain.export import export
from mmkernels.pretrain.finetune import main as finetune
from mmkernels.pretrain.finetune import parse
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.load import stored_weights
from mmkernels.pretrain.report import write_report
from mmkernels.pretrain.run_folder import RunFolderError, stored_config, stored_records
from mmkernels.pretrain.schedule import freeze, rest
from mmkernels.pretrain.setup import open_source, read_by
from mmkernels.pretrain.stream import StreamEncoder
from mmkernels.pretrain.transfer import transferred


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of two towers on pictures that have a label, too; at a high rate, so that nothing is as it was drawn."""
    folder = tmp_path_factory.mktemp("transfer")
    rows = []
    for colour in COLOURS:
        for shape in SHAPES:
            draw(colour, shape).save(folder / f"{colour}-{shape}.png")
            rows.append({"image": f"{colour}-{shape}.png", "caption": f"a {colour} {shape}", "colour": colour})
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rate = {"steps": 3, "batch": 8, "chunk": 3, "warmup": 0, "lr": 0.02, "eval_every": 0, "eval_fraction": 0.2}
    config = Config(data=f"folder:{folder}", run=folder / "run", parts=TINY, tensorboard=False, threads=1, **rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmkernels.pretrain.loop.write_report", no_report)
        train(config)
    return config


def no_report(*_: Any) -> None:
    """The charts take longer than these runs."""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.pretrain.loop.write_report", no_report)


@pytest.fixture
def base(trained: Config, tmp_path: Path) -> Config:
    """A copy of it."""
    shutil.copytree(trained.folder, tmp_path / "base")
    return dataclasses.replace(trained, run=tmp_path / "base")


def colours(base: Path, **changes: Any) -> Config:
    """The config of a short run that learns the colours of pictures."""
    ways = {name: changes.pop(name) for name in ("probe", "adapters", "unfreeze", "scratch") if name in changes}
    transfer = Transfer("classify", label="colour", read=("image",), **ways)
    short = {"steps": 4, "warmup": 0, "lr": 0.02, "weight_decay": 0.5, "eval_every": 0, "checkpoint_every": 2}
    return finetuned(base, transfer, **{"run": base.parent / "run", **short, **changes})


def weights(run: Path, step: int | None = None) -> dict[str, Tensor]:
    if step is None:
        return stored_weights(run)[1]
    found = checkpoint.load_weights(checkpoint.steps_in(run / "checkpoints")[step])
    return {name.removeprefix("model."): tensor for name, tensor in found.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The tensors of both that are not the same bit for bit."""
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def test_a_probe_leaves_the_run_as_it_is(base: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step, no weight decay, no backward, no dropout reaches it; the optimizer has state for the head alone."""
    seen: list[tuple[bool, bool, bool]] = []
    forward = StreamEncoder.forward

    def spied(self: StreamEncoder, batch: Any) -> Tensor:
        out = forward(self, batch)
        seen.append((torch.is_grad_enabled(), out.requires_grad, self.training))
        return out

    monkeypatch.setattr(StreamEncoder, "forward", spied)
    config = colours(base.folder, probe=True, chunk=64)
    folder = train(config).folder
    assert (True, False, False) in seen, "with one chunk, the encoder runs where gradients would be kept"
    assert not any(requires_grad or training for _, requires_grad, training in seen)
    before, after = weights(base.folder), weights(folder.path)
    assert not changed(before, after)
    head = {name for name in after if name not in before}
    assert head == {
        f"objectives.classes.head.{each}" for each in ("norm.weight", "norm.bias", "project.weight", "project.bias")
    }
    assert changed(weights(folder.path, 2), after) == head
    kept = checkpoint.load(checkpoint.latest(folder.checkpoints))[1]["optimizer"]["tensors"]
    assert {name.rpartition(".")[0] for name in kept} == {f"model.{name}" for name in head}
    (start,) = folder.records("start")
    assert start["trainable"] == [sum(after[name].numel() for name in head)]
    assert start["parameters"] == sum(tensor.numel() for tensor in after.values())


def test_what_does_not_learn_rests(base: Config) -> None:
    """Also within a stream whose projection learns, and a block whose neighbour does."""
    recipe = transferred(base.wiring(), Transfer("retrieve", unfreeze="head:1,streams.text.encoder.blocks.*:2,all"))
    model = on_meta(recipe)
    drops = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert any(name.startswith("streams.image.") for name in drops)

    def active(stage: int) -> set[str]:
        freeze(model, recipe.stages[stage])
        rest(model)
        return {name for name, module in model.named_modules() if module.training}

    head, text, everything = active(0), active(1), active(2)
    assert {"streams.image.project.0", "streams.text.norm", "objectives.contrast"} <= head
    assert "streams.image.encoder" not in head and not head & drops
    assert text & drops == {name for name in drops if name.startswith("streams.text.")}
    assert everything == set(dict(model.named_modules()))


def test_adapters_and_norms_learn_and_nothing_else(base: Config) -> None:
    folder = train(colours(base.folder, adapters=4)).folder
    before, middle, after = weights(base.folder), weights(folder.path, 2), weights(folder.path)
    assert changed(before, after) == {name for name in before.keys() & after.keys() if "norm" in name}
    moved = changed(middle, after)
    assert {name for name in after if ".adapter." in name} <= moved
    assert all(".adapter." in name or "norm" in name or name.startswith("objectives.") for name in moved)
    assert folder.records("start")[0]["trainable"] == [sum(after[name].numel() for name in moved)]


def test_parts_begin_to_learn_one_after_the_other(base: Config) -> None:
    config = colours(
        base.folder, unfreeze="head:2,image.encoder.blocks.*:4,all".replace("image.", "streams.image."), steps=6
    )
    folder = train(dataclasses.replace(config, keep_checkpoints=9)).folder
    before, *steps = weights(base.folder), *(weights(folder.path, step) for step in (2, 4, 6))
    own = before.keys() & steps[0].keys()
    blocks = {name for name in own if name.startswith("streams.image.encoder.blocks.")}
    assert not changed(before, steps[0])
    assert changed(steps[0], steps[1]) & own == blocks
    assert changed(steps[1], steps[2]) >= own
    counts = folder.records("start")[0]["trainable"]
    assert counts == sorted(counts) and counts[-1] == folder.records("start")[0]["parameters"]


def train_to(step: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails just after a step."""
    whole = Journal.step

    def failing(self: Journal, at: int, *rest: Any, **figures: float) -> None:
        whole(self, at, *rest, **figures)
        if at == step:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", failing)
        with pytest.raises(OSError, match="disk full"):
            train(config)


def test_a_stopped_run_ends_where_it_would_have_ended(
    base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Bit for bit, also where a part begins to learn just after the checkpoint."""
    config = colours(base.folder, unfreeze="head:2,all", ema=0.5, train_fraction=0.7)
    train(dataclasses.replace(config, run=tmp_path / "whole"))
    train_to(3, config, monkeypatch)
    assert state(config.folder)[0] == 2
    shutil.rmtree(base.folder)  # it is not needed any more
    assert finetune(["--resume", "--run", str(config.folder)]) == 0, capsys.readouterr().err
    assert_same_end(config.folder, tmp_path / "whole")


def test_a_run_needs_nothing_outside_its_folder(
    trained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """But its data: a fine-tune of an exported model with a recipe and a filter list of its own, all of them gone."""
    mine, drop = tmp_path / "mine.py", tmp_path / "drop.jsonl"
    mine.write_text(OWN, encoding="utf-8")
    config = dataclasses.replace(trained, recipe=str(mine), parts={}, run=tmp_path / "run", ema=0.9, labels=("colour",))
    config = dataclasses.replace(config, filter=list_of(config, [2], drop))
    train_to(3, dataclasses.replace(config, checkpoint_every=2), monkeypatch)
    mine.rename(tmp_path / "moved.py")
    drop.unlink()
    assert main(["--resume", "--run", str(tmp_path / "run")]) == 0, capsys.readouterr().err
    base = export(tmp_path / "run", tmp_path / "exported")
    assert not changed(weights(tmp_path / "run"), weights(base))
    assert str(tmp_path) not in (base / "config.json").read_text(encoding="utf-8").replace(str(trained.data), "")

    config = colours(base, adapters=4, run=tmp_path / "tuned")
    train(dataclasses.replace(config, run=tmp_path / "whole"))
    train_to(3, config, monkeypatch)
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(base)
    tuned = (tmp_path / "tuned").rename(tmp_path / "cafés")
    argv = ["--resume", "--run", str(tuned)]
    assert finetune(argv) == 0, capsys.readouterr().err
    assert_same_end(tuned, tmp_path / "whole")
    assert load_model(tuned).collator.streams["image"].encoder.reduction == 4
    (tmp_path / "moved.py").write_text(OWN.replace("heads", "more heads") + "# another\n", encoding="utf-8")
    again = dataclasses.replace(stored_config(tuned), run=tuned, resume=True, recipe=str(tmp_path / "moved.py"))
    with pytest.raises(RunFolderError, match=r"recipe: mine\.py -> moved\.py"):
        train(again)
    (tmp_path / "moved.py").rename(mine)
    with pytest.raises(
        RunFolderError, match=r"recipe: expected the file that this run began with, kept as .*caf.s/mine"
    ):
        train(dataclasses.replace(again, recipe=str(mine)))


def test_from_scratch_nothing_of_the_run_is_left(base: Config, tmp_path: Path) -> None:
    """The same model as a fine-tune, as if it had no base."""
    config = colours(base.folder, scratch=True)
    assert config.folder != colours(base.folder, run=None).folder
    folder = train(config).folder
    (record,) = folder.records("init")
    assert record["loaded"] == [] and record["fresh"] and record["unused"] == sorted(record["unused"])
    train(dataclasses.replace(config, init=None, fresh=(), run=tmp_path / "alone"))
    assert_same_end(folder.path, tmp_path / "alone")


def test_a_finetuned_run_is_a_base_too(base: Config, tmp_path: Path) -> None:
    first = colours(base.folder, adapters=4)
    train(first)
    second = colours(first.folder, adapters=4, run=tmp_path / "second", seed=1)
    assert len(second.transfers) == 2 and from_dict(json.loads(json.dumps(to_dict(second)))) == second
    train(second)
    assert stored_config(second.folder) == second
    before, after = weights(first.folder), weights(second.folder)
    assert before.keys() == after.keys()
    assert not any(name.startswith("objectives.") for name in stored_records(second.folder, "init")[0]["loaded"])
    assert {name for name in after if ".adapter." in name} <= changed(before, after)
    assert load_model(second.folder).model.fusion is None
    rows = [
        json.dumps({"image": f"red-{shape}.png", "colour": colour})
        for shape, colour in zip(SHAPES, COLOURS[:5], strict=True)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    for shape in SHAPES:
        draw("red", shape).save(tmp_path / f"red-{shape}.png")
    data = f"folder:{tmp_path / 'rows.jsonl'}"  # which has no captions
    with pytest.raises(ValueError, match="expected the classes of 'colour' that the run has learned"):
        evaluate_run(Evaluation(second.folder, data=data))
    assert second.title == "classify colour, from classify colour, from clip"


def test_learning_rates_are_shares_of_the_first_run(base: Config) -> None:
    """However long the chain, whatever learned before, and exported or not."""
    rates = {"": 0.01, "probe": 0.1, "adapters": 0.04, "scratch": 0.02}
    ways: dict[str, dict[str, Any]] = {
        "": {},
        "probe": {"probe": True},
        "adapters": {"adapters": 2},
        "scratch": {"scratch": True},
    }
    for first, options in ways.items():
        one = finetuned(base.folder, Transfer("classify", label="colour", read=("image",), **options))
        assert one.lr == rates[first]
        (base.folder / "config.json").rename(base.folder / "kept")
        exported = dataclasses.replace(one, init=None, fresh=())
        (base.folder / "config.json").write_text(json.dumps(to_dict(exported)), encoding="utf-8")
        for second, others in ways.items():
            two = finetuned(base.folder, Transfer("classify", label="colour", **others))
            assert two.lr == rates[second], (first, second)
        (base.folder / "kept").rename(base.folder / "config.json")


def test_averaged_weights_are_taken(base: Config, tmp_path: Path) -> None:
    averaged = dataclasses.replace(base, run=tmp_path / "averaged", ema=0.9)
    train(averaged)
    config = colours(averaged.folder, probe=True)
    assert config.ema == 0
    assert not changed(weights(averaged.folder), weights(train(config).folder.path))


def test_the_same_samples_are_held_out(base: Config) -> None:
    """Also where what tells them apart, the captions, is not read any more; or was not read before."""

    def images(config: Config) -> dict[str, list[bytes]]:
        data = open_source(config)
        sets = {"train": data.train, **data.held_out}
        assert {field for source in sets.values() for i in range(len(source)) for field in source[i].values} == {
            *read_by(config.wiring())[0],
            *read_by(config.wiring())[1],
        }
        return {
            name: sorted(source[i].values["image"].tobytes() for i in range(len(source)))
            for name, source in sets.items()
        }

    assert images(colours(base.folder)) == images(base)
    first = dataclasses.replace(base, parts={}, recipe="mae")
    assert images(first) != images(base)
    (base.folder / "config.json").write_text(json.dumps(to_dict(first)), encoding="utf-8")
    tuned = colours(base.folder)
    assert tuned.held_out_by == ("image",) and images(tuned) == images(first)
    assert images(dataclasses.replace(base, held_out_by=("image",))) == images(first)
    assert colours(base.folder, data=base.data) == tuned
    assert colours(base.folder, data="emoji", labels=("colour",)).held_out_by == ("image",), "for what comes after"


def test_what_is_not_reached_is_pointed_out(base: Config) -> None:
    folder = train(colours(base.folder, unfreeze="head:2,image:9,all")).folder
    (said,) = folder.records("warning")
    assert said["message"] == "stages: the run ends at step 4, before 1 of its 3 stages begins"
    assert len(folder.records("start")[0]["trainable"]) == 2


def test_the_command_line(base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    argv = ["--from", str(base.folder), "--task", "classify", "--label", "colour", "--read", "image"]
    config = parse([*argv, "--lr", "0.5", "--steps", "7", "--streams.image.views.augment.scale", "0.5", "1.0"])
    assert (config.lr, config.steps, config.init) == (0.5, 7, base.folder)
    assert config.parts == {"streams.image.views.augment.scale": [0.5, 1.0]}
    assert config.wiring().model == base.wiring().model and config.data == base.data
    assert str(parse([*argv, "--probe"]).folder) == "runs/base-classify-probe"
    of_field = parse([*argv, "--field", "image=picture"])
    assert of_field.wiring().streams["image"].field == "picture"
    run = ["--run", str(tmp_path / "out")]
    short = ["--steps", "2", "--eval-every", "0"]
    for more, message in (
        (["--label", "shape"], "in 'shape'"),
        (["--field", "image=picture"], "'picture'"),
        (["--adapters", "99"], "reduction: expected at most the width 16, got 99"),
        (["--unfreeze", "*nothing*:1,all"], "'*nothing*', which fits none"),
        (["--model.width", "32"], "expected tensors of this model's shapes"),
        (["--batch", "99"], "expected 1 to 18 (the distinct concepts to train on), got 99"),
    ):
        assert finetune([*argv, *short, *run, *more]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    with monkeypatch.context() as patch:
        patch.setattr("mmkernels.pretrain.loop.write_report", write_report)
        assert finetune([*argv, *short, *run, "--probe"]) == 0
    assert "<h1>classify colour, from clip on folder:" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert "classes: accuracy" in out and "learned: " in out and "of " in out
    assert finetune([*argv, *short, *run, "--probe"]) == 1
    assert "Resume it with --resume" in capsys.readouterr().err
    assert finetune([*argv, *short, *run, "--probe", "--resume"]) == 0
    assert main(["--resume", *run]) == 0
    assert finetune(["--from", str(tmp_path / "nowhere"), "--task", "answer"]) == 1
    assert "holds no run" in capsys.readouterr().err
    assert finetune(["--resume"]) == 1
    assert "run: expected the folder of the run to resume, got none" in capsys.readouterr().err


def test_help_with_and_without_a_task(base: Config, capsys) -> None:
    """Of the task alone, or with every setting of the run."""
    own = ["--from", str(base.folder)]
    for argv in (["--help"], [*own, "--help"], [*own, "--task", "retrieve", "--help"]):
        with pytest.raises(SystemExit) as done:
            parse(argv)
        assert done.value.code == 0
        shown = capsys.readouterr().out
        assert "--adapters" in shown and ("--objectives.contrast" in shown) == ("retrieve" in argv)


def test_fresh_needs_a_run() -> None:
    with pytest.raises(ValueError, match=r"fresh: expected none without init, got \*"):
        Config(fresh=("*",))


def test_fresh_patterns_must_fit(base: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(base, run=tmp_path / "run", init=base.folder, fresh=("nothing.*",))
    with pytest.raises(ValueError, match=r"fresh: expected patterns of parameter names, got 'nothing\.\*'"):
        train(config)
