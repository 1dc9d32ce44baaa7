"""What a checkpoint consists of: `index.json`, where its tensors lie; `manifest.json`, which tells if it is whole."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmkernels.pretrain.checkpoint.agreement import Group, everyones, place
from mmkernels.pretrain.checkpoint.folders import flush, step_of, whole
from mmkernels.pretrain.checkpoint.shards import Stored

__all__ = [
    "INDEX",
    "MANIFEST",
    "OTHERS",
    "Entry",
    "Sum",
    "check",
    "read_index",
    "sums_of",
    "write_index",
    "write_manifest",
]

INDEX, MANIFEST, OTHERS = "index.json", "manifest.json", "training.pt"
_VERSION = 1
_BLOCK = 1 << 22  # bytes
Sum = tuple[int, int]
"""Of a file: size in bytes, CRC-32."""


class Entry(NamedTuple):
    """A stored tensor."""

    dtype: torch.dtype
    size: torch.Size
    parts: list[Stored]


def write_index(folder: Path, entries: Mapping[str, Entry]) -> None:
    written = {
        name: {
            "dtype": str(entry.dtype).removeprefix("torch."),
            "size": list(entry.size),
            "parts": [part._asdict() for part in entry.parts],
        }
        for name, entry in sorted(entries.items())
    }
    _write(folder / INDEX, written)


def read_index(folder: Path, remedy: str = "") -> dict[str, Entry]:
    """The tensors of a checkpoint by name, sorted. Raise DamagedError if it is not what `write_index` writes."""
    with whole(folder / INDEX, remedy) as file:
        entries = {}
        for name, given in json.loads(file.read_text(encoding="utf-8")).items():
            dtype = getattr(torch, given["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name}: expected a dtype, got {given['dtype']}")
            parts = [_part(part) for part in given["parts"]]
            entries[name] = Entry(dtype, torch.Size(given["size"]), parts)
    return entries


def _part(given: Mapping[str, Any]) -> Stored:
    part = Stored(tuple(given["offset"]), tuple(given["size"]), given["file"], given["at"], given["bytes"])
    if Path(part.file).name != part.file:
        raise ValueError(f"expected the name of a file beside it, got {part.file}")
    return part


def write_manifest(folder: Path, step: int, sums: Mapping[str, Sum]) -> None:
    """The last file of a checkpoint.

    Args:
        folder: of the checkpoint.
        step: optimizer steps done.
        sums: of every other file, by name.
    """
    files = {name: {"bytes": size, "crc32": f"{crc:08x}"} for name, (size, crc) in sorted(sums.items())}
    _write(folder / MANIFEST, {"version": _VERSION, "step": step, "files": files})


def check(folder: Path, begins: Iterable[str] = ("",), group: Group = None, remedy: str = "") -> list[str]:
    """Read every file of a checkpoint, shared out among ranks, and compare it with the manifest.

    Args:
        folder: of the checkpoint.
        begins: beginnings of the names of files to check.
        group: the ranks that share the reading; None: this process alone.
        remedy: what the error says is to be done.

    Returns:
        the names of the files that were checked.

    Raises:
        DamagedError: a file is missing, cut short or altered; on every rank, wherever it was noticed.
    """
    rank, world = place(group)

    def names_checked() -> list[str]:
        stored = _read_manifest(folder, remedy)
        names = [name for name in stored if name.startswith(tuple(begins))]
        for name in names[rank::world]:
            with whole(folder / name, remedy) as file:
                size = file.stat().st_size
                if size != stored[name][0]:
                    raise ValueError(f"expected {stored[name][0]} bytes, got {size}")
                if _sum(file)[1] != stored[name][1]:
                    raise ValueError("its bytes are not those that were written: the checksum differs")
        return names

    return everyones(names_checked, group)[0]


def sums_of(files: Iterable[Path]) -> dict[str, Sum]:
    """Size and checksum of files, by name."""
    return {file.name: _sum(file) for file in files}


def _read_manifest(folder: Path, remedy: str) -> dict[str, Sum]:
    with whole(folder / MANIFEST, remedy) as file:
        given = json.loads(file.read_text(encoding="utf-8"))
        if given["version"] != _VERSION:
            raise ValueError(f"expected version {_VERSION}, got {given['version']}")
        if step_of(folder) not in (0, given["step"]):  # a copy may have any name
            raise ValueError(f"expected step {step_of(folder)}, got {given['step']}")
        return {name: (int(each["bytes"]), int(each["crc32"], 16)) for name, each in given["files"].items()}


def _sum(file: Path) -> Sum:
    size = crc = 0
    with file.open("rb", buffering=0) as opened:
        while block := opened.read(_BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value) + "\n", encoding="utf-8")
    flush(file)
