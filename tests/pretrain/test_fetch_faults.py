"""Packages and places that are hostile, damaged or in use."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import pytest
from pretrain.debs import deb, png

from mmkernels.pretrain.fetch import Deb, FetchError
from mmkernels.pretrain.fetch.cli import Fetch, fetch
from mmkernels.pretrain.fetch.deb import DebError
from mmkernels.pretrain.fetch.folder import DataFolder

TUX = "tuxpaint-stamps-default"


def test_no_file_leaves_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the names in a package: absolute after a prefix, upwards, too long, twice the same, links."""
    monkeypatch.chdir(tmp_path)
    stamps, outside = "usr/share/tuxpaint/stamps", tmp_path / "outside"
    names = [f"{stamps}/{slashes}{outside}/y{i}" for i, slashes in enumerate(("", "/", "//"))]
    names += [f"{stamps}/a/a.png/below", f"{stamps}/{'d/' * 2500}x"]
    names += [f"{stamps}/../../../../../../../../../../../{outside}/z", f"{stamps}/{'n' * 300}"]
    files: dict[str, bytes | str] = {f"{stamps}/a/a.png": png(), f"{stamps}/a/a.txt": b"A flag.\nfr.utf8=Un drapeau."}
    files[f"{stamps}/a/./a.png"] = png("blue")
    files[f"{stamps}/"] = b"no name"
    files[f"{stamps}/a/link.png"] = "a.png"
    for i, name in enumerate(names):
        files |= {f"{name}.png": png(size=(21 + i, 9)), f"{name}.txt": b"A flag.", f"{name}_desc_fr.ogg": b"sound"}
    given = deb(tmp_path / "stamps.deb", TUX, files)
    about = fetch(Fetch("tuxpaint", out=Path("out"), from_=(given,), languages=("en", "fr")))
    assert about["images"] == 1 and about["left_out"]["links to other files"] == 1
    assert about["left_out"]["files whose name cannot be used, or is another's"] >= 9
    assert not outside.exists() and {path.name for path in tmp_path.iterdir()} == {"out", "stamps.deb"}


def test_a_captioned_picture_is_kept_though_its_twin_has_no_caption(tmp_path: Path) -> None:
    stamps = "usr/share/tuxpaint/stamps"
    files: dict[str, bytes | str] = {f"{stamps}/m.png": png(), f"{stamps}/x.png": png(), f"{stamps}/x.txt": b"A flag."}
    given = deb(tmp_path / "stamps.deb", TUX, files)
    about = fetch(Fetch("tuxpaint", out=tmp_path / "out", from_=(given,), languages=("en",)))
    assert about["images"] == 1 and (tmp_path / "out/images/x.png").is_file()
    assert about["left_out"] == {"pictures without a caption": 1}


@pytest.mark.parametrize("packed", [".gz", ".xz", ".bz2"])
def test_a_damaged_package_is_never_read_in_part(tmp_path: Path, packed: str) -> None:
    files: dict[str, bytes | str] = {f"f{i}": os.urandom(300) for i in range(20)}
    whole = bytearray(deb(tmp_path / "x.deb", "thing", files, packed).read_bytes())
    for place in range(len(whole) // 2, len(whole) - 2, len(whole) // 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "y.deb").write_bytes(damaged)
        with pytest.raises(DebError, match="damaged"):
            list(Deb(tmp_path / "y.deb").files())


def test_damage_shows_or_changes_nothing(tmp_path: Path) -> None:
    """Of an archive without a checksum of its own, in which a bad header looks like the end."""
    files: dict[str, bytes | str] = {f"f{i}": os.urandom(300) for i in range(20)}
    whole = bytearray(deb(tmp_path / "x.deb", "thing", files, "").read_bytes())
    expected, shown = list(Deb(tmp_path / "x.deb").files()), 0
    for place in range(len(whole) // 3, len(whole), 101):
        damaged = bytearray(whole)
        damaged[place] ^= 0x10
        (tmp_path / "y.deb").write_bytes(damaged)
        try:
            assert list(Deb(tmp_path / "y.deb").files()) == expected
        except DebError:
            shown += 1
    assert shown > 20


def test_a_damaged_zstandard_package_is_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ZstdError(Exception):
        pass

    class ZstdDecompressor:
        @contextmanager
        def stream_reader(self, raw: IO[bytes]) -> Iterator[IO[bytes]]:
            raise ZstdError("bad block")
            yield raw

    fake = SimpleNamespace(ZstdError=ZstdError, ZstdDecompressor=ZstdDecompressor)
    monkeypatch.setitem(sys.modules, "zstandard", fake)  # type: ignore[arg-type]
    with pytest.raises(DebError, match=r"data\.tar\.zst is damaged \(bad block\)"):
        list(Deb(deb(tmp_path / "x.deb", "thing", {"a": b"1"}, ".zst")).files())


def test_two_processes_do_not_make_one_folder(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "out", 64) as folder:
        folder.picture("a.png", png())
        with pytest.raises(FetchError, match="out is being made by another process"):
            DataFolder(tmp_path / "out", 64).__enter__()
        assert (folder.path / "images/a.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("out", ["file/x", "/", ".", ".."])
def test_a_place_that_cannot_be(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FetchError, match=r"out: expected a folder that can be made"):
        fetch(Fetch("openclipart", out=Path(out), from_=(tmp_path / "none.deb",)))
