"""Where a report goes: it replaces no report of other data unasked, and no list stays that is not its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mmkernels.cli import main as command
from mmkernels.pretrain.data.opening import places


def texts(folder: Path, word: str) -> Path:
    folder.mkdir(parents=True)
    rows = [{"caption": f"{word} {i}" if i else "IMG_1234.jpg"} for i in range(5)]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two data sets whose reports have the same default folder, seen from the working directory."""
    monkeypatch.chdir(tmp_path)
    texts(tmp_path / "a" / "photos", "heron")
    texts(tmp_path / "b" / "photos", "kite")
    return tmp_path


def reported(source: str, *options: str) -> int:
    return command(["data-report", source, "--recipe", "gpt", "--eval-fraction", "0", "--vocabulary", "300", *options])


def test_the_report_of_other_data_is_not_replaced_unasked(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = data / "data-reports" / "photos" / "report.html"
    assert reported("folder:a/photos") == 0
    first = page.read_text(encoding="utf-8")
    assert reported("folder:b/photos") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "expected a folder of its own for the report of folder:b/photos, got data-reports/photos" in said
    assert "with that of folder:a/photos. Name another with --out" in said
    assert page.read_text(encoding="utf-8") == first
    assert reported("folder:b/photos", "--out", "reports/b") == 0
    assert reported(f"folder:{data}/a/photos/") == 0, "the same data, written in another way"
    assert reported("folder:b/photos", "--out", "data-reports/photos") == 0, "named"
    assert "folder:b/photos" in page.read_text(encoding="utf-8")


def test_no_list_stays_beside_the_report_of_another_time(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop = data / "data-reports" / "photos" / "drop.jsonl"
    assert reported("folder:a/photos", "--drop", "boilerplate") == 0
    first = drop.read_text(encoding="utf-8")
    for source, *options in (["folder:a/photos"], ["folder:b/photos", "--out", "data-reports/photos"]):
        assert reported(source, *options) == 1
        said = " ".join(capsys.readouterr().err.split())
        assert "drop: expected what to leave out, as data-reports/photos/drop.jsonl is a list of the earlier" in said
        assert "Write a new list with --drop, name another folder with --out, or delete the list" in said
        assert drop.read_text(encoding="utf-8") == first
    assert reported("folder:b/photos", "--out", "data-reports/photos", "--drop", "boilerplate") == 0
    assert json.loads(drop.read_text(encoding="utf-8").splitlines()[0])["data"] == "folder:b/photos"
    drop.unlink()
    assert reported("folder:b/photos", "--out", "data-reports/photos") == 0 and not drop.exists()


def test_a_file_of_ones_own_called_as_the_list_is_kept(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drop = data / "data-reports" / "photos" / "drop.jsonl"
    assert reported("folder:a/photos") == 0
    drop.write_text("mine", encoding="utf-8")
    for options in ([], ["--drop", "boilerplate"]):
        assert reported("folder:a/photos", *options) == 1
        assert drop.read_text(encoding="utf-8") == "mine"
    assert "expected a folder without files of yours, got data-reports/photos/drop.jsonl" in capsys.readouterr().err


def test_names_of_the_same_data(data: Path) -> None:
    os.symlink(data / "a", data / "link")
    for name in ("a/photos", "folder:a/photos/", "folder:./b/../a/photos", f"{data}/a/photos", "folder:link/photos"):
        assert places(name) == places("folder:a/photos"), name
    assert places("emoji::a/photos") == places("emoji::folder:a/photos")
    for a, b in (
        ("folder:a/photos", "folder:b/photos"),
        ("emoji", "folder:emoji"),
        ("hf:a/photos", "folder:a/photos"),
        ("hf:who/photos", "hf:they/photos"),
        ("emoji::a/photos", "a/photos::emoji"),
        ("emoji", "emoji::a/photos"),
    ):
        assert places(a) != places(b), (a, b)
