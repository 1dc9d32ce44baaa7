"""What the builders of the embedded packs share: verified packages, reproducible npz files, a pack's folder.

A pack is a folder of the package with one `.npz`, `ATTRIBUTION.md` and `LICENSES/`, written by one script from sources
pinned by version and hash; `--check` rebuilds it in memory and compares.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

DATA = Path(__file__).resolve().parents[1] / "mmkernels" / "pretrain" / "data"


class Package(NamedTuple):
    version: str
    sha512: str  # of the tarball, in base64 as in a lock file


class Source:
    """The files of one npm package, read from its verified tarball."""

    def __init__(self, tarball: Path) -> None:
        self._tar = tarfile.open(tarball)  # noqa: SIM115  # open as long as the source

    def text(self, path: str) -> str:
        member = self._tar.extractfile(f"package/{path}")
        if member is None:
            raise FileNotFoundError(path)
        return member.read().decode("utf-8")

    def json(self, path: str) -> Any:
        return json.loads(self.text(path))


def fetch(name: str, package: Package, folder: Path) -> Source:
    """An npm package, fetched by the `npm` client into `folder`; exits if its hash is not the pinned one."""
    spec = f"{name}@{package.version}"
    done = subprocess.run(
        ["npm", "pack", "--silent", spec], cwd=folder, check=True, capture_output=True, encoding="utf-8"
    )
    tarball = folder / done.stdout.strip().splitlines()[-1]
    digest = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if digest != package.sha512:
        raise SystemExit(f"{spec}: expected sha512 {package.sha512}, got {digest}")
    return Source(tarball)


def verified(path: Path, sha256: str) -> Path:
    """The path of a fetched file; exits if its hash is not the pinned one."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != sha256:
        raise SystemExit(f"{path.name}: expected sha256 {sha256}, got {digest}")
    return path


def npz_bytes(arrays: dict[str, np.ndarray], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Like np.savez_compressed, but reproducible: no time stamps, no platform field, no pickles."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method, compresslevel=9) as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.create_system, entry.external_attr = method, 3, 0o644 << 16
            body = io.BytesIO()
            np.lib.format.write_array(body, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
            archive.writestr(entry, body.getvalue())
    return out.getvalue()


def json_array(table: dict[str, Any]) -> np.ndarray:
    """A table as uint8: its JSON in UTF-8."""
    return np.frombuffer(json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode("utf-8"), np.uint8)


def emoji_table() -> dict[str, Any]:
    """The words of the committed emoji pack: `codes`, `names`, `held_out` and others, by concept."""
    with np.load(DATA / "emoji" / "emoji.npz", allow_pickle=False) as arrays:
        table: dict[str, Any] = json.loads(arrays["table"].tobytes())
    return table


class Pack(NamedTuple):
    arrays: dict[str, np.ndarray]
    attribution: str
    licences: dict[str, str]  # by file name
    method: int = zipfile.ZIP_DEFLATED


def compare(pack: Pack, path: Path) -> list[str]:
    """What differs from the pack at `path`. The npz's bytes are not compared, because zlib versions differ."""
    with np.load(path, allow_pickle=False) as old:
        names = sorted(set(old.files) | set(pack.arrays))
        different = [
            name
            for name in names
            if name not in old.files or name not in pack.arrays or not np.array_equal(old[name], pack.arrays[name])
        ]
    for file, text in texts(pack).items():
        there = path.parent / file
        if not there.is_file() or there.read_text(encoding="utf-8") != text:
            different.append(file)
    known = set(pack.licences)
    different += [f"LICENSES/{p.name}" for p in sorted((path.parent / "LICENSES").iterdir()) if p.name not in known]
    return different


def texts(pack: Pack) -> dict[str, str]:
    """The pack's text files, by path in its folder."""
    licences = {f"LICENSES/{name}": text.rstrip() + "\n" for name, text in pack.licences.items()}
    return {"ATTRIBUTION.md": pack.attribution.rstrip() + "\n", **licences}


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A builder's options; `doc` is its docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed pack instead of writing")
    return parser


def finish(build: Callable[[], Pack], path: Path, check: bool) -> None:
    """Build the pack, then write it, or compare it with the committed one; exits with what differs."""
    pack = build()
    if check:
        different = compare(pack, path)
        if different:
            raise SystemExit(f"the pack differs from a fresh build in: {', '.join(different)}")
        print("the pack equals a fresh build")
        return
    (path.parent / "LICENSES").mkdir(parents=True, exist_ok=True)
    path.write_bytes(npz_bytes(pack.arrays, pack.method))
    for file, text in texts(pack).items():
        (path.parent / file).write_text(text, encoding="utf-8")
    print(f"{path}: {path.stat().st_size:,} bytes")
