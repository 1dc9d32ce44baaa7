"""The recipe of the tutorial is wired as its page shows, and trains. (test_blocks.py runs the blocks of all pages.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blocks import ROOT, python_blocks

from mmkernels.cli import main

RECIPE = "docs/tutorial/first-recipe.md"


def test_the_recipe_is_wired_as_drawn_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, objective = (block.code for block in python_blocks(RECIPE))
    text = (ROOT / RECIPE).read_text(encoding="utf-8")
    drawn = re.search(r"^    mmkernels recipes \./mine\.py\n\n```text\n(.*?)^```", text, re.M | re.S)
    (tmp_path / "mine.py").write_text(file, encoding="utf-8")
    assert main(["recipes", "./mine.py"]) == 0
    assert drawn is not None
    assert capsys.readouterr().out == drawn[1]
    (tmp_path / "mine.py").write_text(file + "\n" + objective, encoding="utf-8")
    settings = [
        "--steps",
        "2",
        "--batch",
        "8",
        "--chunk",
        "4",
        "--eval-limit",
        "8",
        "--no-tensorboard",
        "--objectives.spread.weight",
        "0.3",
    ]
    assert main(["pretrain", "--recipe", "./mine.py", *settings]) == 0
    assert '"spread' in (tmp_path / "runs/mine/log.jsonl").read_text(encoding="utf-8")
