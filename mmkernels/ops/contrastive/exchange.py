"""Row exchange between the ranks of a process group. Every rank calls the same functions in the same order. A rank may
hold any number of rows, including 0. Data moves as bytes, whatever the dtype.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmkernels.ops.checks import dtype_names, wrong_type, wrong_value
from mmkernels.ops.contrastive.choice import choose
from mmkernels.ops.contrastive.gathering import GatheredKeys
from mmkernels.ops.contrastive.traffic import TABLE, Call
from mmkernels.runtime.gather import gather_into
from mmkernels.runtime.groups import backends_of, device_of_numbers
from mmkernels.runtime.machine import FIGURES, Machine, machine_of
from mmkernels.runtime.received import count

__all__ = ["Ranks", "agree", "check_device", "check_group", "checked_machine", "refused"]


@dataclass(frozen=True)
class Ranks:
    """A group whose ranks have agreed on a call.

    Attributes:
        group: the process group.
        rank: this rank.
        queries, keys, negatives: row counts of every rank.
        ring, ring_of_negatives: whether keys, and negatives, move block by block rather than all at once.
        sent: the keys, if they are on their way.
    """

    group: Any
    rank: int
    queries: list[int]
    keys: list[int]
    negatives: list[int]
    ring: bool
    ring_of_negatives: bool
    sent: GatheredKeys | None = None

    def with_negatives(self) -> Ranks:
        """The same ranks with the negatives as keys."""
        return replace(self, keys=self.negatives, ring=self.ring_of_negatives, sent=None)

    def with_others(self) -> Ranks:
        """The same ranks with other keys, as many."""
        return self if self.sent is None else replace(self, sent=None)

    def turned(self) -> Ranks:
        """The same ranks with keys for queries and queries for keys."""
        return replace(self, queries=self.keys, keys=self.queries, sent=None)

    @property
    def world(self) -> int:
        return len(self.queries)

    @property
    def first_key(self) -> int:
        """The index of this rank's first key among all keys."""
        return sum(self.keys[: self.rank])

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """[sum(counts), ...]: every rank's rows. Ranks with fewer rows pad to the largest count."""
        longest = max(counts)
        if self.world == 1 or longest == 0:
            return rows
        padded = rows if len(rows) == longest else rows.new_zeros(longest, *rows.shape[1:])
        if padded is not rows:
            padded[: len(rows)] = rows
        everything = rows.new_empty(self.world * longest, *rows.shape[1:])
        gather_into(_bytes(everything), _bytes(padded.contiguous()), self.group)
        if min(counts) == longest:
            return everything
        return torch.cat([part[:n] for part, n in zip(everything.split(longest), counts, strict=True)])

    def scattered(self, rows: Tensor) -> list[Tensor]:
        """Send each rank its keys' part of [all keys, ...]; returns every rank's part for this rank's keys."""
        if self.world == 1 or len(rows) == 0:
            return [rows] * self.world
        mine = self.keys[self.rank]
        each = rows.element_size() * rows[0].numel()
        out = rows.new_empty(self.world * mine, *rows.shape[1:])
        count((self.world - 1) * mine * each)
        dist.all_to_all_single(
            _bytes(out),
            _bytes(rows.contiguous()),
            [mine * each] * self.world,
            [n * each for n in self.keys],
            self.group,
        )
        return list(out.split(mine)) if mine else [out] * self.world

    def around(
        self,
        block: Sequence[Tensor],
        compute: Callable[[int, list[Tensor]], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Pass every rank's block around the ring; results are combined on the way and return to the block's owner.

        Receiving the next block and sending the last result overlap with the computation. Every rank takes W steps and
        holds at most two blocks and two results of other ranks.

        Args:
            block: this rank's tensors [keys, ...].
            compute: (owner, block) -> this rank's result for the owner's keys, [keys, ...].
            combine: merges two results.
        """
        block = [x.contiguous() for x in block]
        coming = self._pass_on(block, self.rank - 1, 0)
        mine = compute(self.rank, block)
        result: Tensor | None = None
        for step in range(1, self.world):
            owner = (self.rank - step) % self.world
            here = coming.wait()
            if step < self.world - 1:
                coming = self._pass_on(here, owner - 1, 0)
            before = None if result is None else self._pass_on([result], owner, len(block))
            result = compute(owner, here)
            if before is not None:
                result = combine(before.wait()[0], result)
        if result is None:
            return mine
        return combine(mine, self._pass_on([result], self.rank, len(block)).wait()[0])

    def _pass_on(self, tensors: Sequence[Tensor], owner: int, tag: int) -> _Passing:
        """Send to the next rank and receive from the previous one the same tensors for `owner`'s keys, [keys, ...]."""
        if self.world == 1:
            return _Passing([], [], [])
        rows = self.keys[owner % self.world]
        peers = [dist.get_global_rank(self.group, (self.rank + d) % self.world) for d in (1, -1)]
        operations, received = [], []
        for i, x in enumerate(tensors):
            shape = (rows, *x.shape[1:])
            arriving = x.new_empty(shape)
            if x.numel():
                operations.append(dist.P2POp(dist.isend, _bytes(x), peers[0], self.group, tag + i))
            if arriving.numel():
                operations.append(dist.P2POp(dist.irecv, _bytes(arriving), peers[1], self.group, tag + i))
            received.append(arriving)
        count(sum(arriving.nbytes for arriving in received))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Passing(works, received, list(tensors))

    def summed(self, value: Tensor) -> Tensor:
        """Sum over the ranks."""
        if self.world == 1:
            return value
        total = value.clone()
        count(-(-2 * (self.world - 1) * total.nbytes // self.world))
        dist.all_reduce(total, group=self.group)
        return total


@dataclass
class _Passing:
    """Tensors in flight; sent tensors are kept alive until sent."""

    works: list[Any]
    received: list[Tensor]
    leaving: list[Tensor]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        self.leaving = []
        return self.received


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def agree(
    group: Any,
    queries: Tensor,
    keys: Tensor,
    negatives: Tensor | None,
    exchange: str,
    machine: Machine,
    same: Mapping[str, Any],
    call: Callable[[list[int], list[int], list[int]], Call],
    sent: GatheredKeys | None = None,
) -> Ranks:
    """Exchange row counts, check that all ranks make the same call, and choose the exchange.

    Args:
        group: the process group.
        queries, keys, negatives: [N, E], [M, E], [K, E] of this rank.
        exchange: "auto", "all_gather" or "ring".
        machine: this rank's; "auto" chooses by the slowest rank's figures.
        same: values that must be equal on every rank, by name: bools, numbers, strings.
        call: the call, from the queries, keys and negatives of every rank.
        sent: the keys, if they are on their way.

    Raises:
        ValueError: on every rank, naming what differs.
    """
    width, dtype = queries.shape[1], dtype_names(queries.dtype)
    given = "None" if sent is None else f"keys of {sent.counts} rows"
    common = {"queries: width": width, "queries: dtype": dtype, "exchange": exchange, "gathered": given, **same}
    rows = [0 if x is None else x.shape[0] for x in (queries, keys, negatives)]
    values, figures = [_code(value) for value in common.values()], map(_code, machine.figures(queries.dtype))
    table = _table(group, [0, *rows, *values, *figures])
    rank, after = dist.get_rank(group), 1 + len(rows) + len(values)
    for other, line in enumerate(table):
        if line[0]:
            raise ValueError(f"group: expected every rank to call with valid arguments, rank {other} raised an error")
        for i, name in enumerate(common, 1 + len(rows)):
            if line[i] != table[0][i]:
                difference = f"rank {other} differs from rank 0; here, on rank {rank}, it is {common[name]!r}"
                raise ValueError(f"{name}: expected the same on every rank of the group, but {difference}")
    queries_of, keys_of, negatives_of = ([line[i] for line in table] for i in (1, 2, 3))
    chosen = exchange, exchange
    if exchange == "auto":
        machines = [[_float(code) for code in line[after : after + FIGURES]] for line in table]
        chosen = choose(call(queries_of, keys_of, negatives_of), Machine.slowest(queries.dtype, machines))
    if sent is not None and sent.counts != keys_of:
        raise ValueError(f"gathered: expected keys of {keys_of} rows, one number for each rank, got {sent.counts}")
    ring, ring_of_negatives = (how == "ring" for how in chosen)
    return Ranks(group, rank, queries_of, keys_of, negatives_of, ring and sent is None, ring_of_negatives, sent)


def refused(group: Any) -> None:
    """This rank will raise; tell the others, which wait in `agree`."""
    _table(group, [1])


def check_device(group: Any, features: Tensor) -> None:
    """Raise ValueError for features on a device of which the group cannot move tensors."""
    kinds = backends_of(group)
    if features.device.type not in kinds:
        of = ", ".join(f"{device}:{backend}" for device, backend in kinds.items())
        wrong_value("queries", f"a device for which the group has a backend ({of})", features.device)


def checked_machine(machine: Any, features: Tensor) -> Machine:
    """The machine to choose the exchange by: the given one, or that of the features' device.

    Raises:
        TypeError, ValueError: not a machine, or one without a rate for the features' dtype.
    """
    if machine is not None and not isinstance(machine, Machine):
        wrong_type("machine", "None, or an mmkernels.Machine", machine)
    found: Machine = machine_of(features.device) if machine is None else machine
    found.rate(features.dtype)
    return found


def check_group(group: Any, exchange: Any) -> None:
    """Raise TypeError or ValueError for a group this rank cannot use, or an unknown exchange."""
    if not dist.is_available() or not dist.is_initialized():
        wrong_value("group", "None, or a process group (call init_process_group first)", group)
    if not isinstance(group, dist.ProcessGroup):
        wrong_type("group", "None, or a process group of torch.distributed that this rank is a member of", group)
    if exchange not in ("auto", "all_gather", "ring"):
        wrong_value("exchange", "'auto', 'all_gather' or 'ring'", exchange)


def _table(group: Any, numbers: list[int]) -> list[list[int]]:
    """All ranks' numbers, one row per rank."""
    assert len(numbers) <= TABLE
    padded = numbers + [0] * (TABLE - len(numbers))
    mine = torch.tensor(padded, dtype=torch.int64, device=device_of_numbers(group))
    everybody = mine.new_empty(group.size() * TABLE)
    gather_into(everybody, mine, group)
    return everybody.view(-1, TABLE).tolist()


def _float(code: int) -> float:
    """The float that `_code` made a number of."""
    return float(struct.unpack("<d", struct.pack("<q", code))[0])


def _code(value: Any) -> int:
    """A hash that is equal for equal values and almost surely different otherwise."""
    if isinstance(value, float):
        return int(struct.unpack("<q", struct.pack("<d", value))[0])
    if isinstance(value, int):
        return int(value)
    return functools.reduce(lambda code, c: (code * 257 + ord(c)) % (2**61 - 1), str(value), 0)
