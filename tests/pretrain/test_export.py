"""Exported models: they load, go on and are measured as their runs do; what cannot be exported says why."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretrain.runs import TINY
from pretrain.test_resume import assert_same_end

from mmkernels.cli import main as mmkernels
from mmkernels.pretrain import Config, load_model, train
from mmkernels.pretrain.checkpoint import DamagedError
from mmkernels.pretrain.export import export, main
from mmkernels.pretrain.run_folder import RunFolderError, stored_config

Make = Callable[..., Config]
TEXTS = ["a red circle", "крест"]

OWN = """
from mmkernels.pretrain.encoders import Words, Patches
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Shape, Stream

STREAMS = {"image": Stream(Patches(layers=1, size=16)), "text": Stream(Words(layers=1))}
RECIPE = Recipe("Mine", "", "emoji", STREAMS, {"contrast": Contrast("image", "text")}, model=Shape(16, 2, 8))
"""


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_the_same_model_in_less(ema: float, tiny: Make, tmp_path: Path, capsys) -> None:
    folder = train(tiny(steps=3, warmup=0, lr=0.02, ema=ema, eval_every=0, checkpoint_every=0)).folder.path
    assert main([str(folder), str(tmp_path / "deep" / "out")]) == 0
    out = tmp_path / "deep" / "out"
    assert capsys.readouterr().out.startswith(f"{out}: ")
    assert {path.name for path in out.iterdir()} == {
        "classes.json", "config.json", "export.json", "model.safetensors", "tokenizer.json"
    }  # fmt: skip
    shutil.move(out, tmp_path / "moved")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "nothing", ignore_errors=True)
    for path in (tmp_path / "moved", export(tmp_path / "moved", tmp_path / "again")):
        ours, theirs = load_model(folder), load_model(path)
        assert torch.equal(ours.embed("text", TEXTS), theirs.embed("text", TEXTS))
        assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    size = sum(path.stat().st_size for path in (tmp_path / "moved").iterdir())
    assert size < 0.5 * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_run_may_begin_with_an_exported_model(tiny: Make, tmp_path: Path) -> None:
    """As with the run itself, bit for bit."""
    folder = train(tiny(steps=2, eval_every=0, checkpoint_every=0)).folder.path
    out = export(folder, tmp_path / "out")
    for name, init in (("a", folder), ("b", out)):
        train(tiny(steps=2, seed=3, eval_every=0, checkpoint_every=0, run=tmp_path / name, init=init))
    assert_same_end(tmp_path / "a", tmp_path / "b")


def test_a_recipe_of_your_own_comes_along(tiny: Make, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(OWN, encoding="utf-8")
    folder = train(tiny(recipe=str(mine), parts={}, steps=2, eval_every=0, checkpoint_every=0)).folder.path
    before = load_model(folder).embed("text", TEXTS)
    mine.unlink()
    out = export(folder, tmp_path / "out")
    out.rename(tmp_path / "elsewhere")
    assert torch.equal(load_model(tmp_path / "elsewhere").embed("text", TEXTS), before)
    assert stored_config(tmp_path / "elsewhere").recipe == str(tmp_path / "elsewhere" / "mine.py")
    again = export(tmp_path / "elsewhere", tmp_path / "again")
    assert json.loads((again / "config.json").read_text(encoding="utf-8"))["recipe"] == "mine.py"


def test_paths_need_not_be_unicode(tiny: Make, tmp_path: Path, capsysbinary) -> None:
    folder = train(tiny(steps=1, eval_every=0, checkpoint_every=0)).folder.path
    out = tmp_path / os.fsdecode(b"caf\xe9")
    assert mmkernels(["export", str(folder), str(out)]) == 0
    assert mmkernels(["evaluate", str(out), "--task", "retrieval"]) == 0, capsysbinary.readouterr().err
    stored = json.loads((out / "evaluation.json").read_text(encoding="utf-8"))
    assert mmkernels(["evaluate", str(out), "--task", "retrieval", "--json", str(out / "export.json" / "x")]) == 1
    assert b"json: expected a file that can be written" in capsysbinary.readouterr().err
    assert stored["options"]["run"] == str(out) and stored["figures"]["held_out"]


def test_what_cannot_be_exported(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = tiny(steps=1, eval_every=0, checkpoint_every=0, parts=TINY)
    with pytest.raises(RunFolderError, match="holds no run"):
        export(config.folder, tmp_path / "out")
    folder = train(config).folder.path
    with pytest.raises(RunFolderError, match=r"path: expected a new or an empty folder, got .*, which holds files"):
        export(folder, folder)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    assert main([str(folder), str(tmp_path / "file")]) == 1
    assert "expected a new or an empty folder" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunFolderError, match=r"path: expected a new or an empty folder, got .*link"):
        export(folder, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    assert main([str(folder), "."]) == 1
    assert "got ., which holds files already" in capsys.readouterr().err
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("mine", encoding="utf-8")
    (tmp_path / "out").mkdir()
    there = {path.name for path in tmp_path.iterdir()}
    out = export(folder, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").read_text(encoding="utf-8") == "mine", "somebody else's folder"
    assert {path.name for path in tmp_path.iterdir()} == there, "nothing is left beside it"
    assert out.stat().st_mode == (tmp_path / "out.partial").stat().st_mode, "as readable as any folder"
    monkeypatch.setattr("mmkernels.pretrain.export.save", lambda weights: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(folder, tmp_path / "none")
    assert {path.name for path in tmp_path.iterdir()} == there
    with pytest.raises(RunFolderError, match="cannot be resumed"):
        train(dataclasses.replace(config, run=out, resume=True))
    kept = (out / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match=r"tokenizer.json: expected .*, which is missing: copy the whole folder again"):
        load_model(out)
    kept.rename(out / "tokenizer.json")
    for name in ("model.safetensors", "export.json"):
        (out / name).write_bytes(b"half")
        with pytest.raises(DamagedError, match=rf"{name} is damaged .* Export the model again"):
            load_model(out)
