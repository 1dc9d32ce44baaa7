"""Filter lists know what their samples held: lists of other data, and of data edited since, are refused."""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pretrain_data import shard

from mmkernels.pretrain.data import Data, FilterList, Source, open_data
from mmkernels.pretrain.data.filter_list import Dropped, names_digest
from mmkernels.pretrain.data_report import DataReport, data_report

Rows = list[dict[str, Any]]
FIELDS = ("image", "text", "question")
LISTED = [2, 3, 7]


def picture(red: int, kind: str = "PNG") -> bytes:
    """All of one size in bytes."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(out, kind)
    return out.getvalue()


def rows_of(first: int = 0) -> Rows:
    return [
        {"image": f"{i}.png", "caption": f"thing {first + i}", "question": f"what of {first + i}?", "answer": "yes"}
        for i in range(12)
    ]


def in_table(folder: Path, rows: Rows, first: int, suffix: str = "jsonl") -> str:
    """Pictures, the first as red as `first`, and a table."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(rows)):
        (folder / f"{i}.png").write_bytes(picture(first + i))
    if suffix == "jsonl":
        (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif suffix == "csv":
        with (folder / "t.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return f"folder:{folder}"


def in_shards(folder: Path, rows: Rows, first: int) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, bytes] = {}
    for i, row in enumerate(rows):
        files |= {f"{i:03}.png": picture(first + i), f"{i:03}.json": json.dumps({**row, "image": None}).encode()}
    shard(folder / "a.tar", files)
    return f"webdataset:{folder}"


def in_hub(folder: Path, rows: Rows, first: int) -> str:
    datasets = pytest.importorskip("datasets")
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns["image"] = [{"bytes": picture(first + i), "path": None} for i in range(len(rows))]
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image()} | {name: text for name in columns if name != "image"})
    shutil.rmtree(folder, ignore_errors=True)
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))
    return f"hf:{folder}"


def in_mixture(folder: Path, rows: Rows, first: int) -> str:
    return f"{in_table(folder, rows, first)}::emoji"


Make = Callable[[Path, Rows, int], str]
KINDS: dict[str, Make] = {
    **{suffix: partial(in_table, suffix=suffix) for suffix in ("jsonl", "csv", "parquet")},
    "shards": in_shards,
    "hub": in_hub,
    "mixture": in_mixture,
}


def opened(source: str, fields: tuple[str, ...] = FIELDS, **options: Any) -> Data:
    return open_data(source, **{"fields": fields, "eval_fraction": 0.0, "resolution": 8, "max_broken": 1.0, **options})


def listing(train: Source, indices: list[int] = LISTED, path: Path | None = None) -> FilterList:
    """As it is after it was written and read."""
    entries = tuple(Dropped("train", i, train.logged_as(i), ("empty",), "", train.contents(i)) for i in indices)
    found = FilterList({"data": "here", "samples": len(train), "names": names_digest(train)}, entries)
    if path is None:
        return found
    path.write_text(found.text(), encoding="utf-8")
    return FilterList.read(path)


