"""Transfer: what each task makes of each recipe, what learns and what stays, and runs that begin with other runs."""

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
from pretrain.test_resume import assert_same_end, state
from torch import Tensor

from mmkernels.pretrain import Config, Recipe, Transfer, checkpoint, finetuned, load_model, main, recipes, train
from mmkernels.pretrain.config import from_dict, to_dict
from mmkernels.pretrain.finetune import main as finetune
from mmkernels.pretrain.finetune import parse
from mmkernels.pretrain.journal import Journal
from mmkernels.pretrain.load import stored_weights
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.run_folder import stored_config, stored_records
from mmkernels.pretrain.schedule import check_stages, freeze, learning, rest
from mmkernels.pretrain.stream import StreamEncoder
from mmkernels.pretrain.transfer import transferred
from mmkernels.pretrain.unfreezing import stages_of

CLASSES = {name: ("a", "b", "c") for name in ("answer", "colour", "tag", "action", "relation")}


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
    train(config)
    return config


@pytest.fixture
def base(trained: Config, tmp_path: Path) -> Config:
    """A copy of it."""
    shutil.copytree(trained.folder, tmp_path / "base")
    return dataclasses.replace(trained, run=tmp_path / "base")


def colours(base: Path, **changes: Any) -> Config:
    """The config of a short run that learns the colours of pictures."""
    ways = {name: changes.pop(name) for name in ("probe", "adapters", "unfreeze") if name in changes}
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


def on_meta(recipe: Recipe) -> Model:
    with torch.device("meta"):
        return Model(recipe, Facts(recipe.model, 300, CLASSES, recipe.streams))


FITS = [
    ("albef", Transfer("answer"), {"image", "text"}),
    ("albef", Transfer("answer", adapters=8), {"image", "text"}),
    ("albef", Transfer("match"), {"image", "text"}),
    ("albef", Transfer("retrieve"), {"image", "text"}),
    ("albef", Transfer("classify", "tag", ("image",), probe=True), {"image"}),
    ("mae", Transfer("classify", "tag"), {"image"}),
    ("mae", Transfer("classify", "tag", adapters=4), {"image"}),
    ("mae", Transfer("classify", "tag", unfreeze="head:5,image"), {"image"}),
    ("clip", Transfer("retrieve", unfreeze="head:5,image:9,all"), {"image", "text"}),
    ("siglip", Transfer("retrieve", adapters=8), {"image", "text"}),
    ("siglip", Transfer("classify", "tag", ("text",)), {"text"}),
    ("moco", Transfer("classify", "tag"), {"query"}),
    ("simclr", Transfer("classify", "tag"), {"a"}),
    ("simclr", Transfer("retrieve", unfreeze="head : 5, all"), {"a", "b"}),  # whose objective has no parameters
    ("cca", Transfer("retrieve", unfreeze="head:5,all"), {"image", "text"}),
    ("devise", Transfer("retrieve"), {"image", "text"}),
    ("vqa", Transfer("answer", "colour"), {"image", "question"}),
    ("vqa", Transfer("answer", probe=True), {"image", "question"}),
    ("uniter", Transfer("answer", unfreeze="head:5,fusion:9,regions+text"), {"text", "regions"}),
    ("uniter", Transfer("match"), {"text", "regions"}),
    ("vilbert", Transfer("answer", adapters=2), {"text", "regions"}),
    ("caption", Transfer("caption", adapters=8), {"image", "text"}),
    ("flamingo", Transfer("caption"), {"image", "text"}),
    ("gpt", Transfer("caption"), {"text"}),
    ("video", Transfer("answer", "action"), {"video", "question"}),
    ("adapters", Transfer("retrieve", adapters=8), {"image", "text"}),
]


