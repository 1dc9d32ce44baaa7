"""What a run must be told that begins with another: samples that it has learned, classes, layers, streams, filters."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pretrain.conftest import COLOURS, SHAPES
from pretrain.test_data_filter import list_of
from pretrain.test_tasks import on_meta

from mmkernels.pretrain import Config, Transfer, finetuned, load_model, train
from mmkernels.pretrain.encoders import Adapted, Patches
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Shape, Stream
from mmkernels.pretrain.run_folder import RunFolder, RunFolderError, stored_classes, stored_records
from mmkernels.pretrain.schedule import learning
from mmkernels.pretrain.setup import open_source
from mmkernels.pretrain.transfer import transferred

SHORT = {"steps": 2, "warmup": 0, "eval_every": 0, "checkpoint_every": 0}
RETRIEVE = Transfer("retrieve")


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.pretrain.loop.write_report", lambda *_: None)


def rows(**labels: Callable[[str, str], Any]) -> list[dict[str, Any]]:
    """Of every picture of the folder, with labels by colour and shape."""
    return [
        {
            "image": f"{colour}-{shape}.png",
            "caption": f"a {colour} {shape}",
            **{name: label(colour, shape) for name, label in labels.items()},
        }
        for colour in COLOURS
        for shape in SHAPES
    ]


def write(path: Path, table: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(map(json.dumps, table)), encoding="utf-8")
    return f"folder:{path}"


def warnings(folder: RunFolder) -> list[str]:
    return [record["message"] for record in folder.records("warning")]


def held_out(config: Config) -> set[str]:
    """The pictures that a run holds out."""
    return {source.image_file(i) or "" for source in open_source(config).held_out.values() for i in range(len(source))}


def test_own_data_have_the_same_pictures_held_out_after_others(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Own data, then data that come along, then the own data again, read by image alone."""
    own = tiny(**SHORT)
    train(own)
    between = finetuned(own.folder, RETRIEVE, data="emoji", run=tmp_path / "between", **SHORT)
    train(between)
    again = finetuned(between.folder, RETRIEVE, data=own.data, run=tmp_path / "again")
    assert held_out(again) == held_out(own) != set()
    other = Config.of("clip", data="emoji", run=tmp_path / "emoji", parts=own.parts, tensorboard=False, **SHORT)
    train(other)
    assert finetuned(other.folder, RETRIEVE, data=own.data).held_out_by == (), "which have no own data before them"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_fraction": 0.4}, "eval_fraction is 0.4, there 0.2"),
        ({"validate": True}, "validate holds out a tenth of what it learned from"),
        (
            {"held_out_by": ("image",)},
            "concepts are told by image, there by image, text; as there: --held-out-by image",
        ),
        ({"eval_fraction": 0.1}, ""),  # fewer of the same
        ({"eval_fraction": 0.4, "data": "folder:OTHER"}, ""),
        ({"eval_fraction": 0.4, "scratch": True}, ""),
    ],
)
def test_samples_that_the_base_has_learned_are_told(
    tiny: Callable[..., Config], tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    base = tiny(**SHORT)
    train(base)
    transfer = Transfer("retrieve", scratch=changes.pop("scratch", False))
    if "data" in changes:
        (tmp_path / "other").mkdir()
        for file in (tmp_path / "pictures").iterdir():
            (tmp_path / "other" / file.name).write_bytes(file.read_bytes())
        changes["data"] = f"folder:{tmp_path / 'other'}"
    folder = train(finetuned(base.folder, transfer, run=tmp_path / "next", **SHORT, **changes)).folder
    found = [message for message in warnings(folder) if message.startswith("held_out: not the samples that")]
    assert len(found) == (said != "")
    assert all(said in message for message in found)


def test_other_classes_are_refused(tiny: Callable[..., Config], pictures: Path, tmp_path: Path) -> None:
    """When a run is resumed, and where a head goes on in another run."""
    base = tiny(**SHORT)
    train(base)
    table = pictures / "colours.jsonl"
    data = write(table, rows(colour=lambda colour, _: colour))
    transfer = Transfer("classify", label="colour", read=("image",))
    config = finetuned(base.folder, transfer, data=data, run=tmp_path / "colours", **SHORT)
    folder = train(config).folder
    before = stored_classes(folder.path)
    write(table, rows(colour=lambda colour, _: "zebra" if colour == "black" else colour))
    with pytest.raises(RunFolderError, match="keeps its classes, but colour has lost black and has gained zebra"):
        train(dataclasses.replace(config, resume=True, steps=2))
    assert stored_classes(folder.path) == before
    onward = dataclasses.replace(config, init=folder.path, fresh=(), run=tmp_path / "onward")
    with pytest.raises(
        ValueError, match=r"init: expected the classes of 'colour' .* has lost black and has gained zeb"
    ):
        train(onward)
    assert not (tmp_path / "onward").exists()
    train(dataclasses.replace(onward, fresh=("objectives.classes.*",)))


def test_samples_without_a_class_are_not_drawn_where_nothing_else_is_learned(
    tiny: Callable[..., Config], pictures: Path, tmp_path: Path
) -> None:
    base = tiny(**SHORT)
    train(base)
    data = write(pictures / "few.jsonl", rows(colour=lambda colour, shape: colour if shape == "circle" else None))
    transfer = Transfer("classify", label="colour", read=("image",))
    config = finetuned(base.folder, transfer, data=data, run=tmp_path / "few", **{**SHORT, "steps": 6, "batch": 2})
    train_set = open_source(config).train
    assert len(train_set) < len(COLOURS)
    assert all(train_set.peek(i)["colour"] >= 0 for i in range(len(train_set)))
    folder = train(config).folder
    assert all(record["loss"] > 0 for record in folder.records("step"))
    assert any("training samples have no colour: they are not drawn" in each for each in warnings(folder))


def test_an_objective_that_a_batch_says_nothing_to_has_no_loss(
    tiny: Callable[..., Config], pictures: Path, tmp_path: Path
) -> None:
    """Here one of classes beside a contrast; a 0 would be the best that there is."""
    recipe = tmp_path / "both.py"
    recipe.write_text(BOTH, encoding="utf-8")
    data = write(pictures / "few.jsonl", rows(colour=lambda _, shape: shape if shape in ("circle", "bar") else None))
    config = tiny(recipe=str(recipe), data=data, **{**SHORT, "steps": 8, "batch": 2, "chunk": 2, "parts": {}})
    steps = train(config).folder.records("step")
    assert len(steps) == 8
    told = [record["classes/loss"] for record in steps if "classes/loss" in record]
    assert 0 < len(told) < 8
    assert all(loss > 0.1 for loss in told)
    for record in steps:
        of_classes = record.get("classes/loss", 0.0)
        assert record["loss"] == pytest.approx(record["contrast/loss"] + of_classes, rel=1e-5)
        assert ("classes/chance" in record) == ("classes/loss" in record)


BOTH = """
from mmkernels.pretrain.encoders import HashedWords, Patches
from mmkernels.pretrain.objectives import Answer, Contrast
from mmkernels.pretrain.recipe import Recipe, Shape, Stream

RECIPE = Recipe(
    "A test", source="", data="emoji", model=Shape(16, 2, 8),
    streams={
        "image": Stream(Patches(layers=1, size=16, patch=8)),
        "text": Stream(HashedWords(layers=1)),
    },
    objectives={"contrast": Contrast("image", "text"), "classes": Answer("image", "colour")},
)
"""


def test_a_filter_list_goes_on_however_the_data_are_spelled(
    tiny: Callable[..., Config], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tiny(**SHORT)
    named = list_of(plain, [0, 3, 4], tmp_path / "drop.jsonl")
    base = dataclasses.replace(plain, filter=named)
    train(base)
    monkeypatch.chdir(pictures.parent)
    for same in (str(pictures), "pictures", f"folder:{pictures / 'captions.jsonl'}", f"folder:{pictures}/../pictures"):
        found = finetuned(base.folder, RETRIEVE, data=same)
        assert found.filter is not None, same
        assert len(open_source(found).train) == len(open_source(base).train)
    assert finetuned(base.folder, RETRIEVE, data="emoji").filter is None


def test_a_stream_that_the_base_learned_without_stays_away(tiny: Callable[..., Config], tmp_path: Path) -> None:
    small = {"model.width": 16, "model.heads": 2}
    base = tiny(recipe="vqa", data="scenes", without=("image",), run=tmp_path / "vqa", parts=small, **SHORT)
    train(base)
    assert finetuned(base.folder, Transfer("answer")).without == ("image",)
    assert finetuned(base.folder, Transfer("answer"), without=()).without == ()
    model = load_model(base.folder)
    images = [open_source(dataclasses.replace(base, without=())).train[0].values["image"]]
    with pytest.raises(ValueError, match="got image; the run learned without image"):
        model.embed("image", images)
    with pytest.raises(ValueError, match="values: expected some of the streams"):
        model.embed("image", [])
    with pytest.raises(ValueError, match="the run learned without image"):
        model.batch({"image": images, "question": ["what is it?"]})


def test_layers_of_a_fusion_that_never_ran_are_told(tiny: Callable[..., Config], tmp_path: Path) -> None:
    small = {"model.width": 16, "model.heads": 2}
    base = tiny(recipe="progressive", run=tmp_path / "base", parts=small, **SHORT)
    train(base)
    said = "ended at step 2, when its fusion had 0 layers in use; the layers after them have learned nothing"
    folder = train(finetuned(base.folder, Transfer("match", probe=True), run=tmp_path / "probe", **SHORT)).folder
    assert [message for message in warnings(folder) if said in message]
    whole = {f"stages.stage-{i}.until".replace("-", "_"): i + 1 for i in range(2)}
    ended = dataclasses.replace(base, steps=3, run=tmp_path / "ended", parts={**small, **whole})
    train(ended)
    folder = train(finetuned(ended.folder, Transfer("match", probe=True), run=tmp_path / "last", **SHORT)).folder
    assert not [message for message in warnings(folder) if "layers in use" in message]


def test_a_stream_may_be_called_as_if_it_were_a_norm() -> None:
    """Adapters and norms learn, and nothing else, whatever a stream is called."""

    def learn(name: str) -> set[str]:
        streams = {"image": Stream(Patches(layers=1)), name: Stream(Patches(layers=1), field="image")}
        base = Recipe("A test", "", "emoji", streams, {"contrast": Contrast("image", name)}, model=Shape(16, 2, 8))
        recipe = transferred(base, Transfer("retrieve", adapters=4))
        assert isinstance(recipe.streams[name].encoder, Adapted)
        model = on_meta(recipe)
        kinds = (torch.nn.LayerNorm, torch.nn.RMSNorm, torch.nn.GroupNorm)
        norms = {f"{key}.{each}" for key, module in model.named_modules() if isinstance(module, kinds)
                 for each, _ in module.named_parameters(recurse=False)}  # fmt: skip
        found = set(learning(model, recipe.stages[0]))
        assert norms <= found
        return {re.sub(rf"^streams\.{name}\.", "streams.it.", each) for each in found}

    assert learn("normals") == learn("norm") == learn("depth")


def test_a_tokenizer_that_is_taken_over_keeps_its_vocabulary(tiny: Callable[..., Config], tmp_path: Path) -> None:
    base = tiny(recipe="gpt", run=tmp_path / "gpt", parts={"model.width": 16, "model.heads": 2}, **SHORT)
    train(base)
    config = dataclasses.replace(base, init=base.folder, run=tmp_path / "next", vocabulary=base.vocabulary + 100)
    folder = train(config).folder
    assert [each for each in warnings(folder) if "which is taken over; " in each]
    assert not [each for each in stored_records(base.folder, "warning") if "taken over" in each["message"]]
