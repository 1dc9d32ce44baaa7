"""The processes that train one model together: which of them this is, and what they exchange.

All call the same functions in the same order. One process alone has no group and exchanges nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "PeerError", "Place", "Ranks"]

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another rank has failed; the message says which, and why."""


class Place(NamedTuple):
    """Where a rank is in a run."""

    step: int
    what: str  # it does or waits for
    since: float  # seconds since 1970
    patient: bool = False  # it may take as long as it does


class Ranks:
    """The ranks of a process group.

    Args:
        group: of torch.distributed, which takes tensors on the host and on the devices in use; None: one process.

    Attributes:
        rank: this one's number.
        size: W, how many there are.
        received: bytes that have come from other ranks in the calls below.
        place: where this one is, see `at`.
        watch: knows where the others are, once there is one.
    """

    watch: Any = None

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.received = 0
        self.place = Place(0, "starting", time.time(), patient=True)

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def at(self, what: str, step: int | None = None, patient: bool = False) -> None:
        """Say what this rank does or waits for from now on, for others that wait for it."""
        self.place = Place(self.place.step if step is None else step, what, time.time(), patient)

    def meet(self) -> None:
        """Wait for all, however long they take."""
        if self.watch is not None:
            self.watch.meet()

    def of_leader(self, make: Callable[[], T]) -> T:
        """What the leading rank makes, on all of them; what it raises is raised on all."""
        if self.group is None:
            return make()
        box: list[Any] = [None, None]
        self.at("waiting for rank 0", patient=True)
        if self.leads:
            try:
                box[0] = make()
            except Exception as error:
                box[1] = error
        self.meet()
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.group, 0), group=self.group)
        if box[1] is not None:
            raise box[1]
        made: T = box[0]
        return made

    def together(self, make: Callable[[], T]) -> T:
        """What each rank makes for itself. If one fails, all raise: its own error there, on the others PeerError, which
        tells of it."""
        if self.group is None:
            return make()
        made: Any = None
        failed: Exception | None = None
        try:
            made = make()
        except Exception as error:
            failed = error
        self.meet()
        if self.table([failed is not None]).any():
            said = self.objects("" if failed is None else f"{type(failed).__name__}: {failed}")
            rank = next(rank for rank, text in enumerate(said) if text)
            raise failed or PeerError(f"rank {rank}: {said[rank]}")
        found: T = made
        return found

    def of_rank_0(self, x: Tensor) -> Tensor:
        """A tensor on the host as rank 0 has it."""
        if self.group is not None:
            self.received += 0 if self.leads else x.nbytes
            dist.broadcast(x, src=dist.get_global_rank(self.group, 0), group=self.group)
        return x

    def objects(self, value: T) -> list[T]:
        """A value of every rank, anything that can be pickled; for what is rare or small."""
        if self.group is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def table(self, numbers: Sequence[float]) -> Tensor:
        """float64 [W, n] on the host: n numbers of every rank."""
        mine = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        if self.group is None:
            return mine[None]
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        self.received += (self.size - 1) * mine.nbytes
        dist.all_gather(rows, mine, group=self.group)
        return torch.stack(rows)

    def total(self, mine: Tensor) -> Tensor:
        """The sum of a tensor on the host over the ranks, the same on all of them."""
        if self.group is None:
            return mine
        found = mine.clone()
        self.received += 2 * (self.size - 1) * mine.nbytes // self.size
        dist.all_reduce(found, group=self.group)
        return found

    def rows(self, mine: Tensor, counts: Sequence[int]) -> Tensor:
        """[sum(counts), ...]: the rows of every rank, one after the other, for a loss of them that all ranks compute:
        the gradient is W times its own, which the mean over the ranks undoes.

        Args:
            mine: [n, ...] of this rank.
            counts: rows of each rank.
        """
        if self.group is None:
            return mine
        found: Tensor = _Rows.apply(self, mine, tuple(counts))
        return found

    def dealt(self, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
        """Send each rank some rows, and get some of each; the gradient goes back to where the rows came from.

        Args:
            rows: [sum(to), ...], those for rank 0 first.
            to: rows for each rank.
            of: rows that come from each rank.
        """
        if self.group is None:
            return rows
        found: Tensor = _Dealt.apply(self, rows, tuple(to), tuple(of))
        return found


ALONE = Ranks()


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, mine: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        longest = max(counts)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine
        rows = [torch.empty_like(padded) for _ in counts]
        ranks.received += (len(counts) - 1) * padded.nbytes
        dist.all_gather(rows, padded, group=ranks.group)
        return torch.cat([row[:n] for row, n in zip(rows, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad.split(ctx.counts)[ctx.ranks.rank] * ctx.ranks.size, None


class _Dealt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, rows: Tensor, to: tuple[int, ...], of: tuple[int, ...]) -> Tensor:
        ctx.ranks, ctx.to, ctx.of = ranks, to, of
        return _exchanged(ranks, rows, to, of)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, _exchanged(ctx.ranks, grad, ctx.of, ctx.to), None, None


def _exchanged(ranks: Ranks, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
    arrived = rows.new_empty((sum(of), *rows.shape[1:]))
    ranks.received += arrived.nbytes
    dist.all_to_all_single(arrived, rows.contiguous(), list(of), list(to), group=ranks.group)
    return arrived