@pytest.mark.parametrize(("name", "transfer", "streams"), FITS)
def test_what_a_task_keeps(name: str, transfer: Transfer, streams: set[str]) -> None:
    """Every parameter but those of the head and of adapters is the base's, by name and shape; every stage fits."""
    base = recipes.load(name)
    made = transferred(base, transfer)
    if name != "moco":
        assert set(made.streams) == streams
    before, after = dict(on_meta(base).named_parameters()), dict(on_meta(made).named_parameters())
    (objective,) = made.objectives
    new = {each for each in after if each not in before}
    assert all(each.startswith(f"objectives.{objective}.") or ".adapter." in each for each in new)
    assert all(after[each].shape == before[each].shape for each in after.keys() & before.keys())
    assert any(each in before for each in after)
    check_stages(made, on_meta(made))
    learned = sum(after[each].numel() for each in learning(on_meta(made), made.stages[0]))
    full = not (transfer.probe or transfer.adapters or transfer.unfreeze)
    assert full == (learned == sum(each.numel() for each in after.values()))
    assert all(stream.teacher is None for stream in made.streams.values())


@pytest.mark.parametrize(
    ("name", "transfer", "message"),
    [
        ("mae", Transfer("answer"), "task: answer: expected a run with a fusion, got one without; its streams are ima"),
        ("mae", Transfer("retrieve"), "task: retrieve: expected a run with two streams, got one with image"),
        ("clip", Transfer("caption"), "task: caption: expected a run with one causal stream, got one without"),
        ("clip", Transfer("classify", "tag"), "read: task classify: expected one of the streams image, text, got no c"),
        ("clip", Transfer("classify", "tag", ("imag",)), "expected one of the streams image, text, got imag"),
        ("clip", Transfer("classify"), "label: expected the field of the data with the class"),
        ("clip", Transfer("retrieve", "tag"), "label: expected none for task retrieve"),
        ("clip", Transfer("retrieve", field=("texts=title",)), "field: expected a stream of the task .image, text., g"),
        ("adapters", Transfer("retrieve", adapters=4), "adapters: expected 8, as the run has already, got 4"),
        ("albef", Transfer("answer", unfreeze="masked:2,all"), "expected one of head, fusion, image, text, all"),
    ],
)
def test_what_does_not_fit(name: str, transfer: Transfer, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        transferred(recipes.load(name), transfer)


def test_what_the_run_measures_of_the_same_objective_is_measured_again() -> None:
    def measured(name: str, task: Any) -> list[str]:
        return [type(metric).__name__ for metric in transferred(recipes.load(name), Transfer(task)).metrics]

    assert measured("vqa", "answer") == ["Predictions", "Groups"]
    assert measured("caption", "caption") == ["Predictions", "Captioning"]
    assert measured("flamingo", "caption") == ["Predictions", "Ablation", "Shots"]
    assert measured("uniter", "match") == ["Predictions", "Matched"]
    assert measured("albef", "match") == ["Predictions"]  # no re-ranking without embeddings to compare
    assert measured("clip", "retrieve") == ["Retrieval"]


def test_a_probe_sees_samples_as_they_are() -> None:
    def views(name: str, **way: Any) -> dict[str, list[str]]:
        made = transferred(recipes.load(name), Transfer(**way))
        return {key: [type(view).__name__ for view in stream.views] for key, stream in made.streams.items()}

    assert views("mae", task="classify", label="tag") == {"image": ["RandomCrop"]}
    assert views("mae", task="classify", label="tag", probe=True) == {"image": []}
    assert views("uniter", task="match", probe=True) == {"text": ["Swap"], "regions": []}  # which makes the wrong pairs


def test_wrong_transfers() -> None:
    with pytest.raises(ValueError, match="probe, adapters, unfreeze: expected one of them at most, got --probe, --unf"):
        Transfer("answer", probe=True, unfreeze="all")
    with pytest.raises(ValueError, match="adapters: expected at least 1, got 0"):
        Transfer("answer", adapters=0)
    with pytest.raises(ValueError, match="field: expected STREAM=FIELD, such as text=title, got 'text'"):
        Transfer("answer", field=("text",))
    with pytest.raises(ValueError, match=r"task: expected one of answer, .*, got 'vqa'"):
        Transfer("vqa")  # type: ignore[arg-type]


NAMED = {"head": ("objectives.x.*",), "fusion": ("fusion.*",), "image": ("streams.image.*",)}


def test_a_schedule_of_unfreezing() -> None:
    head, fusion, image, more = stages_of("head:100, fusion+*norm*:300,image:301,all", NAMED)
    assert [stage.until for stage in (head, fusion, image, more)] == [100, 300, 301, None]
    assert head.trainable == ("objectives.x.*",)
    assert fusion.trainable == ("objectives.x.*", "fusion.*", "*norm*")
    assert image.trainable == (*fusion.trainable, "streams.image.*")
    assert more.trainable == (*image.trainable, "*")
    assert stages_of("head", NAMED) == stages_of("head+head", NAMED)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("head:100", "expected the last item without a step, since it lasts, got 'head:100'"),
        ("head,all", "expected PARTS:STEP with a step after 0, got 'head' in 'head,all'"),
        ("head:0,all", "with a step after 0, got 'head:0'"),
        ("head:5,fusion:5,all", "with a step after 5, got 'fusion:5'"),
        ("head:five,all", "with a step after 0, got 'head:five'"),
        ("head:²,all", "with a step after 0"),
        ("text:5,all", "expected one of head, fusion, image, all, or a pattern with a \"[*]\", got 'text'"),
        ("", "got ''"),
        ("head:5,", "got ''"),
        ("head+:5,all", "got ''"),
    ],
)
def test_wrong_schedules(schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"unfreeze: .*{message}"):
        stages_of(schedule, NAMED)


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
    assert len(checkpoint.load(checkpoint.latest(folder.checkpoints))[1]["optimizer"]["state"]) == len(head)
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


