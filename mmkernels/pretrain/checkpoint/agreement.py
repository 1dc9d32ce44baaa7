"""What ranks tell each other about a checkpoint; without a group every process is the first of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import torch.distributed as dist

__all__ = ["Group", "everyones", "of_first", "own_group", "place"]

T = TypeVar("T")
Group: TypeAlias = "dist.ProcessGroup | None"


def place(group: Group) -> tuple[int, int]:
    """(This process's rank in a group, its number of ranks)."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def own_group(group: Group) -> Group:
    """A gloo group of the same ranks, whose messages are apart from those of training.

    Raises:
        ValueError: the ranks of a part of the world belong to different numbers of groups. PyTorch names the new one
            after that number, so that they would wait for each other under different names.
    """
    if group is None:
        return None
    members = dist.get_process_group_ranks(group)
    part = len(members) < dist.get_world_size()  # a group of all is named after how many there ever were
    if part:
        groups: list[Any] = [None] * len(members)
        dist.all_gather_object(groups, len(dist.distributed_c10d._world.pg_names), group=group)
        if len(set(groups)) > 1:
            raise ValueError(f"group: expected ranks that belong to equally many process groups, got {groups}")
    made: dist.ProcessGroup = dist.new_group(members, backend="gloo", use_local_synchronization=part)
    return made


def everyones(action: Callable[[], T], group: Group) -> list[T]:
    """What an action returns on each rank, in their order, on every rank; if it raises on some, that of the first."""
    if group is None:
        return [action()]
    own: list[Any] = [None, None]
    try:
        own[0] = action()
    except Exception as error:
        own[1] = error
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, own, group=group)
    for _, raised in found:
        if raised is not None:
            raise raised
    return [value for value, _ in found]


def of_first(action: Callable[[], T], group: Group) -> T:
    """What an action returns on the first rank, on every rank; what it raises there, too."""
    result: list[Any] = [None, None]
    if place(group)[0] == 0:
        try:
            result[0] = action()
        except Exception as error:
            if group is None:
                raise
            result[1] = error
    if group is not None:
        dist.broadcast_object_list(result, src=dist.get_global_rank(group, 0), group=group)
    if result[1] is not None:
        raise result[1]
    found: T = result[0]
    return found
