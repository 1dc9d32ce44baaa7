"""Tables: an error that puts other rows in doubt is refused, with file and line; an error confined to its row is
counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pretrain_data import pairs, png, read, shard

from mmkernels.pretrain import Config, train
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.data import FolderDataset, TableFormat, TooManyBrokenError, open_data

Make = Callable[..., Config]


def table(folder: Path, content: str | bytes, name: str = "captions.csv", images: int = 9) -> Path:
    for i in range(1, images + 1):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return folder


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1.png,a dog, running fast\n2.png,a cat\n", "line 2: expected 2 fields, got 3"),
        ("1.png,a cat\n2.png\n", "line 3: expected 2 fields, got 1"),
        ('1.png,a cat\n2.png,"a dog\n3.png,a fox\n', "line 3: unexpected end of data"),
        ('1.png,"a dog\n2.png,a fox\n3.png,"a cat"\n', "line 2: ',' expected after '\"'"),
        (
            '1.png,"a dog\n2.png,a fox\n3.png,"\n',
            "line 2: a quote is not closed and swallows the row '2.png,a fox'",
        ),
        ('1.png,a "dog\n2.png,"a "fox" runs"\n', "line 3: ',' expected after '\"'"),
    ],
)
def test_a_table_that_is_cut_in_the_wrong_places_is_refused(rows: str, message: str, tmp_path: Path) -> None:
    table(tmp_path, "image,caption\n" + rows)
    with pytest.raises(ValueError, match=r"captions\.csv: line") as refused:
        FolderDataset(tmp_path, max_broken=1.0)
    assert message in str(refused.value)


def test_what_a_table_may_hold(tmp_path: Path) -> None:
    rows = (
        '1.png,"two lines,\nof one caption",x\n\n2.png,a "quoted" word\n3.png,"said ""so"", twice",\n'
        " 4.png ,[sic] a fox,z\n"
    )
    data = FolderDataset(table(tmp_path, "image,caption,source\n" + rows))
    assert read(data) == {
        "1.png": ("two lines,\nof one caption",),
        "2.png": ('a "quoted" word',),
        "3.png": ('said "so", twice',),
        "4.png": ("[sic] a fox",),
    }
    assert not data.broken.reasons


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("captions.tsv", "image\tcaption\n1.png\ta, b\n", TableFormat()),
        ("captions.csv", "image;caption\n1.png;a, b\n", TableFormat(";")),
        ("captions.csv", "filepath\ttitle\n1.png\ta, b\n", TableFormat("\t", "filepath", "title")),
        ("captions.csv", "title\tx\tfilepath\na, b\t\t1.png\n", TableFormat("\\t", "filepath", "title")),
        ("captions.tsv", '"filepath","title"\n"1.png","a, b"\n', TableFormat(",", "filepath", "title")),
        ("captions.jsonl", '{"url": "1.png", "TEXT": "a, b"}\n', TableFormat(None, "url", "TEXT")),
        ("captions.csv", '\ufeffimage,caption\r\n1.png,"a, b"\r\n', TableFormat()),
        ("captions.tsv", "image\tcaption\r\n1.png\ta, b\r\n".encode("utf-16"), TableFormat()),
    ],
)
def test_separators_and_columns(name: str, content: str | bytes, form: TableFormat, tmp_path: Path) -> None:
    data = open_data(table(tmp_path, content, name), table=form, eval_fraction=0).train
    assert [(s.name, s.captions) for s in data.read(range(len(data)))] == [("1.png", ("a, b",))]


def test_a_table_by_the_command_line(tiny: Make, pictures: Path) -> None:
    rows = [json.loads(line) for line in (pictures / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "filepath\ttitle\n" + "".join(f"{row['image']}\t{row['caption']}, big\n" for row in rows)
    (pictures / "train.csv").write_text(text, encoding="utf-8")
    asked = parse(["--csv-separator", "\\t", "--csv-img-key", "filepath", "--csv-caption-key", "title"])
    names = {name: getattr(asked, name) for name in ("csv_separator", "csv_img_key", "csv_caption_key")}
    outcome = train(tiny(data=f"folder:{pictures / 'train.csv'}", steps=2, **names))
    assert outcome.step == 2
    assert ", big</b>" in outcome.folder.report.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected the columns 'image' and 'caption', got \['filepath\\ttitle'\]"):
        open_data(pictures / "train.csv")


def test_settings_that_no_table_takes(tmp_path: Path) -> None:
    for wrong in ("", ", ", '"', "\n"):
        with pytest.raises(ValueError, match="csv_separator: expected one character"):
            TableFormat(wrong)
    with pytest.raises(ValueError, match="csv_img_key, csv_caption_key: expected two columns, got 'x' for both"):
        Config(csv_img_key="x", csv_caption_key="x")
    table(tmp_path, '{"image": "1.png", "caption": "x"}', "captions.jsonl")
    with pytest.raises(ValueError, match=r"csv_separator: expected none for captions\.jsonl, got ';'"):
        FolderDataset(tmp_path, table=TableFormat(";"))
    for source in ("emoji", shard(tmp_path / "s.tar", pairs(2))):
        with pytest.raises(ValueError, match="csv_separator, csv_img_key, csv_caption_key: expected a table to read"):
            open_data(source, table=TableFormat(img_key="filepath"))
    (tmp_path / "captions.jsonl").rename(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match=r"expected the columns 'image' and 'caption' once each, got \['image', 'cap"):
        FolderDataset(table(tmp_path, "image,caption,caption\n1.png,a,b\n") / "captions.csv")


def test_which_file_of_a_folder_is_meant(tmp_path: Path) -> None:
    def opened() -> int:
        return len(open_data(tmp_path, eval_fraction=0, max_broken=1.0).train)

    table(tmp_path, "image\tcaption\n1.png\ta\n", "t.tsv")
    assert opened() == 1
    shard(tmp_path / "0.tar", pairs(3))  # before a .tsv or .parquet
    assert opened() == 3
    table(tmp_path, "image,caption\n1.png,a\n2.png,b\n", "t.csv")  # before both
    assert opened() == 2
    table(tmp_path, "image,caption\n", "other.csv")
    assert opened() == 3
    (tmp_path / "0.tar").unlink()
    with pytest.raises(
        ValueError, match=r"expected exactly one .jsonl or .csv file with captions, got other.csv, t.csv"
    ):
        opened()


GOOD = [f'{{"image": "{i}.png", "caption": "thing {i}"}}' for i in range(1, 10)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image": "5.png", "caption": "happy \\ud83d"}', "not Unicode: lone surrogate \\ud83d at character 7"),
        (b'{"image": "5.png", "caption": "caf\xe9"}', "caption: not UTF-8: byte 0xe9 at character 4"),
        (b'{"image": "5.png", "caption": ""}', "caption: expected text or a list of texts, got ''"),
        (b'{"image": "5.png", "caption": ["a", 5]}', "expected text or a list of texts, got ['a', 5]"),
        (b'{"image": "\\ud83d.png", "caption": "x"}', "image: not Unicode: lone surrogate"),
        (b'{"image": null, "caption": "x"}', "image: expected a path, got None"),
        (b'{"image": "5.png"}', "expected the columns 'image' and 'caption', got ['image']"),
        (b'{"image": "5.png", "capt', "expected one JSON object"),
        (b'{"image": "5.png", "caption": "%s"}' % (b"x" * 200_000), "a caption of 200000 characters"),
        (b"[" * 100_000, "expected one JSON object"),
        (b"\xff\xfe\x00", "expected one JSON object"),
    ],
)
def test_a_line_is_counted_and_named(line: bytes, reason: str, tmp_path: Path) -> None:
    content = b"\n".join([*(row.encode() for row in GOOD[:4]), line, *(row.encode() for row in GOOD[5:])])
    data = FolderDataset(table(tmp_path, content, "captions.jsonl"), max_broken=0.2)
    assert len(read(data)) == 8
    ((place, why),) = data.broken.reasons.items()
    assert place == "captions.jsonl: line 5"
    assert reason in why
    with pytest.raises(TooManyBrokenError, match=r"captions\.jsonl: line 5"):
        FolderDataset(tmp_path)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"5.png,caf\xe9", "caption: not UTF-8: byte 0xe9 at character 4"),
        (b"5.png,", "caption: expected text or a list of texts, got ''"),
        (b",x", "image: expected a path, got ''"),
        (b"5.png," + b"x" * 200_000, "a field of more than 131072 characters"),
    ],
)
def test_a_row_is_counted_and_named(row: bytes, reason: str, tmp_path: Path) -> None:
    rows = [b"image,caption", *(b"%d.png,thing" % i for i in (1, 2, 3)), row, b"4.png,last"]
    data = FolderDataset(table(tmp_path, b"\n".join(rows)), max_broken=0.2)
    assert len(read(data)) == 4
    ((place, why),) = data.broken.reasons.items()
    assert place == "captions.csv: line 5"
    assert reason in why


def test_a_table_in_another_encoding_says_so(tmp_path: Path) -> None:
    table(tmp_path, "image,caption\n" + "".join(f"{i}.png,café {i}\n" for i in range(1, 10)))
    text = (tmp_path / "captions.csv").read_text(encoding="utf-8")
    (tmp_path / "captions.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"got none:\n  captions.csv: line 2: caption: not UTF-8: byte 0xe9"):
        FolderDataset(tmp_path)
    (tmp_path / "captions.csv").write_bytes(text.encode("utf-16-le"))  # without a byte order mark
    with pytest.raises(ValueError, match=r"captions.csv: line 2: expected the columns"):
        FolderDataset(tmp_path)
    (tmp_path / "captions.csv").write_bytes(text.encode("utf-16") + b"x")
    with pytest.raises(
        ValueError, match=r"captions.csv: expected UTF-16 as its byte order mark says, got truncated data"
    ):
        FolderDataset(tmp_path)


def test_a_file_name_that_is_not_utf8_is_opened(tmp_path: Path) -> None:
    table(tmp_path, b"image,caption\n1.png,a\ncaf\xe9.png,b\n\xc3\xa9.png,c\n")
    for name in (b"caf\xe9.png", b"\xc3\xa9.png"):
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(png())
    assert read(FolderDataset(tmp_path)) == {"1.png": ("a",), "caf\\xe9.png": ("b",), "é.png": ("c",)}


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for i in range(1, 5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    columns = {"image": ["1.png", "2.png", None, "4.png"], "caption": [["a", "b"], ["c"], ["d"], []]}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    data = FolderDataset(tmp_path, max_broken=0.5)
    assert read(data) == {"1.png": ("a", "b"), "2.png": ("c",)}
    assert list(data.broken.reasons) == ["t.parquet: row 3", "t.parquet: row 4"]
    with pytest.raises(ValueError, match=r"t.parquet: expected the columns 'image' and 'text', got \['image', 'cap"):
        FolderDataset(tmp_path, table=TableFormat(caption_key="text"))
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"t.parquet: expected a .parquet file, got something else"):
        FolderDataset(tmp_path)
