"""Small pictures, shards of them, and what a data set reads from them: for the tests of the readers."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from PIL import Image

from mmkernels.pretrain.data import FolderDataset, WebDataset


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
    """Captions of everything readable, by name."""
    return {sample.name: sample.captions for sample in data.read(range(len(data)))}
