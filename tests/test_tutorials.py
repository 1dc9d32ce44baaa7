"""The tutorials run as they stand, and print what they say."""

import re
from pathlib import Path

import pytest
from pages import ROOT, python_blocks, run

from mmkernels.cli import main

PAGES = sorted((ROOT / "docs/tutorial").glob("*.md"))
RECIPE = ROOT / "docs/tutorial/first-recipe.md"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_run_and_print_what_the_page_says(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(page, lambda: capsys.readouterr().out)


def test_an_output_that_is_not_that_of_its_block_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1)\n```\n\n```text\n2\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="block 1"):
        run(page, lambda: capsys.readouterr().out)


def test_the_recipe_is_wired_as_drawn_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, objective = (block.code for block in python_blocks(RECIPE))
    drawn = re.search(r"^    mmkernels recipes \./mine\.py\n\n```text\n(.*?)^```", RECIPE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "mine.py").write_text(file, encoding="utf-8")
    assert main(["recipes", "./mine.py"]) == 0
    assert drawn is not None and capsys.readouterr().out == drawn[1]
    (tmp_path / "mine.py").write_text(file + "\n" + objective, encoding="utf-8")
    settings = "--steps 2 --batch 8 --chunk 4 --eval-limit 8 --no-tensorboard --objectives.spread.weight 0.3".split()
    assert main(["pretrain", "--recipe", "./mine.py", *settings]) == 0
    assert '"spread' in (tmp_path / "runs/mine/log.jsonl").read_text(encoding="utf-8")