@pytest.mark.parametrize("way", [{"unfreeze": "head:2,all"}, {"adapters": 4}])
def test_a_stopped_run_ends_where_it_would_have_ended(
    way: dict[str, Any], base: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Bit for bit, also where a part begins to learn just after the checkpoint."""
    config = colours(base.folder, **way, steps=6)
    train(dataclasses.replace(config, run=tmp_path / "whole"))
    step = Journal.step

    def failing(self: Journal, at: int, *rest: Any, **figures: float) -> None:
        step(self, at, *rest, **figures)
        if at == 3:
            raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "step", failing)
        with pytest.raises(OSError, match="disk full"):
            train(config)
    assert state(config.folder)[0] == 2
    base.folder.rename(tmp_path / "elsewhere")  # it is not needed any more
    assert finetune(["--resume", "--run", str(config.folder)]) == 0, capsys.readouterr().err
    assert_same_end(config.folder, tmp_path / "whole")


def test_from_scratch_nothing_of_the_run_is_left(base: Config, tmp_path: Path) -> None:
    """The same model as a fine-tune, as if it had no base."""
    config = colours(base.folder, scratch=True)
    assert config.folder != colours(base.folder, run=None).folder
    folder = train(config).folder
    (record,) = folder.records("init")
    assert record["loaded"] == [] and record["fresh"]
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


def test_averaged_weights_are_taken(base: Config, tmp_path: Path) -> None:
    averaged = dataclasses.replace(base, run=tmp_path / "averaged", ema=0.9)
    train(averaged)
    config = colours(averaged.folder, probe=True)
    assert config.ema == 0
    assert not changed(weights(averaged.folder), weights(train(config).folder.path))


def test_the_command_line(base: Config, tmp_path: Path, capsys) -> None:
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
    ):
        assert finetune([*argv, *short, *run, *more]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
    assert finetune([*argv, *short, *run, "--probe"]) == 0
    out = capsys.readouterr().out
    assert "classes: accuracy" in out and "learned: " in out and "of " in out
    assert finetune([*argv, *short, *run, "--probe"]) == 1
    assert "Resume it with --resume" in capsys.readouterr().err
    assert finetune([*argv, *short, *run, "--probe", "--resume"]) == 0
    assert main(["--resume", *run]) == 0
    assert finetune(["--from", str(tmp_path / "nowhere"), "--task", "answer"]) == 1
    assert "holds no run" in capsys.readouterr().err


def test_fresh_needs_a_run() -> None:
    with pytest.raises(ValueError, match=r"fresh: expected none without init, got \*"):
        Config(fresh=("*",))


def test_fresh_patterns_must_fit(base: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(base, run=tmp_path / "run", init=base.folder, fresh=("nothing.*",))
    with pytest.raises(ValueError, match=r"fresh: expected patterns of parameter names, got 'nothing\.\*'"):
        train(config)
