"""Reading checkpoints: whole, the weights alone, or each rank its part. Those of earlier versions, too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load as from_bytes
from torch import Tensor, nn

from mmkernels.pretrain.checkpoint.agreement import Group, everyones
from mmkernels.pretrain.checkpoint.folders import whole
from mmkernels.pretrain.checkpoint.manifest import INDEX, MANIFEST, OTHERS, Entry, check, read_index
from mmkernels.pretrain.checkpoint.naming import moments_of, put_moments, room_for_moments, weights_of
from mmkernels.pretrain.checkpoint.shards import KINDS, Piece, Stored, part_of

__all__ = ["fill", "load", "load_into", "load_weights"]

_WEIGHTS, _MOMENTS = (f"{kind}." for kind in KINDS)
_OLD = "model.safetensors"  # the weights, before there were shards; of an exported model, too
_SHOWN = 5  # names in a message


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that a checkpoint of any number of ranks holds, in this process.

    Args:
        path: of the checkpoint.
        device: of the weights, which are whole; the rest is on the CPU.

    Returns:
        (weights by name; what else was kept, and as "optimizer" its state: "tensors" by parameter and key, and what
        `moments_of` adds to them).

    Raises:
        DamagedError: a file is missing, cut short, altered or otherwise damaged.
    """
    if _is_old(path):
        values = _load_values(path)
        return {name: weight.to(device) for name, weight in load_weights(path).items()}, values
    found = _read_whole(path, _index(path, check(path)), "")
    values = _load_values(path)
    if "optimizer" in values:
        values["optimizer"]["tensors"] = _below(_MOMENTS, found)
    return {name: weight.to(device) for name, weight in _below(_WEIGHTS, found).items()}, values


def load_weights(path: Path, remedy: str = "", prefix: str = "") -> dict[str, Tensor]:
    """Weights alone, whole, on the CPU, sorted by name: of any number of ranks' checkpoint, or of an exported model.

    Args:
        path: folder of the checkpoint.
        remedy: what an error says is to be done.
        prefix: of the names of the weights that are read; it is taken off.

    Raises:
        DamagedError: as `load` does.
    """
    if _is_old(path):
        with whole(path / _OLD, remedy) as file:
            found = from_bytes(file.read_bytes())  # safetensors cannot open a path that is not UTF-8
        return _below(prefix, dict(sorted(found.items())))
    kind = KINDS[:1]
    entries = _index(path, check(path, (*kind, INDEX), remedy=remedy), kind, remedy)
    wanted = {name: entry for name, entry in entries.items() if name.startswith(_WEIGHTS + prefix)}
    return _below(_WEIGHTS + prefix, _read_whole(path, wanted, remedy))


def load_into(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, group: Group = None
) -> dict[str, Any]:
    """Restore what `Saver.save` wrote, with any number of ranks: each reads its part. Nothing is changed before
    every file has been found whole.

    Args:
        path: of the checkpoint.
        module: as in `Saver.save`; another one of the same names and shapes. It may be sharded in another way.
        optimizer: as there; None: its state is not read.
        group: the ranks that load together; None: this process alone.

    Returns:
        the further values that were kept, of the first rank.

    Raises:
        DamagedError: as `load` does; on every rank.
        ValueError: the names or shapes of module or optimizer are others.
    """
    found: list[dict[str, Any]] = []
    if _is_old(path):
        everyones(lambda: found.append(_load_old_into(path, module, optimizer)), group)
    else:
        files = check(path, group=group)
        everyones(lambda: found.append(_load_shards_into(path, files, module, optimizer)), group)
    return found[0]


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into another of its shape; of a DTensor, into this rank's part, without any message.

    Args:
        target: plain or sharded, on any device.
        source: plain, on any device.
    """
    if (part := part_of(target)) is not None:
        part.local.copy_(source[_within(part.offset, part.local.shape)])


def _load_shards_into(
    path: Path, files: list[str], module: nn.Module, optimizer: torch.optim.Optimizer | None
) -> dict[str, Any]:
    entries, values = _index(path, files), _load_values(path)
    weights, room = weights_of(module), {}
    shapes = {name: entry.size for name, entry in _below(_WEIGHTS, entries).items()}
    _expect_same(shapes, {name: weight.shape for name, weight in weights.items()})
    targets = {_WEIGHTS + name: weight for name, weight in weights.items()}
    if optimizer is not None:
        stored = {name: (entry.size, entry.dtype) for name, entry in _below(_MOMENTS, entries).items()}
        room = room_for_moments(module, optimizer, stored)
        targets |= {_MOMENTS + name: tensor for name, tensor in room.items()}
    parts = {name: part for name, target in targets.items() if (part := part_of(target)) is not None}
    _read(path, entries, parts, "")
    others = values.pop("optimizer", None)
    if optimizer is not None and others is not None:
        put_moments(module, optimizer, room, others)
    return values


def _load_old_into(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """The optimizer's state was kept by the number of each parameter."""
    weights, values = load(path)
    targets = weights_of(module)
    _expect_same(
        {name: weight.shape for name, weight in weights.items()},
        {name: weight.shape for name, weight in targets.items()},
    )
    for name, weight in weights.items():
        fill(targets[name], weight)
    stored = values.pop("optimizer", None)
    if optimizer is None or stored is None:
        return values
    groups = moments_of(module, optimizer)[1]["groups"]
    names = [name for group in groups for name in group["names"]]
    tensors = {f"{names[i]}.{key}": value for i, state in stored["state"].items() for key, value in state.items()}
    old = [{**group, "names": [names[i] for i in group["params"]]} for group in stored["param_groups"]]
    room = room_for_moments(module, optimizer, {name: (value.shape, value.dtype) for name, value in tensors.items()})
    for name, value in tensors.items():
        fill(room[name], value)
    put_moments(module, optimizer, room, {"groups": old, "state": {}})
    return values


