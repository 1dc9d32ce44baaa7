"""What cannot be read is counted and named, and the rest goes on: shards, tables, names and captions of every kind."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkernels.pretrain import Config, load_model, train
from mmkernels.pretrain.cli import parse
from mmkernels.pretrain.data import FolderDataset, TableFormat, TooManyBrokenError, WebDataset, open_data
from mmkernels.pretrain.data.webdataset import _NAME

Make = Callable[..., Config]


def png(red: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(out, "PNG")
    return out.getvalue()


def shard(path: Path, files: dict[str, bytes] | list[tuple[str, bytes]], **options: object) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pairs(count: int, first: int = 0) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for i in range(first, first + count):
        files |= {f"{i:03d}.png": png(i), f"{i:03d}.txt": f"thing {i}".encode()}
    return files


def read(data: WebDataset | FolderDataset) -> dict[str, tuple[str, ...]]:
    """Captions of all that can be read, by name."""
    return {sample.name: sample.captions for sample in data.read(range(len(data)))}


# ------------------------------------------------------------------------------------------------ names in a shard


@pytest.mark.parametrize(
    ("name", "key", "extension"),  # as webdataset.tariterators.base_plus_ext of 1.0.2 has them
    [
        ("a.jpg", "a", "jpg"),
        ("x/a.seg.png", "x/a", "seg.png"),
        ("IMG 2020.01.02.jpg", "IMG 2020", "01.02.jpg"),
        ("v1.0/a.jpg", "v1.0/a", "jpg"),
        ("./a.jpg", "./a", "jpg"),
        ("x/.hidden.jpg", "x/", "hidden.jpg"),
        ("a.", "a", ""),
        ("a\nb.jpg", "a\nb", "jpg"),
        ("noext", None, None),
        ("v1.0/noext", None, None),
        (".hidden.jpg", None, None),
        ("..jpg", None, None),
    ],
)
def test_the_key_is_that_of_webdataset(name: str, key: str | None, extension: str | None) -> None:
    match = _NAME.match(name)
    assert (match.groups() if match else (None, None)) == (key, extension)


def test_dots_in_the_stem(tmp_path: Path) -> None:
    files = pairs(2) | {
        "IMG 2020.01.02.jpg": png(7),
        "IMG 2020.01.02.txt": b"new year",
        "IMG 2020.01.03.JPG": png(8),
        "IMG 2020.01.03.txt": b"a day later",
        "x.input.jpg": png(),
        "x.outputs.txt": b"whose?",
        "y.jpg": png(),
        "y.en.txt": b"hello",
    }
    data = WebDataset(shard(tmp_path / "s.tar", files), max_broken=0.5)
    found = read(data)
    assert found["s.tar/IMG 2020.01.02"] == ("new year",)
    assert found["s.tar/IMG 2020.01.03"] == ("a day later",)
    assert len(found) == 4
    assert data.broken.reasons == {
        "s.tar/x.input": "no .txt or .json",
        "s.tar/x.outputs": "no image",
        "s.tar/y": "no .txt or .json",
        "s.tar/y.en": "no image",
    }


def test_further_files_belong_to_the_sample(tmp_path: Path) -> None:
    files = {"a.jpg": png(1), "a.txt": b"one", "a.seg.png": png(2), "a.en.txt": b"other", "a.cls": b"3", "a.json": b"{"}
    data = WebDataset(shard(tmp_path / "s.tar", files))
    assert read(data) == {"s.tar/a": ("one",)}
    assert not data.broken.reasons
    assert not data.broken.left_out


def test_files_without_a_key_and_without_a_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = pairs(3) | {
        "README": b"",
        ".hidden.jpg": png(),
        "x/._000.png": b"mac",
        "._000.png": b"mac",
        "__index__": b"",
        "notes.cls": b"1",
    }
    with caplog.at_level(logging.WARNING):
        data = WebDataset(shard(tmp_path / "s.tar", files), max_broken=0.5)
    assert len(read(data)) == 3
    assert set(data.broken.reasons) == {"s.tar/README", "s.tar/.hidden.jpg"}
    assert "expected a name of the form key.jpg" in data.broken.reasons["s.tar/README"]
    assert set(data.broken.left_out) == {"s.tar/x/._000.png", "s.tar/._000.png", "s.tar/__index__", "s.tar/notes.cls"}
    (line,) = [record.message for record in caplog.records if "left out" in record.message]
    assert "left out 4 files of s.tar" in line
    assert all(name in line for name in data.broken.left_out)


def test_a_name_that_comes_again_is_another_sample(tmp_path: Path) -> None:
    files = [*pairs(2).items(), ("000.png", png()), ("000.txt", b"another"), ("001.txt", b"a new version")]
    data = WebDataset(shard(tmp_path / "s.tar", files), max_broken=0.5)
    assert read(data) == {
        "s.tar/000": ("thing 0",),
        "s.tar/001": ("thing 1",),
        "s.tar/000 (no. 2 of this name)": ("another",),
    }
    assert data.broken.reasons == {"s.tar/001 (no. 2 of this name)": "no image"}


def test_links_and_sparse_files_are_named(tmp_path: Path) -> None:
    with tarfile.open(shard(tmp_path / "s.tar", pairs(4)), "a") as tar:
        for name, kind in (("004.png", tarfile.LNKTYPE), ("005.png", tarfile.GNUTYPE_SPARSE), ("006.png", b"6")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "000.png" if kind == tarfile.LNKTYPE else ""
            tar.addfile(member)
            text = tarfile.TarInfo(f"{name[:3]}.txt")
            text.size = 1
            tar.addfile(text, io.BytesIO(b"x"))
    data = WebDataset(tmp_path, max_broken=0.5)
    assert len(read(data)) == 4
    assert data.broken.reasons == {
        "s.tar/004": "004.png is a link to 000.png, not a file",
        "s.tar/005": "005.png is stored as a sparse file",
        "s.tar/006": "006.png is a special file",
    }


def test_broken_ones_are_counted_when_the_data_are_opened(tmp_path: Path) -> None:
    """A short run may never draw them."""
    files = pairs(10)
    files["003.txt"] = b""
    shard(tmp_path / "s.tar", files)
    data = WebDataset(tmp_path, max_broken=0.1)
    assert data.broken.reasons == {"s.tar/003": "an empty .txt"}
    with pytest.raises(TooManyBrokenError, match=r"1 of 10 .*max_broken=0.05:\n  s.tar/003: an empty .txt"):
        WebDataset(tmp_path)


def test_a_broken_image_in_memory_is_described_in_words(tmp_path: Path) -> None:
    data = WebDataset(shard(tmp_path / "s.tar", pairs(9) | {"009.png": b"no image", "009.txt": b"x"}), max_broken=0.1)
    assert len(read(data)) == 9
    assert data.broken.reasons == {"s.tar/009": "UnidentifiedImageError: empty, or in no format that Pillow knows"}


# ------------------------------------------------------------------------------------------------ shards


def test_a_shard_that_is_none_does_not_stop_the_others(tmp_path: Path) -> None:
    shard(tmp_path / "1.tar", pairs(60))
    (tmp_path / "2.tar").write_bytes(b"")
    (tmp_path / "3.tar").write_bytes(b"<html>not found</html>" * 100)
    (tmp_path / "4.tar").mkdir()
    data = WebDataset(tmp_path)
    assert len(read(data)) == 60
    assert list(data.broken.reasons) == ["2.tar", "3.tar", "4.tar"]
    assert data.broken.reasons["2.tar"] == "expected an uncompressed tar, got an empty file"
    with pytest.raises(ValueError, match=r"2.tar: expected images .* got none:\n  2.tar: expected an uncompressed tar"):
        WebDataset(tmp_path / "2.tar")
    assert not WebDataset(tmp_path / "1.tar").broken.left_out


def header_of(path: Path, name: str) -> int:
    with tarfile.open(path) as tar:
        return tar.getmember(name).offset


@pytest.mark.parametrize("damage", ["flip", "zeros"])
def test_what_comes_after_a_damaged_header_is_read(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """tarfile would take it for the end of the archive."""
    path = shard(tmp_path / "s.tar", pairs(8))
    content, place = bytearray(path.read_bytes()), header_of(path, "005.png")
    if damage == "zeros":
        content[place : place + 512] = bytes(512)
    else:
        content[place] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        data = WebDataset(path, max_broken=0.5)
    assert set(read(data)) == {f"s.tar/{i:03d}" for i in range(8) if i != 5}
    assert data.broken.reasons == {"s.tar/005": "no image"}
    first = place + (512 if damage == "zeros" else 0)
    assert data.broken.left_out == {"s.tar": f"is damaged from byte {first} to {place + 1024}: what was there is lost"}
    assert data.broken.left_out["s.tar"] in caplog.text


def test_several_archives_in_one_are_all_read(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` makes it."""
    both = shard(tmp_path / "a", pairs(3)).read_bytes() + shard(tmp_path / "b", pairs(2, 50)).read_bytes()
    (tmp_path / "s.tar").write_bytes(both)
    data = WebDataset(tmp_path / "s.tar")
    assert len(read(data)) == 5
    assert not data.broken.left_out