def names(data: Data) -> list[str]:
    return [data.train.logged_as(i) for i in range(len(data.train))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fields", [("image",), ("text",), ("image", "text"), FIELDS], ids="+".join)
def test_a_list_of_other_data_with_the_same_names(kind: str, fields: tuple[str, ...], tmp_path: Path) -> None:
    """As many rows of the same file: only what they hold tells the sets apart."""
    mine = opened(KINDS[kind](tmp_path / "a" / "t", rows_of(), 0), fields)
    other = opened(KINDS[kind](tmp_path / "b" / "t", rows_of(50), 50), fields)
    assert names(mine) == names(other)
    listed = listing(mine.train, path=tmp_path / "drop.jsonl")
    assert names(listed.apply(mine)) == [name for i, name in enumerate(names(mine)) if i not in LISTED]
    first = f"{re.escape(names(mine)[2])} .its {', '.join(fields)}"
    with pytest.raises(ValueError, match=f"got 3 of the 3 listed ones changed, the first of them {first}.*data-report"):
        listed.apply(other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_data_that_have_been_edited(kind: str, tmp_path: Path) -> None:
    """Of samples that are not listed anything may change; of one that is, each field that is read counts."""
    made, rows = tmp_path / "t", rows_of()
    listed = listing(opened(KINDS[kind](made, rows, 0)).train)
    edits = {"text": ("caption", "a thing in the sun"), "question": ("question", "what is it?")}
    for index, refused in ((5, False), (7, True)):
        for field, (column, value) in edits.items():
            edited = [{**row, column: value} if i == index else row for i, row in enumerate(rows)]
            data = opened(KINDS[kind](made, edited, 0))
            if not refused:
                assert len(listed.apply(data).train) == len(data.train) - 3
                continue
            name = re.escape(data.train.logged_as(index))
            with pytest.raises(
                ValueError, match=f"got 1 of the 3 listed ones changed, the first of them {name} .its {field}"
            ):
                listed.apply(data)
            unread = tuple(each for each in FIELDS if each != field)
            if unread != ("image", "text"):  # which is by image in a table
                assert listed.apply(opened(KINDS[kind](made, edited, 0), unread))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hub"])
def test_rows_that_have_moved(kind: str, tmp_path: Path) -> None:
    made, rows = tmp_path / "t", rows_of()
    listed = listing(opened(KINDS[kind](made, rows, 0), ("text", "question")).train)
    swapped = [*rows[:2], rows[3], rows[2], *rows[4:]]
    with pytest.raises(ValueError, match=r"got 2 of the 3 listed ones changed.* \(its text, question\)"):
        listed.apply(opened(KINDS[kind](made, swapped, 0), ("text", "question")))


@pytest.mark.parametrize("edit", ["another", "mended", "gone"])
@pytest.mark.parametrize("fields", [("image", "text"), FIELDS], ids=["by image", "by row"])
def test_files_that_have_been_replaced(edit: str, fields: tuple[str, ...], tmp_path: Path) -> None:
    """By others of the same name, and even of the same size."""
    source = in_table(tmp_path / "t", rows_of(), 0)
    if edit == "mended":
        (tmp_path / "t" / "3.png").write_bytes(picture(3)[:60])
    listed = listing(opened(source, fields).train)
    (tmp_path / "t" / "3.png").write_bytes(picture(200 if edit == "another" else 3))
    if edit == "gone":
        (tmp_path / "t" / "3.png").unlink()
    name = "3.png" if fields == ("image", "text") else "t.jsonl: line 4"
    with pytest.raises(
        ValueError, match=rf"got 1 of the 3 listed ones changed, the first of them {name} \(its image\)"
    ):
        listed.apply(opened(source, fields))


def test_a_copy_elsewhere_is_the_same_data(tmp_path: Path) -> None:
    """Whatever is read of it: columns are compared that the list knows, as texts or as classes."""
    source = in_table(tmp_path / "t", rows_of(), 0)
    listed = listing(opened(source, (*FIELDS, "answer")).train)
    copy = shutil.copytree(tmp_path / "t", tmp_path / "copy")
    rows = rows_of()
    rows[2]["caption"] = "  thing\n 2"
    in_table(copy, [{**row, "more": "new"} for row in rows], 0)
    readings: list[dict[str, Any]] = [
        {"fields": FIELDS},
        {"fields": ("image",), "labels": ("answer",)},
        {"fields": ("text", "question", "more")},
        {"fields": ("question",), "held_out_by": ("image", "text")},
    ]
    for options in readings:
        assert len(listed.apply(opened(f"folder:{copy}", **options)).train) == 9


def test_a_list_of_images_for_their_rows(tmp_path: Path) -> None:
    """A row has few of the texts that its image has in all; the image must be the same."""
    rows = [row for row in rows_of() for _ in range(2)]
    rows = [{**row, "caption": f"{row['caption']} {i % 2}"} for i, row in enumerate(rows)]
    source = in_table(tmp_path / "t", rows, 0)
    listed = listing(opened(source, ("image", "text")).train)
    assert len(listed.apply(opened(source, FIELDS)).train) == 18
    (tmp_path / "t" / "7.png").write_bytes(picture(99))
    with pytest.raises(ValueError, match=r"got 2 of the 6 listed ones changed, the first of them t.jsonl: line 15 "):
        listed.apply(opened(source, FIELDS))


def test_a_list_that_does_not_say_what_its_samples_held(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As lists were once written, or of fields of which none is read: it is taken, with a warning."""
    data = opened(in_table(tmp_path / "t", rows_of(), 0))
    path = tmp_path / "drop.jsonl"
    listing(data.train, path=path)
    head, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    old = [{key: value for key, value in line.items() if key != "contents"} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *old)), encoding="utf-8")
    other = listing(opened(f"folder:{tmp_path / 't'}", ("question",)).train)
    for listed, read in ((FilterList.read(path), FIELDS), (other, ("image", "answer"))):
        caplog.clear()
        assert len(listed.apply(opened(f"folder:{tmp_path / 't'}", read)).train) == 9
        assert "filter: whether 3 of the 3 listed samples have changed since is unknown" in caplog.text


@pytest.mark.parametrize("source", ["emoji", "text", "scenes"])
def test_names_tell_what_comes_along(source: str, caplog: pytest.LogCaptureFixture) -> None:
    data = open_data(source)
    with caplog.at_level(logging.WARNING):
        assert len(listing(data.train).apply(data).train) == len(data.train) - 3
    assert "unknown" not in caplog.text


def test_what_media_and_other_columns_hold(tmp_path: Path) -> None:
    """A clip is the files of its folder; regions are their boxes and tags, and their image; vectors their numbers."""
    (tmp_path / "clip").mkdir()
    for i in range(3):
        (tmp_path / "clip" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "a.png").write_bytes(picture(9))
    row = {"video": "clip", "image": "a.png", "regions": [{"box": [0, 0, 1, 1], "tag": "a"}], "vector": [1, 2]}

    def held(**changes: Any) -> dict[str, str]:
        (tmp_path / "t.jsonl").write_text(json.dumps({**row, **changes}), encoding="utf-8")
        return dict(opened(f"folder:{tmp_path}", ("video", "regions", "vector")).train.contents(0))

    first = held()
    assert first == held() and "" not in first.values()

    def other(**changes: Any) -> set[str]:
        now = held(**changes)
        return {field for field in first if now.get(field, "") != first[field]}

    assert other(vector=[1, 3]) == {"vector"}
    assert other(regions=[{"box": [0, 0, 1, 1], "tag": "b"}]) == {"regions"}
    assert other(regions=[{"box": [0, 0, 0.5, 1], "tag": "a"}]) == {"regions"}
    (tmp_path / "a.png").write_bytes(picture(8))
    assert other() == {"regions"}
    (tmp_path / "clip" / "2.png").unlink()
    assert other() == {"regions", "video"}


def test_a_report_writes_what_its_samples_held(tmp_path: Path) -> None:
    """From the report to the run, for a set that is mixed with itself, too."""
    rows = rows_of()
    rows[4]["caption"] = "IMG_0001.jpg"
    source = in_table(tmp_path / "t", rows, 0)
    for name in (source, f"{source}::{tmp_path / 't'}"):
        options = DataReport(name, recipe="clip", eval_fraction=0.0, drop=("boilerplate",), out=tmp_path / "r")
        data_report(options)
        listed = FilterList.read(tmp_path / "r" / "drop.jsonl")
        assert listed.dropped and all(set(entry.contents) == {"image", "text"} for entry in listed.dropped)
        data = opened(name, ("image", "text"))
        assert len(listed.apply(data).train) == len(data.train) - len(listed.dropped)
    in_table(tmp_path / "t", rows_of(), 0)
    with pytest.raises(
        ValueError, match=r"got 2 of the 2 listed ones changed, the first of them t: 4.png \(its text\)"
    ):
        listed.apply(opened(name, ("image", "text")))
