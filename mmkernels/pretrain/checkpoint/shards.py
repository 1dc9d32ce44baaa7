"""Which part of each tensor a rank holds, and which it writes."""

from __future__ import annotations

import sys
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from torch import Tensor

from mmkernels.pretrain.checkpoint.agreement import Group, place

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["KINDS", "Piece", "Stored", "mine", "part_of"]

KINDS = ("weights", "optimizer")  # a name begins with one of these and a dot


class Piece(NamedTuple):
    """A part of a tensor."""

    size: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of the part in it
    local: Tensor  # the part


class Stored(NamedTuple):
    """Where a part of a tensor lies: its bytes, little-endian and contiguous, in a file."""

    offset: tuple[int, ...]
    size: tuple[int, ...]
    file: str
    at: int
    bytes: int


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Without importing what makes DTensors, if nobody has."""
    known = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(known, "DTensor", ()))


def part_of(tensor: Tensor) -> Piece | None:
    """The part of a tensor that this rank holds, which shares its memory; None if it holds none."""
    if not is_sharded(tensor):
        return Piece(tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
    if tensor.device_mesh.get_coordinate() is None:
        return None
    local = tensor.to_local().detach()
    (chunk,) = tensor.__create_chunk_list__()
    if local.numel() == 0 and tensor.numel():
        return None
    return Piece(tuple(tensor.shape), tuple(chunk.offsets), local)


def mine(tensors: Mapping[str, Tensor], buffers: Container[str], group: Group) -> dict[str, Piece]:
    """The parts that this rank has to write. Of copies on several ranks, one is written, by the rank with least to do.

    Args:
        tensors: of the same names and shapes on every rank. One that is not a DTensor is the same on each.
        buffers: names of tensors of which the first rank's copy is written, lest those of one module, should they
            differ after all, come from several ranks.
        group: the ranks; None: this process alone.
    """
    loads: dict[int, list[int]] = {}  # by the number of ranks that share a tensor's copies
    found = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        turn, copies = _copy(tensor, group)
        load = loads.setdefault(copies, [0] * copies)
        writer = 0 if name in buffers else load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if writer == turn and (part := part_of(tensor)) is not None:
            found[name] = part
    return found


def _copy(tensor: Tensor, group: Group) -> tuple[int, int]:
    """(Which of the copies of its part of a tensor this rank has, how many there are)."""
    if not is_sharded(tensor):
        return place(group)
    mesh, turn, copies = tensor.device_mesh, 0, 1
    for i, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            turn, copies = turn * mesh.size(i) + mesh.get_local_rank(i), copies * mesh.size(i)
    return turn, copies
