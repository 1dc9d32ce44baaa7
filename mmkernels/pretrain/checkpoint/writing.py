"""`torch.distributed.checkpoint` writes the parts of every rank. Only who writes imports it: that takes a second."""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
from collections.abc import Mapping
from io import RawIOBase
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from mmkernels.pretrain.checkpoint.agreement import Group
from mmkernels.pretrain.checkpoint.shards import KINDS, Piece, Stored

# DCP of torch 2.6 asks for what torch deprecates.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning, r"torch\.distributed\.checkpoint")

__all__ = ["write_shards"]


def write_shards(folder: Path, pieces: Mapping[str, Piece], group: Group) -> dict[str, Stored]:
    """Write this rank's part of a checkpoint; every rank of the group does so at once.

    Args:
        folder: which all of them see.
        pieces: by names that begin with one of `KINDS`; on the CPU, contiguous.
        group: with a CPU backend; None: this process alone.

    Returns:
        where the pieces lie.
    """
    writer, planner = _Writer(folder), _Planner(dict(pieces))
    if group is not None:
        dcp.save(dict(pieces), storage_writer=writer, planner=planner, process_group=group)
    else:  # dcp.save would take the default group, if there is one
        planner.set_up_planner(dict(pieces), writer.storage_meta(), True)
        writer.set_up_storage_writer(True)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plans, metadata = planner.create_global_plan([plan])
        (plan,) = writer.prepare_global_plan(plans)
        writer.finish(metadata, [writer.write_data(planner.finish_plan(plan), planner).wait()])
    return {name: Stored(piece.offset, tuple(piece.local.shape), *writer.at[name]) for name, piece in pieces.items()}


class _Planner(dcp.DefaultSavePlanner):
    """A plan of pieces, instead of whole tensors."""

    def __init__(self, pieces: dict[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.pieces: dict[str, Piece] = pieces

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_item(name, piece) for name, piece in self.pieces.items()])
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        paths = {name: tuple(name.split(".", 1)) for name in metadata.state_dict_metadata}
        return plans, dataclasses.replace(metadata, planner_data=paths)  # so that DCP's tools unflatten the names

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.pieces[index.fqn].local


def _item(name: str, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.local.shape)
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(piece.local), torch.Size(piece.size))
    return WriteItem(MetadataIndex(name, piece.offset), WriteItemType.SHARD, tensor_data=data)


class _Writer(dcp.FileSystemWriter):
    """The files of `dcp.FileSystemWriter`, weights apart from the rest; `at` has where the bytes of a name lie."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, per_thread_copy_ahead=0)
        self.folder = folder
        self.at: dict[str, tuple[str, int, int]] = {}

    def storage_meta(self) -> StorageMeta | None:
        return None  # it would have the path of the partial folder

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for kind in KINDS:
            if items := [item for item in plan.items if item.index.fqn.startswith(f"{kind}.")]:
                prefix = dataclasses.replace(plan.storage_data, prefix=kind + plan.storage_data.prefix)
                part = dataclasses.replace(plan, items=items, storage_data=prefix)
                results += super().write_data(part, planner).wait()
        for file, of_file in groupby(sorted(results, key=_file), _file):
            with (self.folder / file).open("rb") as opened:
                for result in of_file:
                    stored = result.storage_data
                    at, size = _bytes_in(opened, stored.offset, stored.length)
                    self.at[result.index.fqn] = file, at, size
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


def _file(result: WriteResult) -> str:
    found: str = result.storage_data.relative_path
    return found


def _bytes_in(file: BinaryIO, at: int, length: int) -> tuple[int, int]:
    """(Where they begin, how many there are): a tensor's bytes, in what `torch.save` wrote of it somewhere in a file: a
    zip archive without compression."""
    with zipfile.ZipFile(_Window(file, at, length)) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    file.seek(at + entry.header_offset)
    header = file.read(30)
    assert entry.compress_type == zipfile.ZIP_STORED and header.startswith(b"PK\x03\x04")
    names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return at + entry.header_offset + len(header) + names, entry.file_size


class _Window(RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: BinaryIO, at: int, length: int) -> None:
        self.file, self.start, self.length, self.now = file, at, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.now = offset + (0, self.now, self.length)[whence]
        return self.now

    def tell(self) -> int:
        return self.now

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(self.length - self.now, 0))
        self.file.seek(self.start + self.now)
        found = self.file.read(wanted)
        buffer[: len(found)] = found
        self.now += len(found)
        return len(found)