def test_damage_up_to_the_end(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs(8))
    content, place = path.read_bytes(), header_of(path, "005.png")
    path.write_bytes(content[:place] + b"\xff" * (len(content) - place))
    data = WebDataset(path)
    assert len(read(data)) == 5
    lost = f"is damaged from byte {place} on: what comes after its first 10 files is lost"
    assert data.broken.left_out == {"s.tar": lost}


def test_a_size_below_zero_does_not_go_round_for_ever(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", pairs(3))
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("bad.png")
        member.pax_headers = {"size": "-1536"}
        tar.addfile(member)
    data = WebDataset(path, max_broken=0.5)
    assert {f"s.tar/{i:03d}" for i in range(3)} <= set(read(data))
    assert "s.tar" in data.broken.left_out


def test_a_shard_that_goes_away(tmp_path: Path) -> None:
    data = WebDataset(shard(tmp_path / "s.tar", pairs(3)), max_broken=1.0)
    (tmp_path / "s.tar").unlink()
    assert not read(data)
    assert data.broken.reasons["s.tar/000"] == "s.tar: No such file or directory"


# ------------------------------------------------------------------------------------------------ tables


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
            "line 2: a quote is not closed; it goes on over the row '2.png,a fox'",
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
        (b'{"image": "5.png", "caption": "happy \\ud83d"}', "not Unicode: half a character, \\ud83d, at character 7"),
        (b'{"image": "5.png", "caption": "caf\xe9"}', "caption: not UTF-8: byte 0xe9 at character 4"),
        (b'{"image": "5.png", "caption": ""}', "caption: expected text or a list of texts, got ''"),
        (b'{"image": "5.png", "caption": ["a", 5]}', "expected text or a list of texts, got ['a', 5]"),
        (b'{"image": "\\ud83d.png", "caption": "x"}', "image: not Unicode: half a character"),
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
    with pytest.raises(ValueError, match=r"captions.csv: expected UTF-16 as its first bytes say, got truncated data"):
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


# ------------------------------------------------------------------------------------------------ a whole run


def test_a_run_over_all_of_it_is_reported(tiny: Make, pictures: Path, tmp_path: Path) -> None:
    """Names that are no text, halves of characters, no shards: the run goes on, and its report names them."""
    rows = [json.loads(line) for line in (pictures / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    files: list[tuple[str, bytes]] = []
    for row in rows:
        stem = row["image"].removesuffix(".png") + "-\udce9"
        files += [(f"{stem}.png", (pictures / row["image"]).read_bytes()), (f"{stem}.txt", row["caption"].encode())]
    files += [
        ("half.png", png()),
        ("half.json", b'{"caption": "happy \\ud83d"}'),
        ("b\udcff", b""),
        ("\udcfe.cls", b""),
    ]
    shards = tmp_path / "shards"
    shards.mkdir()
    shard(shards / "0.tar", files, format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
    (shards / "1.tar").write_bytes(b"")
    config = tiny(run=tmp_path / "caf\udce9", data=f"webdataset:{shards}", max_broken=0.2, eval_fraction=0.3, steps=4)
    outcome = train(dataclasses.replace(config, tensorboard=True, profile=(1, 1)))
    assert outcome.step == 4
    assert train(dataclasses.replace(config, tensorboard=True, profile=(1, 1), resume=True)).step == 4
    load_model(config.folder)
    page = outcome.folder.report.read_text(encoding="utf-8")
    warnings = [record["message"] for record in outcome.folder.records("warning")]
    for name in (
        "0.tar/half: not Unicode: half a character",
        "0.tar/b\\xff: expected a name",
        "1.tar: expected an uncompressed",
    ):
        assert any(name in warning for warning in warnings), name
    for name in ("0.tar/half", "0.tar/b\\xff", "1.tar", "0.tar/\\xfe.cls"):
        assert name in page, name
    assert np.isfinite([record["loss"] for record in outcome.folder.records("step")]).all()
