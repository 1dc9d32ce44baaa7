"""Shards: each file is read, belongs to a sample that is, or is counted and named; a run continues over all of it."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pretrain_data import pairs, png, read, shard

from mmkernels.pretrain import Config, load_model, train
from mmkernels.pretrain.data import TooManyBrokenError, WebDataset
from mmkernels.pretrain.data.webdataset import _NAME

Make = Callable[..., Config]


# ------------------------------------------------------------------------------------------------ names in a shard


@pytest.mark.parametrize(
    ("name", "key", "extension"),  # as in webdataset.tariterators.base_plus_ext 1.0.2
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
    assert data.broken.reasons == {"s.tar/009": "UnidentifiedImageError: empty, or not in a format that Pillow reads"}


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
    assert data.broken.left_out == {"s.tar": f"is damaged from byte {first} to {place + 1024}: its content is lost"}
    assert data.broken.left_out["s.tar"] in caplog.text


def test_several_archives_in_one_are_all_read(tmp_path: Path) -> None:
    """As `cat a.tar b.tar` produces."""
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
    lost = f"is damaged from byte {place} on: everything after its first 10 files is lost"
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


# ------------------------------------------------------------------------------------------------ a whole run


def test_a_run_over_all_of_it_is_reported(tiny: Make, pictures: Path, tmp_path: Path) -> None:
    """Undecodable names, lone surrogates, files that are not shards: the run continues, and its report names them."""
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
        "0.tar/half: not Unicode: lone surrogate",
        "0.tar/b\\xff: expected a name",
        "1.tar: expected an uncompressed",
    ):
        assert any(name in warning for warning in warnings), name
    for name in ("0.tar/half", "0.tar/b\\xff", "1.tar", "0.tar/\\xfe.cls"):
        assert name in page, name
    assert np.isfinite([record["loss"] for record in outcome.folder.records("step")]).all()