def _is_old(path: Path) -> bool:
    return not any((path / name).exists() for name in (MANIFEST, INDEX, ".metadata"))


def _load_values(path: Path) -> dict[str, Any]:
    with whole(path / OTHERS) as file:
        found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    return found


def _index(path: Path, files: list[str], kinds: tuple[str, ...] = KINDS, remedy: str = "") -> dict[str, Entry]:
    """The tensors of some kinds, by name, in files that have been found whole."""
    entries = {name: entry for name, entry in read_index(path, remedy).items() if name.startswith(kinds)}
    with whole(path / MANIFEST, remedy):
        needed = {part.file for entry in entries.values() for part in entry.parts} | {INDEX}
        if missing := needed.difference(files):
            raise ValueError(f"expected the checksum of {', '.join(sorted(missing))}, got none")
    return entries


def _expect_same(stored: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> None:
    lacking, unknown = (sorted(a.keys() - b.keys()) for a, b in ((given, stored), (stored, given)))
    other = sorted(name for name in given.keys() & stored.keys() if given[name] != stored[name])
    problems = [f"it has {_some(lacking)}, which the checkpoint lacks"] if lacking else []
    problems += [f"it lacks {_some(unknown)}"] if unknown else []
    problems += [f"{name} is {list(given[name])}, there {list(stored[name])}" for name in other[:_SHOWN]]
    if problems:
        raise ValueError(f"module: expected the names and shapes of the checkpoint, got others: {'; '.join(problems)}")


def _read_whole(path: Path, entries: Mapping[str, Entry], remedy: str) -> dict[str, Tensor]:
    with whole(path / INDEX, remedy):
        found = {name: torch.empty(entry.size, dtype=entry.dtype) for name, entry in entries.items()}
    whole_ones = {name: Piece(tuple(tensor.shape), (0,) * tensor.ndim, tensor) for name, tensor in found.items()}
    _read(path, entries, whole_ones, remedy)
    return found


@torch.no_grad()
def _read(path: Path, entries: Mapping[str, Entry], targets: Mapping[str, Piece], remedy: str) -> None:
    """Fill parts of tensors with what the stored parts have in common with them."""
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, target in targets.items():
            filled = 0
            for part in entries[name].parts:
                with whole(path / part.file, remedy) as file:
                    if part.file not in files:
                        files[part.file] = stack.enter_context(file.open("rb"))
                    filled += _copy_common(files[part.file], part, entries[name].dtype, target)
            with whole(path / INDEX, remedy):
                if filled != target.local.numel():
                    raise ValueError(f"{name}: expected {target.local.numel()} values, got {filled}")


def _copy_common(file: BinaryIO, part: Stored, dtype: torch.dtype, target: Piece) -> int:
    """Copy what a stored part and a target have in common; returns the number of values."""
    low = [max(a, b) for a, b in zip(part.offset, target.offset, strict=True)]
    ends = zip(part.offset, part.size, target.offset, target.local.shape, strict=True)
    size = [min(a + n, b + m) - first for first, (a, n, b, m) in zip(low, ends, strict=True)]
    if any(n <= 0 for n in size):
        return 0
    if not size:
        target.local.copy_(_rows(file, part, dtype, 0, 1).reshape(()))
        return 1
    first = low[0] - part.offset[0]
    rows = _rows(file, part, dtype, first, first + size[0])
    begins = [0, *(a - b for a, b in zip(low[1:], part.offset[1:], strict=True))]
    inside = [a - b for a, b in zip(low, target.offset, strict=True)]
    target.local[_within(inside, size)].copy_(rows[_within(begins, size)])
    return math.prod(size)


def _rows(file: BinaryIO, part: Stored, dtype: torch.dtype, first: int, end: int) -> Tensor:
    """Rows of a stored part; one that has no dimensions is one row."""
    length = math.prod(part.size[1:]) * dtype.itemsize
    if part.bytes != length * math.prod(part.size[:1]):
        raise ValueError(f"expected {length * math.prod(part.size[:1])} bytes at {part.at}, got {part.bytes}")
    raw = torch.empty((end - first) * length, dtype=torch.uint8)
    file.seek(part.at + first * length)
    if (got := file.readinto(raw.numpy().data)) != len(raw):  # type: ignore[attr-defined]
        raise ValueError(f"expected {len(raw)} bytes at {part.at}, got {got}")
    return raw.view(dtype).reshape(end - first, *part.size[1:])


def _within(offset: Any, size: Any) -> tuple[slice, ...]:
    return tuple(slice(first, first + n) for first, n in zip(offset, size, strict=True))


def _below(prefix: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Those whose names begin so, without it."""
    return {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
