"""The same data read in several ways, as pretraining, fine-tuning and evaluation do: the same concepts are held out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pretrain.runs import TINY

from mmkernels.pretrain import Config, Transfer, finetuned, train
from mmkernels.pretrain.data import open_data
from mmkernels.pretrain.data.base import Source
from mmkernels.pretrain.data.opening import NoConceptsError
from mmkernels.pretrain.data_report import DataReport, data_report
from mmkernels.pretrain.evaluate_cli import Evaluation, _opened, evaluate_run
from mmkernels.pretrain.run_folder import stored_config
from mmkernels.pretrain.setup import open_source

COLOURS = ("red", "green", "blue", "grey")
IMAGES = 40


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmkernels.pretrain.loop.write_report", lambda *_: None)


def folder_of(folder: Path, captions: int = 3, **more: Any) -> Path:
    """Pictures of noise, of which each has some captions, a row each."""
    folder.mkdir()
    random = np.random.default_rng(0)
    rows = []
    for i in range(IMAGES):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / f"{i}.png")
        row = {"image": f"{i}.png", "colour": COLOURS[i % 4], **more}
        rows += [{**row, "caption": f"{k}th of {i}"} for k in range(captions)] if captions else [row]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


@pytest.fixture
def several(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "several")


def pictures(source: Source) -> set[bytes]:
    return {source[i].values["image"].tobytes() for i in range(len(source))}


def base(folder: Path, **changes: Any) -> Config:
    options: dict[str, Any] = {"steps": 2, "batch": 8, "warmup": 0, "eval_every": 0, "eval_fraction": 0.2, "threads": 1}
    options |= {"tensorboard": False, "parts": TINY, "run": folder.parent / "base", **changes}
    return Config(data=f"folder:{folder}", **options)


def done(config: Config) -> Config:
    """Of a run that has been trained."""
    train(config)
    return config


def colours(run: Path, **changes: Any) -> Config:
    options = {"steps": 2, "warmup": 0, "eval_every": 0, "run": run.parent / "tuned", **changes}
    return finetuned(run, Transfer("classify", label="colour", read=("image",)), **options)


def test_the_rows_of_an_image_are_one_concept(several: Path) -> None:
    options: dict[str, Any] = {"eval_fraction": 0.3}
    by_image = open_data(several, **options)
    held_out = pictures(by_image.held_out["held_out"])
    assert 4 < len(held_out) < 20
    for more in ({"labels": ("colour",)}, {"fields": ("image",), "held_out_by": ("image", "text")}):
        by_row = open_data(several, **options, **more)
        assert len(by_row.train) in (len(by_image.train), 3 * len(by_image.train))
        assert pictures(by_row.held_out["held_out"]) == held_out
        assert pictures(by_row.train) == pictures(by_image.train)
    alone = open_data(several, fields=("image", "colour"), labels=("colour",), **options)
    assert not pictures(alone.train) & pictures(alone.held_out["held_out"])


def test_rows_of_regions_are_one_concept_by_their_image(tmp_path: Path) -> None:
    rows = [
        {"image": f"{i}.png", "regions": [{"box": [0, 0, 1, 1], "tag": "a"}], "question": question}
        for i in range(20)
        for question in ("what?", "where?")
    ]
    folder = folder_of(tmp_path / "regions", 0)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    data = open_data(folder, fields=("regions", "question"), eval_fraction=0.3)
    assert len(np.unique(data.train.concepts)) == len(data.train) / 2 > 8


def test_a_fine_tune_learns_nothing_that_was_held_out(several: Path) -> None:
    config = done(base(several))
    before, after = open_source(config), open_source(colours(config.folder))
    assert pictures(before.held_out["held_out"]) == pictures(after.held_out["held_out"])
    assert pictures(before.train) == pictures(after.train)


def test_of_a_copy_the_same_is_held_out(several: Path, tmp_path: Path) -> None:
    """In another place, for an evaluation and for a fine-tune."""
    config = done(base(several))
    tuned = done(colours(config.folder))
    copy = f"folder:{shutil.copytree(several, tmp_path / 'copy')}"
    held_out = pictures(open_source(config).held_out["held_out"])
    assert pictures(_opened(Evaluation(tuned.folder, data=copy), tuned)[0].held_out["held_out"]) == held_out
    assert pictures(open_source(colours(config.folder, data=copy)).held_out["held_out"]) == held_out
    assert colours(config.folder, data="emoji").held_out_by == ("image", "text"), "for what comes after"


def test_a_list_of_images_is_one_of_their_rows(several: Path, tmp_path: Path) -> None:
    """A run that left some images out is fine-tuned without them."""
    rows = (several / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    copied = {**json.loads(rows[0]), "image": "copy.png"}
    shutil.copy(several / "0.png", several / "copy.png")
    (several / "rows.jsonl").write_text("\n".join([*rows, json.dumps(copied)]), encoding="utf-8")
    source = f"folder:{several}"
    report = data_report(DataReport(source, out=tmp_path / "r", drop=("same-picture",), eval_fraction=0.0))
    assert [finding.name for finding in report.findings] == ["copy.png"]
    config = done(base(several, filter=tmp_path / "r/drop.jsonl", eval_fraction=0.0))
    names = {open_source(config).train.name(i) for i in range(IMAGES)}
    assert "copy.png" not in names and len(names) == IMAGES
    tuned = open_source(colours(config.folder))
    assert len(tuned.train) == 3 * IMAGES
    assert "rows.jsonl: line 121" not in {tuned.train.name(i) for i in range(3 * IMAGES)}
    with pytest.raises(ValueError, match="or read all of them, with --filter None"):
        open_source(colours(config.folder, eval_fraction=0.5))


def test_fields_that_tell_concepts_may_be_missing(several: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(several, fields=("image", "text"), held_out_by=("image", "title"))
    assert data.train.fields == ("image", "text")
    assert f"held_out_by: {several} lacks title; concepts are told by the rest" in caplog.text
    with pytest.raises(NoConceptsError, match=r"held_out_by: expected fields of .*, got title, subject"):
        open_data(several, fields=("image", "text"), held_out_by=("title", "subject"))
    with pytest.raises(ValueError, match="held_out_by: expected fields with texts or files, got the label 'colour'"):
        open_data(several, labels=("colour",), held_out_by=("colour",))
    with pytest.raises(ValueError, match="expected values in every field that is read, got none in 'question'"):
        open_data(several, fields=("image", "question"), held_out_by=("text",))


def test_a_run_without_a_stream_is_a_base(tmp_path: Path) -> None:
    """Its data need not have what told concepts apart."""
    folder = folder_of(tmp_path / "asked", 0, question="what is it?")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = [json.dumps({**row, "answer": row["colour"]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    narrow = {"model.width": 16, "model.heads": 2, "streams.image.encoder.layers": 1}
    parts = {**narrow, "streams.question.encoder.layers": 1, "streams.text.encoder.layers": 1}
    config = done(base(folder, recipe="vqa", without=("text",), parts=parts))
    tuned = done(colours(config.folder))
    assert pictures(open_source(tuned).train) == pictures(open_source(config).train)


def test_labels_of_other_names_than_ours(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "named", 1, concept="noise", tag="random")
    for name in ("concept", "matched"):
        with pytest.raises(ValueError, match=f"labels: expected columns of other names .*, got '{name}'"):
            open_data(folder, labels=(name,))
    assert open_data(folder, labels=("tag",)).train.classes == {"tag": ("random",)}


def test_evaluation_by_columns_that_the_run_did_not_read(several: Path) -> None:
    folder = done(base(several)).folder
    for asked in (
        Evaluation(folder, labels=("colour",), task=("probe",)),
        Evaluation(folder, groups=("colour",), task=("groups",)),
    ):
        found = evaluate_run(asked)
        assert any("colour" in figure.name for figure in found["held_out"])
    assert Evaluation(folder, labels=("colour,kind", "size")).labels == ("colour", "kind", "size")


def test_evaluation_on_other_data_forgets_how_the_runs_were_read(several: Path, tmp_path: Path) -> None:
    shutil.move(several / "rows.jsonl", several / "rows.csv")
    table = "\n".join(f"{i}.png;title {i};{COLOURS[i % 4]}" for i in range(IMAGES))
    (several / "rows.csv").write_text(f"image;title;colour\n{table}\n", encoding="utf-8")
    own: dict[str, Any] = {"labels": ("colour",), "csv_separator": ";", "csv_caption_key": "title", "validate": True}
    config = done(base(several, **own, train_fraction=0.5))
    stored = stored_config(config.folder)
    emoji = _opened(Evaluation(config.folder, data="emoji", limit=20), stored)[0]
    assert set(emoji.held_out) == {"A", "B", "C"} and len(emoji.train) > 4000
    plain = folder_of(tmp_path / "plain", 1)
    rows = [json.loads(line) for line in (plain / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = "\n".join(json.dumps({"image": row["image"], "title": row["caption"]}) for row in rows)
    (plain / "rows.jsonl").write_text(lines, encoding="utf-8")
    other = _opened(Evaluation(config.folder, data=f"folder:{plain}"), stored)[0]
    assert set(other.held_out) == {"held_out"} and not other.train.classes
    mixed = dataclasses.replace(stored, data_weights=(1.0, 2.0))
    assert len(_opened(Evaluation(config.folder, data=f"folder:{plain}"), mixed)[0].train) == len(other.train)
