"""Counts what collectives deliver to a rank: bytes, messages, and in which calls."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

__all__ = ["Counted", "counting"]


@dataclass
class Counted:
    """What has arrived: messages without bytes do not count.

    features: bytes in messages of at least 1000.
    """

    bytes: int = 0
    messages: int = 0
    features: int = 0

    def add(self, size: int, messages: int = 1) -> None:
        self.bytes += size
        self.messages += messages if size else 0
        self.features += size if size >= 1000 else 0


@contextmanager
def counting(rank: int, world: int) -> Iterator[Counted]:
    """Inside, what this rank of the default group receives. A sum over the ranks counts as 2(W-1)/W of the tensor, in
    2(W-1) messages."""
    counted = Counted()
    gather = next(name for name in ("all_gather_single", "all_gather_into_tensor") if hasattr(dist, name))
    names = (gather, "all_to_all_single", "batch_isend_irecv", "all_reduce")
    plain = {name: getattr(dist, name) for name in names}

    def gathered(out: Tensor, mine: Tensor, **rest: Any) -> Any:
        for _ in range(world - 1):
            counted.add(mine.nbytes)
        return plain[gather](out, mine, **rest)

    def all_to_all(out: Tensor, mine: Tensor, splits: list[int], *rest: Any) -> Any:
        for other, size in enumerate(splits):
            counted.add(size if other != rank else 0)
        return plain["all_to_all_single"](out, mine, splits, *rest)

    def passed(operations: list[Any]) -> Any:
        for each in operations:
            counted.add(each.tensor.nbytes if each.op is dist.irecv else 0)
        return plain["batch_isend_irecv"](operations)

    def reduced(tensor: Tensor, *rest: Any, **more: Any) -> Any:
        counted.add(-(-2 * (world - 1) * tensor.nbytes // world), 2 * (world - 1))
        return plain["all_reduce"](tensor, *rest, **more)

    changed = {gather: gathered, "all_to_all_single": all_to_all, "batch_isend_irecv": passed, "all_reduce": reduced}
    try:
        for name, function in changed.items():
            setattr(dist, name, function)
        yield counted
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)
