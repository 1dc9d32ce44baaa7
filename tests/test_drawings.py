"""Pictures that a script draws from the package are those that it draws."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# By its path: tests/masks.py has the same name.
SPEC = importlib.util.spec_from_file_location("drawings", ROOT / "docs/drawings/masks.py")
assert SPEC is not None and SPEC.loader is not None
drawings = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(drawings)


def test_masks_are_what_the_script_draws() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/drawings/masks.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_picture_that_drifts_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawings, "IMAGES", tmp_path)
    monkeypatch.setattr(sys, "argv", ["masks.py"])
    assert drawings.main() == 0
    (tmp_path / "mask-media.svg").write_text("another", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["masks.py", "--check"])
    assert drawings.main() == 1
    assert capsys.readouterr().err == "mask-media.svg is not what docs/drawings/masks.py draws\n"


def test_the_page_shows_each_of_them() -> None:
    """And its code builds the masks in the pictures."""
    page = (ROOT / "docs/masks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"images/mask-([\w-]+)\.svg", page)) == set(drawings.masks())
    names: dict[str, object] = {}
    shown = []
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
        shown.append(names.get("mask"))
    drawn = [dense for _, dense in drawings.masks().values()]
    built = [mask.to_dense(*dense.shape) for mask, dense in zip(shown[1:11], drawn, strict=True)]  # type: ignore[attr-defined]
    assert all(a.equal(b) for a, b in zip(built, drawn, strict=True))
