"""Data sets from Debian packages: packages read without dpkg, downloads that are checked, folders whole or absent."""

from __future__ import annotations

import json
import os
import struct
import sys
import wave
import zlib
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pretrain.debs import PACKERS, Apt, ar, deb, png, tar

from mmkernels.cli import main as command
from mmkernels.pretrain.data import open_data
from mmkernels.pretrain.fetch import Deb, FetchError
from mmkernels.pretrain.fetch.apt import download, given
from mmkernels.pretrain.fetch.cli import Fetch, fetch, main
from mmkernels.pretrain.fetch.deb import DebError
from mmkernels.pretrain.fetch.folder import DataFolder

STAMPS, DOC = "usr/share/tuxpaint/stamps", "usr/share/doc/tuxpaint-stamps-default"
TUX = "tuxpaint-stamps-default"


def sound() -> bytes:
    file = BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes((np.sin(np.arange(4000) / 5) * 9000).astype("<i2").tobytes())
    return file.getvalue()


def giant() -> bytes:
    """A PNG that says it has 400 megapixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 6, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunks + struct.pack(">I", 64) + b"IDAT" + b"\0" * 68


def stamps(count: int = 6) -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {f"{DOC}/copyright": b"GPL-2, says the package"}
    for i in range(count):
        stem = f"{STAMPS}/animals/beast{i}"
        files[f"{stem}.png"] = png(f"#{i:02x}8040", (600, 300))
        files[f"{stem}.txt"] = f"A beast no. {i}.\nfr.utf8=Une bête no. {i}.\nde.utf8= \nes.utf8=Bestia {i}\n".encode()
        files[f"{stem}_desc_fr.ogg"] = sound()
        files[f"{stem}_desc_ro.ogg"] = sound()
        files[f"{stem}.ogg"] = sound()  # a roar
    return files


ODD: dict[str, bytes | str] = {
    f"{STAMPS}/animals/beast0_desc.ogg": sound(),
    f"{STAMPS}/animals/beast0_mirror.png": png("blue"),
    f"{STAMPS}/animals/copy.png": png("#008040", (600, 300)),
    f"{STAMPS}/animals/copy.txt": b"A copy.",
    f"{STAMPS}/town/drawn.svg": b"<svg/>",
    f"{STAMPS}/town/drawn.txt": b"Drawn.",
    f"{STAMPS}/town/drawn_desc_fr.ogg": sound(),
    f"{STAMPS}/town/giant.png": giant(),
    f"{STAMPS}/town/giant.txt": b"A giant.",
    f"{STAMPS}/town/broken.png": png()[:40],
    f"{STAMPS}/town/broken.txt": b"Broken.",
    f"{STAMPS}/town/untold.png": png("#aabbcc"),
    f"{STAMPS}/town/../../../../out.png": png("#123456"),
    f"{STAMPS}/town/caf\udce9.png": png("#654321"),
    f"{STAMPS}/town/link.png": "giant.png",
}


@pytest.fixture
def stamped(tmp_path: Path) -> Path:
    return deb(tmp_path / "stamps.deb", TUX, {**stamps(), **ODD})


# ------------------------------------------------------------------------------------------------ packages


@pytest.mark.parametrize("packed", [kind for kind in PACKERS if kind != ".zst"])
def test_a_package_is_read_without_installing_it(tmp_path: Path, packed: str) -> None:
    files = {"a/b.txt": b"x" * 1001, "a/l.txt": "b.txt", "a/empty": b"", "a/caf\udce9": b"1"}
    found = Deb(deb(tmp_path / "x.deb", "thing", files, packed))
    assert found.name == "thing" and found.control["Version"] == "1:2.0-1"
    assert [(f.path, f.content, f.link) for f in found.files()] == [
        (path, content if isinstance(content, bytes) else b"", content if isinstance(content, str) else "")
        for path, content in files.items()
    ]


def test_a_file_that_is_no_package_is_refused(tmp_path: Path) -> None:
    whole = deb(tmp_path / "x.deb", "thing", {"a": os.urandom(5000)}).read_bytes()
    control = {"debian-binary": b"2.0\n", "control.tar": tar({"control": b"Package: x\nVersion: 1\n"})}
    for content, message in [
        (b"PK\x03\x04", r"got something else \(no ar archive\)"),
        (whole[:-1000], "got a truncated one"),
        (whole[:72], r"got an ar archive without control\.tar"),
        (whole[:90], r"got a damaged one \(a bad header\)"),
        (ar(control), r"without data\.tar"),
        (ar({**control, "data.tar.lzo": b""}), "packed by xz, gz, bz2 or zst, got data.tar.lzo"),
        (ar({**control, "control.tar": tar({}), "data.tar": tar({})}), "one without a control file"),
        (whole[:-2500] + b"\0" * 2500, r"data\.tar\.xz is damaged"),
    ]:
        (tmp_path / "y.deb").write_bytes(content)
        with pytest.raises(DebError, match=message):
            list(Deb(tmp_path / "y.deb").files())
    with pytest.raises(DebError, match="No such file"):
        Deb(tmp_path / "z.deb")


def test_zstandard_is_left_to_dpkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    found = Deb(deb(tmp_path / "x.deb", "thing", {"a": b"1"}, ".zst"))
    with pytest.raises(
        DebError, match=r"needs the package zstandard \(pip install zstandard\) or the program dpkg-deb"
    ):
        list(found.files())
    (tmp_path / "plain.tar").write_bytes(tar({"a": b"1"}))
    tool = tools / "dpkg-deb"
    tool.write_text(f'#!/bin/sh\n[ "$1" = --fsys-tarfile ] && exec /bin/cat {tmp_path}/plain.tar\n', encoding="utf-8")
    tool.chmod(0o755)
    assert [file.path for file in found.files()] == ["a"]
    tool.write_text("#!/bin/sh\nexit 3\n", encoding="utf-8")
    with pytest.raises(DebError, match=r"is damaged|status 3"):
        list(found.files())


# ------------------------------------------------------------------------------------------------ downloads


@pytest.fixture
def apt(tmp_path: Path, stamped: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    apt = Apt(tmp_path / "apt", {TUX: stamped})
    monkeypatch.setenv("PATH", str(apt.home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return apt


def test_a_package_is_loaded_once(apt: Apt, tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "mmkernels" / "debs"
    assert fetch(Fetch("tuxpaint", tmp_path / "one"))["images"] == 6
    assert [path.name for path in cache.iterdir()] == [f"{TUX}_1%3a2.0-1.deb"]
    assert apt.calls == [f"apt-cache show --no-all-versions {TUX}", f"apt-get download --quiet {TUX}=1:2.0-1"]
    fetch(Fetch("tuxpaint", tmp_path / "two", size=32))
    assert len(apt.calls) == 3, "only the hash is looked up"
    fetch(Fetch("tuxpaint", tmp_path / "one"))
    assert len(apt.calls) == 3, "a finished folder is left as it is"
    kept = next(cache.iterdir())
    kept.write_bytes(kept.read_bytes()[:-1] + b"?")
    fetch(Fetch("tuxpaint", tmp_path / "three"))
    assert len(apt.calls) == 5, "a damaged file is loaded again"


def test_failures_say_what_was_tried_and_leave_nothing(
    apt: Apt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(how: str) -> str:
        apt.works(how)
        assert main(["tuxpaint", "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() or "partial" in path.name]
        return " ".join(capsys.readouterr().err.split())

    offline = message("offline")
    assert f"apt-get download {TUX}=1:2.0-1 failed: E: Failed to fetch http://nowhere" in offline
    assert "needs the network" in offline and "pass them with --from" in offline and "something" not in offline
    assert f"apt-get download {TUX}=1:2.0-1 failed: nothing (status -9)" in message("killed")
    right = apt.packages[TUX]
    apt.packages[TUX] = [*right[:2], "SHA256: " + "0" * 64]
    assert "expected a file with SHA256 0000" in (wrong := message("well")) and "Nothing of it was kept" in wrong
    apt.packages = {"other": right}
    assert f"apt-cache show {TUX}: expected a package of this system's lists, got E: No packages found" in message(
        "well"
    )
    apt.packages = {}
    assert "Run 'apt-get update' as root" in message("well")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "expected apt-get, which downloads Debian packages, got none on this system" in message("well")


def test_a_killed_download_is_made_up_for(apt: Apt, tmp_path: Path) -> None:
    apt.works("killed with its parent")
    killed = get_context("fork").Process(target=main, args=(["tuxpaint", "--out", str(tmp_path / "out")],))
    killed.start()
    killed.join()
    assert killed.exitcode == -9
    half = list((tmp_path / "cache").rglob("*.deb"))
    assert len(half) == 1 and half[0].parent.name == f".{TUX}.partial", "half a file, beside its place"
    apt.works("well")
    assert main(["tuxpaint", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in half[0].parents[1].iterdir()] == [f"{TUX}_1%3a2.0-1.deb"]


def test_packages_that_the_user_has(tmp_path: Path, stamped: Path) -> None:
    other = deb(tmp_path / "other.deb", "other", {})
    assert list(given([other, stamped], [TUX])) == [TUX]
    with pytest.raises(FetchError, match=rf"--from: expected the packages {TUX}, got other"):
        given([other], [TUX])
    with pytest.raises(FetchError, match=r"--from: .*no ar archive"):
        given([Path(__file__)], [TUX])


# ------------------------------------------------------------------------------------------------ folders


def test_stamps_become_a_folder_that_a_run_reads(
    tmp_path: Path, stamped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        command(
            ["fetch", "tuxpaint", "--from", str(stamped), "--out", str(out), "--languages", "en", "fr", "--size", "64"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "6 pictures and 7 recordings in 12 rows" in said and f"--data folder:{out}" in said
    rows = [json.loads(line) for line in (out / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    english = {"image": "images/animals/beast0.png", "caption": "A beast no. 0.", "language": "en"}
    assert rows[0] == english | {"audio": "audio/animals/beast0_desc.ogg"} and rows[2]["language"] == "en"
    assert rows[1] == english | {
        "language": "fr", "text_b": "Une bête no. 0.", "audio": "audio/animals/beast0_desc_fr.ogg"
    }  # fmt: skip
    with Image.open(out / rows[0]["image"]) as image:
        assert image.size == (64, 32) and image.mode == "RGBA"
    assert json.loads((out / "fetched.json").read_text(encoding="utf-8"))["left_out"] == {
        "mirrored pictures": 1,
        "pictures the same as another": 1,
        "pictures larger than 64 megapixels": 1,
        "pictures that cannot be decoded": 1,
        "links to other files": 1,
        "pictures that are SVG alone, which Pillow does not read": 1,
        "pictures without a caption": 3,
        "recordings without a picture": 1,
    }
    assert not (tmp_path / "out.png").exists() and "out.png" not in {path.name for path in tmp_path.rglob("*")}
    assert (out / "LICENSES" / f"{TUX}.txt").read_bytes() == b"GPL-2, says the package"
    assert f"from the Debian package {TUX} 1:2.0-1" in " ".join((out / "README.md").read_text(encoding="utf-8").split())
    files = {str(path.relative_to(out)) for path in out.rglob("*.*") if path.parent.name == "animals"}
    assert files == {row["image"] for row in rows} | {row["audio"] for row in rows if "audio" in row}

    pairs = open_data(f"folder:{out}", fields=("image", "text"), eval_fraction=0, resolution=16).train
    assert len(pairs) == 6 and len(pairs.broken) == 0, "a picture with its caption"
    both = open_data(out, fields=("text", "text_b", "language"), labels=("language",), eval_fraction=0).train
    assert both.classes == {"language": ("en", "fr")} and len(set(both.concepts.tolist())) == 6
    pytest.importorskip("soundfile")
    heard = open_data(out, fields=("image", "text", "audio"), eval_fraction=0, resolution=16).train
    assert [heard[i].values["audio"].shape[1] for i in (0, 1)] == [40, 40]


def test_languages_are_those_of_the_package(tmp_path: Path, stamped: Path) -> None:
    with pytest.raises(FetchError, match="languages: expected some of en, es, fr, got de, xx"):
        fetch(Fetch("tuxpaint", tmp_path / "out", (stamped,), ("fr", "de", "xx")))  # German has blanks alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stamps.deb"]
    about = fetch(Fetch("tuxpaint", tmp_path / "out", (stamped,), ("es",)))
    assert about["rows"] == 6 and about["sounds"] == 0
    with pytest.raises(ValueError, match="languages: expected none for openclipart, got en"):
        Fetch("openclipart", languages=("en",))


def test_an_interrupted_build_leaves_no_folder(
    tmp_path: Path, stamped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(self: DataFolder, path: str, content: bytes) -> str:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    leftover = tmp_path / ".out.partial" / "images"
    leftover.mkdir(parents=True)
    (leftover / "old.png").write_bytes(b"")  # of a build that was killed
    with monkeypatch.context() as patch:
        patch.setattr(DataFolder, "sound", stop)
        assert main(["tuxpaint", "--from", str(stamped), "--out", str(out)]) == 130
    assert "stopped" in capsys.readouterr().err
    assert not out.exists() and not leftover.parent.exists()
    leftover.mkdir(parents=True)
    (leftover / "old.png").write_bytes(b"")
    assert main(["tuxpaint", "--from", str(stamped), "--out", str(out)]) == 0
    assert not leftover.parent.exists() and not list(out.rglob("old.png"))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, stamped: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert fetch(Fetch("tuxpaint", out, (stamped,)))["rows"] == 18
    with pytest.raises(FetchError, match=r"holds this data with other settings \(size: 256 -> 8\)"):
        fetch(Fetch("tuxpaint", out, (stamped,), size=8))
    (out / "fetched.json").unlink()
    with pytest.raises(FetchError, match=r"holds files already\. Name another folder with --out"):
        fetch(Fetch("tuxpaint", out, (stamped,)))
    empty = deb(tmp_path / "empty.deb", TUX, {})
    with pytest.raises(FetchError, match=f"expected pictures with captions in {TUX}, got none: nothing left out"):
        fetch(Fetch("tuxpaint", tmp_path / "none", (empty,), ("en",)))
    assert not (tmp_path / "none").exists()


def svg(title: str, *tags: str, more: str = "") -> bytes:
    bag = "".join(f"<rdf:li>{tag}</rdf:li>" for tag in tags)
    return (
        '<svg xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/" '
        'xmlns:cc="http://web.resource.org/cc/"><metadata><rdf:RDF><cc:Work>'
        f"<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{bag}</rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata>"
        f"{more}</svg>"
    ).encode()


def test_clip_art_with_titles_of_its_own_becomes_a_folder(tmp_path: Path) -> None:
    drawings = {
        "food/apple_01": svg("Clipart by A. Painter - red_apple_01", "fruit", "hash", "sweet_food"),
        "food/pear": svg("Pear"),
        "food/embedded": svg("A photo", more='<image href="data:image/png;base64,AAGPLB"/>'),
        "free": svg("Free", more='<a href="http://creativecommons.org/licenses/GPL/2.0/"/>'),
        "broken": b"<svg>",
        "nameless": svg("1234"),
        "big": svg("Big"),
        "again": svg("Again"),
        **{f"icon{i}": svg("A theme") for i in range(4)},
    }
    a = {f"usr/share/openclipart/svg/{stem}.svg": content for stem, content in drawings.items()}
    colours = {stem: f"#{i:02x}{i:02x}80" for i, stem in enumerate(drawings)}
    b: dict[str, bytes | str] = {f"usr/share/openclipart/png/{stem}.png": png(c) for stem, c in colours.items()}
    b["usr/share/openclipart/png/big.png"] = giant()
    b["usr/share/openclipart/png/again.png"] = "food/pear.png"
    b["usr/share/doc/openclipart-png/copyright"] = b"public domain"
    debs = [deb(tmp_path / "b.deb", "openclipart-png", b), deb(tmp_path / "a.deb", "openclipart-svg", {**a})]
    about = fetch(Fetch("openclipart", tmp_path / "out", tuple(debs)))
    rows = [json.loads(line) for line in (tmp_path / "out/captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(row["image"], row["caption"]) for row in rows] == [
        ("images/food/apple_01.png", ["red apple", "red apple, fruit, sweet food"]),
        ("images/food/embedded.png", ["A photo"]),
        ("images/food/pear.png", ["Pear"]),
    ]
    assert about["left_out"] == {
        "pictures under the GPL": 1,
        "pictures without a title of their own": 6,
        "pictures larger than 64 megapixels": 1,
        "links to other pictures": 1,
    }
    assert len(open_data(tmp_path / "out", eval_fraction=0, resolution=8).train) == 3


def test_downloads_need_every_package(apt: Apt, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"Or get the \.deb files of openclipart-svg, openclipart-png from any mirror"):
        download(("openclipart-svg", "openclipart-png"), tmp_path / "c")
