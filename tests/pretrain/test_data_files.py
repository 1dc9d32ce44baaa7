"""The user's own data: folders, tables and tar shards, intact and broken."""

from __future__ import annotations

import csv
import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmkernels.pretrain import Stream
from mmkernels.pretrain.data import (
    BatchSampler,
    Collator,
    FolderDataset,
    Source,
    TooManyBrokenError,
    TrainLoader,
    WebDataset,
    open_data,
)
from mmkernels.pretrain.data.base import BrokenImageError
from mmkernels.pretrain.data.decode import decode_image
from mmkernels.pretrain.encoders import HashedWords, Patches
from mmkernels.pretrain.tokenizer import TextTokenizer


def picture(
    path: Path | None = None,
    *,
    colour: tuple[int, ...] = (255, 0, 0),
    size: tuple[int, int] = (20, 10),
    kind: str = "PNG",
) -> bytes:
    out = io.BytesIO()
    Image.new("RGB" if len(colour) == 3 else "RGBA", size, colour).save(out, kind)
    if path is not None:
        path.write_bytes(out.getvalue())
    return out.getvalue()


def write_jsonl(folder: Path, rows: list[dict[str, object]], name: str = "captions.jsonl") -> Path:
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty images; one caption in Hindi, one list of captions."""
    for i in range(40):
        picture(tmp_path / f"{i}.png", colour=(i, 0, 0))
    rows: list[dict[str, object]] = [{"image": f"{i}.png", "caption": f"thing number {i}"} for i in range(40)]
    rows[1]["caption"] = "लाल सेब 🍎"
    rows[2]["caption"] = ["a kite", "two kites"]
    return write_jsonl(tmp_path, rows)


# ------------------------------------------------------------------------------------------------ decoding


def test_decode_keeps_proportions_and_pads_with_transparency() -> None:
    image = decode_image(picture(size=(40, 20)), 16)
    assert image.shape == (16, 16, 4)
    assert image.dtype == np.uint8
    assert (image[4:12] == (255, 0, 0, 255)).all()
    assert (image[:4] == 0).all()
    assert (image[12:] == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_decode_formats(kind: str) -> None:
    image = decode_image(picture(size=(500, 500), colour=(0, 200, 0), kind=kind), 16)
    np.testing.assert_allclose(image[8, 8], (0, 200, 0, 255), atol=8)


def test_decode_sixteen_bit_grey_turns_and_tiny() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(out, "PNG")
    np.testing.assert_allclose(decode_image(out.getvalue(), 8)[4, 4], (128, 128, 128, 255), atol=1)
    turned = Image.new("RGB", (20, 10))
    exif = turned.getexif()
    exif[0x0112] = 6  # a quarter turn
    out = io.BytesIO()
    turned.save(out, "JPEG", exif=exif)
    visible = decode_image(out.getvalue(), 20)[..., 3] > 0
    assert visible.any(1).sum() == 20
    assert visible.any(0).sum() == 10
    assert decode_image(picture(size=(1, 1000)), 16)[..., 3].any()


@pytest.mark.parametrize("data", [b"", b"not an image", picture()[:40], picture(kind="JPEG", size=(300, 300))[:-400]])
def test_decode_broken(data: bytes) -> None:
    with pytest.raises(BrokenImageError):
        decode_image(data, 16)


def test_decode_missing(tmp_path: Path) -> None:
    with pytest.raises(BrokenImageError, match="FileNotFoundError"):
        decode_image(tmp_path / "gone.png", 16)


# ------------------------------------------------------------------------------------------------ folders


def test_jsonl(folder: Path) -> None:
    data = FolderDataset(folder, resolution=16)
    assert len(data) == 40
    assert data[1].captions == ("लाल सेब 🍎",)
    assert data[2].captions == ("a kite", "two kites")
    assert data[3].name == "3.png"
    assert data[7].image[8, 8].tolist() == [7, 0, 0, 255]


def test_csv_with_lists_and_several_rows_for_one_image(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        picture(tmp_path / name)
    with (tmp_path / "captions.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["caption", "image"])
        writer.writerows(
            [
                ["a pear, green", "a.png"],
                ['["two\\nlines", "plums"]', "b.png"],
                ["[sic] quince", "c.png"],
                ["a pear", "a.png"],
            ]
        )
    data = FolderDataset(tmp_path)
    assert [data[i].captions for i in range(3)] == [
        ("a pear, green", "a pear"),
        ("two\nlines", "plums"),
        ("[sic] quince",),
    ]


def test_same_caption_is_the_same_concept(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"image": f"{i}.png", "caption": c} for i, c in enumerate(["A Dog", "a  dog", "a cat"])
    ]
    assert FolderDataset(write_jsonl(tmp_path, rows)).concepts.tolist() == [0, 0, 1]


def test_missing_columns_and_bad_rows(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text("file,caption\na.png,x\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"line 2: expected the columns 'image' and 'caption', got \['file', 'caption'\]"
    ):
        FolderDataset(tmp_path)
    table.unlink()
    rows = tmp_path / "captions.jsonl"
    for text, message in [
        ('{"image": "a.png"}', r"line 1: expected the columns 'image' and 'caption', got \['image'\]"),
        ('{"image": "a.png", "caption": "x"}\n{oops', "line 2: expected one JSON object, got '{oops'"),
        ("[1]", "expected one JSON object, got list"),
        ('{"image": 3, "caption": "x"}', "image: expected a path, got 3"),
        ('{"image": "a.png", "caption": []}', r"caption: expected text or a list of texts, got \[\]"),
        ('{"image": "a.png", "caption": "  "}', "caption: expected text"),
        ("\n\n", "expected at least one image with a caption, got no rows"),
    ]:
        rows.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            FolderDataset(rows)


def test_folder_without_or_with_two_tables(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected exactly one .jsonl or .csv file with captions, got none"):
        open_data(tmp_path)
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(ValueError, match=r"got a\.csv, b\.jsonl"):
        open_data(tmp_path)
    with pytest.raises(ValueError, match="expected a folder, or an existing"):
        open_data(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ broken images


def break_some(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes((folder / name).read_bytes()[:30])


def test_broken_images_are_skipped_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_some(folder, "5.png")
    (folder / "6.png").unlink()
    data = FolderDataset(folder, max_broken=0.05)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):  # each reported once
            samples = data.read(range(40))
    assert [s.name for s in samples] == [f"{i}.png" for i in range(40) if i not in (5, 6)]
    assert list(data.broken.reasons) == ["5.png", "6.png"]
    assert "FileNotFoundError" in data.broken.reasons["6.png"]
    assert [r.message.split(":")[0] for r in caplog.records] == ["skipped 5.png", "skipped 6.png"]
    assert "2 of 40 samples" in caplog.records[1].message


def test_too_many_broken_images_stop_the_run_with_their_names(folder: Path) -> None:
    break_some(folder, "5.png", "6.png", "7.png")
    data = FolderDataset(folder, max_broken=0.05)
    with pytest.raises(TooManyBrokenError, match=r"3 of 40 .* max_broken=0.05:\n  5.png: .*\n  6.png: .*\n  7.png: "):
        data.read(range(40))
    assert len(FolderDataset(folder, max_broken=0.075).read(range(40))) == 37
    break_some(folder, *(f"{i}.png" for i in range(5, 35)))
    several = FolderDataset(folder, max_broken=0.5)
    with pytest.raises(TooManyBrokenError, match=r"21 of 40 (.*\n){20}  24.png: .*\n  and 1 more$"):
        several.read(range(40))
    with pytest.raises(ValueError, match="max_broken: expected a share between 0 and 1, got 5"):
        FolderDataset(folder, max_broken=5)


def test_skipping_does_not_disturb_order_or_resume(folder: Path) -> None:
    break_some(folder, "5.png", "6.png")

    def fresh() -> TrainLoader:
        data = FolderDataset(folder)
        streams = {"image": Stream(Patches(size=8)), "text": Stream(HashedWords())}
        tokenizer = TextTokenizer.train(iter(()), 300)
        return TrainLoader(data, BatchSampler(data.concepts, 16, 2), Collator(streams, tokenizer))

    straight, killed, resumed = fresh(), fresh(), fresh()
    batches = [next(straight) for _ in range(12)]
    for _ in range(7):
        next(killed)
    resumed.load_state_dict(killed.state_dict())
    for expected in batches[7:]:
        batch = next(resumed)
        assert batch.names == expected.names
        for stream in ("image", "text"):
            assert (batch[stream].tokens == expected[stream].tokens).all()
    assert {len(batch.names) for batch in batches} <= {14, 15, 16}
    assert any(len(batch.names) < 16 for batch in batches)


def test_cache_gives_the_same_pictures_and_keeps_its_bound(folder: Path) -> None:
    small, none = (
        FolderDataset(folder, resolution=8, cache_bytes=3 * 256),
        FolderDataset(folder, resolution=8, cache_bytes=0),
    )
    for _ in range(2):
        for a, b in zip(small.read(range(40)), none.read(range(40)), strict=True):
            np.testing.assert_array_equal(a.image, b.image)
    assert len(small._cache) == 3
    assert not none._cache


# ------------------------------------------------------------------------------------------------ held-out split


def test_held_out_by_caption_is_disjoint_and_stable(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"image": f"{i}.png", "caption": f"thing {i // 2}"} for i in range(400)]
    for i in range(400):
        picture(tmp_path / f"{i}.png", size=(2, 2))
    write_jsonl(tmp_path, rows)

    def captions(source: Source) -> list[str]:
        return [source[i].captions[0] for i in range(len(source))]

    data = open_data(tmp_path, resolution=4, eval_fraction=0.2)
    held_out = captions(data.held_out["held_out"])
    assert len(held_out) == pytest.approx(80, abs=30)
    assert len(held_out) == 2 * len(set(held_out))
    trained = set(captions(data.train))
    assert not trained & set(held_out)
    assert len(trained) + len(set(held_out)) == 200
    write_jsonl(tmp_path, rows[:200])
    smaller = open_data(tmp_path, resolution=4, eval_fraction=0.2)
    assert set(captions(smaller.held_out["held_out"])) <= set(held_out)
    assert open_data(tmp_path, resolution=4, eval_fraction=0).held_out == {}
    assert len(open_data(tmp_path, resolution=4, eval_fraction=0.5, max_eval=10).held_out["held_out"]) == 10
    with pytest.raises(ValueError, match="eval_fraction: expected 0 <= eval_fraction < 1, got 1"):
        open_data(tmp_path, eval_fraction=1)


# ------------------------------------------------------------------------------------------------ tar shards


def write_shard(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def shard_files(first: int, count: int) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    for i in range(first, first + count):
        files[f"{i:04d}.png"] = picture(colour=(i, 0, 0))
        files[f"{i:04d}.txt"] = f"thing {i}".encode()
    return files


def test_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "1.tar", shard_files(0, 3))
    write_shard(
        tmp_path / "2.tar",
        {
            "x/ü.v1.jpg": picture(kind="JPEG"),
            "x/ü.json": json.dumps({"caption": ["eins", "zwei"]}).encode(),
            "x/ü.jpg": picture(kind="JPEG", colour=(0, 0, 255)),
            "b.WEBP": picture(kind="WEBP"),
            "b.json": json.dumps({"text": "drei"}).encode(),
            "notes.cls": b"1",
        },
    )
    data = WebDataset(tmp_path, resolution=16)
    assert [data.name(i) for i in range(len(data))] == [
        "1.tar/0000",
        "1.tar/0001",
        "1.tar/0002",
        "2.tar/x/ü",
        "2.tar/b",
    ]
    assert data[2].captions == ("thing 2",)
    assert data[2].image[8, 8].tolist() == [2, 0, 0, 255]
    assert data[3].captions == ("eins", "zwei")
    np.testing.assert_allclose(data[3].image[8, 8], (0, 0, 255, 255), atol=8)
    assert data[4].captions == ("drei",)
    assert len(WebDataset(tmp_path / "1.tar")) == len(WebDataset(str(tmp_path / "[1].tar"))) == 3
    assert len(open_data(tmp_path, eval_fraction=0).train) == 5


def test_shards_of_the_same_name_are_kept_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_shard(tmp_path / folder / "0.tar", shard_files(0, 3))
    data = WebDataset(str(tmp_path / "*" / "0.tar"))
    assert len(data) == len({data.name(i) for i in range(6)}) == 6


def test_webdataset_names_what_is_missing_or_broken(tmp_path: Path) -> None:
    files = shard_files(0, 30)
    del files["0003.txt"], files["0004.png"]
    files["0005.png"] = files["0005.png"][:50]
    files["0006.txt"] = b"\xff\xfe\xfa"
    files["0007.txt"] = b" "
    del files["0008.txt"]
    files["0008.json"] = b'{"title": "x"}'
    del files["0009.txt"]
    files["0009.json"] = b"{"
    write_shard(tmp_path / "s.tar", files)
    data = WebDataset(tmp_path, max_broken=0.3)
    assert len(data) == 30
    assert len(data.read(range(30))) == 23
    reasons = {name.rpartition("/")[2]: reason for name, reason in data.broken.reasons.items()}
    assert reasons["0003"] == "no .txt or .json"
    assert reasons["0004"] == "no image"
    assert set(reasons) == {f"{i:04d}" for i in range(3, 10)}
    assert "unreadable text" in reasons["0006"]
    assert reasons["0007"] == "an empty .txt"
    assert reasons["0008"] == "no 'caption' or 'text' in the .json"
    assert "unreadable text" in reasons["0009"]


def test_truncated_shard(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shard = write_shard(tmp_path / "s.tar", shard_files(0, 30))
    with tarfile.open(shard) as tar:
        offsets = {member.name: member.offset_data for member in tar}
    whole = shard.read_bytes()
    with caplog.at_level(logging.WARNING):
        assert len(WebDataset(shard).read(range(30))) == 30
        assert not caplog.records
        for place, samples, readable in [
            (offsets["0020.png"] + 10, 21, 20),  # within an image
            (offsets["0020.txt"] + 2, 21, 20),  # within a text
            (offsets["0020.png"] - 512, 20, 20),  # between two files
            (offsets["0020.png"] - 200, 20, 20),  # within a header
        ]:
            caplog.clear()
            shard.write_bytes(whole[:place])
            data = WebDataset(shard)
            assert len(data) == samples, place
            assert len(data.read(range(len(data)))) == readable
            assert "s.tar is truncated" in caplog.records[0].message
            assert len(data.broken) == samples - readable


def test_not_a_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a .tar shard, a folder of them or a glob pattern, got"):
        WebDataset(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"a.tar: expected an uncompressed tar"):
        WebDataset(tmp_path)
    write_shard(tmp_path / "a.tar", shard_files(0, 2), "w:gz")
    with pytest.raises(ValueError, match=r"a.tar: expected an uncompressed tar"):
        WebDataset(tmp_path)
    write_shard(tmp_path / "a.tar", {"a.cls": b"1"})
    with pytest.raises(ValueError, match=r"expected images with .txt or .json captions in the shards, got none"):
        WebDataset(tmp_path)
