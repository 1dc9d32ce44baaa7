"""Settings: from the command line, to a file and back."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest

from mmkernels.pretrain import Config, Ramp, main
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.config import RESUMABLE, from_dict, to_dict
from mmkernels.pretrain.wiring import typed


def test_overrides() -> None:
    scale = "--streams.image.views.augment.scale"
    config = parse(["--recipe", "siglip", "--lr", "2e-3", "--model.width", "64", scale, "0.5", "1.0"])
    assert (config.recipe, config.lr) == ("siglip", 2e-3)
    assert config.parts == {"model.width": 64, "streams.image.views.augment.scale": [0.5, 1.0]}
    recipe = config.wiring()
    assert (recipe.model.width, recipe.streams["image"].views[0].scale) == (64, (0.5, 1.0))
    assert config.folder == Path("runs/siglip")
    assert parse(["--objectives.contrast.weight", "0.5"]).wiring().objectives["contrast"].weight == 0.5
    of_ramp = parse(["--recipe", "albef", "--objectives.contrast.distil.end", "0.3", "--fusion.layers", "3"])
    assert of_ramp.wiring().objectives["contrast"].distil == Ramp(0.0, 0.3, 1200)
    assert of_ramp.wiring().fusion.layers == 3
    assert parse([]) == Config.of("clip")
    assert parse(["--profile", "3", "2", "--no-tensorboard"]).profile == (3, 2)


def test_a_config_is_frozen_and_survives_json() -> None:
    config = Config(run=Path("x/y"), profile=(1, 2), parts={"model.width": 64}, backend="reference")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0  # type: ignore[misc]
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert from_dict(to_dict(Config())) == Config()
    with pytest.raises(ValueError, match="expected settings of this version, got nonsense"):
        from_dict({**to_dict(config), "nonsense": 1})


def test_resumable_settings_exist() -> None:
    assert {field.name for field in dataclasses.fields(Config)} > RESUMABLE


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    stored = Config(recipe="siglip", run=tmp_path, lr=3e-4, steps=7, parts={"model.width": 64})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(stored)), encoding="utf-8")
    config = parse(["--resume", "--run", str(tmp_path), "--eval-every", "2"])
    assert config == dataclasses.replace(stored, resume=True, eval_every=2)


def test_a_resumed_run_keeps_shares_that_a_recipe_leaves_out(tmp_path: Path) -> None:
    """None by default, a list in JSON, and numbers again on the command line."""
    parts = {"mixing.kind": "ramp", "mixing.to": [1.0, 2.0], "mixing.steps": 3}
    more = {"stages.stage_0.data_weights": [1.0, 1.0]}
    stored = Config(recipe="progressive", run=tmp_path, data="emoji::scenes", parts=parts | more)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(stored)), encoding="utf-8")
    config = parse(["--resume", "--run", str(tmp_path)])
    assert config == dataclasses.replace(stored, resume=True)
    assert config.wiring().mixing.to == (1.0, 2.0) and config.wiring().stages[0].data_weights == (1.0, 1.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--resume", "--run", "/nonexistent"], "holds no run"),
        (["--data", "folder:/nonexistent", "--run", "{tmp}/r"], "/nonexistent"),
        (["--batch", "100000", "--run", "{tmp}/r"], "100000"),
        (["--recipe", "nonsense"], "'nonsense'"),
        (["--recipe", "clipp"], "did you mean clip or"),
        (["--recipe", "nowhere/mine.py"], "expected a Python file with a RECIPE in it"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], message: str, tmp_path: Path, capsys) -> None:
    assert main([part.replace("{tmp}", str(tmp_path)) for part in argv]) == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in shown
    assert shown.startswith("mmkernels pretrain: ")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--lr", "fast"], "fast"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--warmup", "-1"], "warmup: expected at least 0, got -1"),
        (["--lr", "nan"], "lr: expected a positive number, got nan"),
        (["--model.heads", "3"], "width: expected a multiple of 3 heads"),
        (["--streams.image.encoder.size", "30"], "multiple of 8 pixels, got 30"),
        (["--streams.image.views.augment.grey", "2"], "grey: expected a share"),
        (["--objectives.sigmoid.weight", "2"], "--objectives.sigmoid.weight"),
    ],
)
def test_settings_that_cannot_be_are_refused(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--model.width" in shown
    assert "Peak learning rate" in shown
    assert "--objectives.contrast.queue" in shown
    assert "sigmoid" not in shown, "of another recipe"
    options = shown[shown.index("training options") if "training options" in shown else 0 :].splitlines()
    lines = [line.strip("│ ╰╯─") for line in options]
    bare = [line for line, below in pairwise(lines) if line.startswith("--") and below.startswith("(default")]
    assert not bare, "every setting says what it is"


def test_parts_that_are_not_the_projects_own_are_shown_without_their_source() -> None:
    """A dataclass that was made while running has no docstrings of its fields."""
    made = dataclasses.make_dataclass("Made", [("x", int, 3)], frozen=True)
    recipe = dataclasses.replace(Config().wiring(), fusion=made())
    assert dict(typed(recipe)[1])["fusion"].x == 3
