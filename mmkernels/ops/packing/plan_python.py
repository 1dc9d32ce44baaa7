"""The planner's algorithms in Python: the same plan as csrc/packing/planner.cpp, item by item, ties included.

Serves when the native core is missing; far slower, and the tests hold the two equal.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

__all__ = ["plan_best_fit", "plan_next_fit", "plan_subset_sum"]

Csr = tuple[NDArray[np.int64], NDArray[np.int64]]


class _Rooms:
    """Open packs by the room they have left, last in first out among equals."""

    def __init__(self) -> None:
        self.rooms: list[int] = []  # ascending, each once
        self.packs: dict[int, list[int]] = {}

    def put(self, pack: int, room: int) -> None:
        if room not in self.packs:
            insort(self.rooms, room)
            self.packs[room] = []
        self.packs[room].append(pack)

    def take(self, wanted: int) -> tuple[int, int] | None:
        """The pack with the least room that is at least `wanted`, and that room."""
        at = bisect_left(self.rooms, wanted)
        if at == len(self.rooms):
            return None
        room = self.rooms[at]
        pack = self.packs[room].pop()
        if not self.packs[room]:
            del self.packs[room], self.rooms[at]
        return pack, room


def _by_first_item(pack_of: NDArray[np.int64], num_packs: int) -> Csr:
    """CSR from the pack of each item, packs renumbered by their first item."""
    if num_packs == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    first = np.unique(pack_of, return_index=True)[1]
    number = np.empty(num_packs, np.int64)
    number[np.argsort(first)] = np.arange(num_packs)
    numbered = number[pack_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(numbered, minlength=num_packs))]).astype(np.int64)
    return offsets, np.argsort(numbered, kind="stable").astype(np.int64)


def plan_best_fit(lengths: NDArray[np.int64], capacity: int, max_items: int) -> Csr:
    """Best fit decreasing; see planner.h."""
    pack_of = np.empty(len(lengths), np.int64)
    count: list[int] = []
    rooms = _Rooms()
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        found = rooms.take(length)
        if found is None:
            found = len(count), capacity
            count.append(0)
        pack, room = found
        pack_of[i] = pack
        count[pack] += 1
        if count[pack] < max_items:
            rooms.put(pack, room - length)
    return _by_first_item(pack_of, len(count))


def plan_subset_sum(lengths: NDArray[np.int64], capacity: int, lookahead: int) -> Csr:
    """Age-ordered subset sum; see planner.h."""
    size = lengths.tolist()
    pack_of = np.empty(len(size), np.int64)
    waiting: list[int] = []
    cursor = packs = 0
    while cursor < len(size) or waiting:
        joining = min(len(size) - cursor, lookahead - len(waiting))
        waiting += range(cursor, cursor + joining)
        cursor += joining
        taken = _fullest_pack(waiting, size, capacity)
        pack_of[taken] = packs
        packs += 1
        gone = set(taken)
        waiting = [i for i in waiting if i not in gone]
    return _by_first_item(pack_of, packs)


def _fullest_pack(waiting: list[int], size: list[int], capacity: int) -> list[int]:
    """The oldest item and the subset of the others that fills the rest of its pack best."""
    room = capacity - size[waiting[0]]
    taken = [waiting[0], *(i for i in waiting[1:] if size[i] == 0)]
    steps: list[int] = []
    reached = [1]  # after each step, bit s: a subset of the items so far has sum s
    for i in waiting[1:]:
        if reached[-1] >> room & 1:
            break
        if 0 < size[i] <= room:
            steps.append(i)
            reached.append((reached[-1] | reached[-1] << size[i]) & ((2 << room) - 1))
    total = reached[-1].bit_length() - 1
    while total > 0:
        # The first step after which the sum was there made it possible.
        first = bisect_left(reached, 1, key=lambda bits: bits >> total & 1)
        taken.append(steps[first - 1])
        total -= size[steps[first - 1]]
    return taken


def plan_next_fit(lengths: NDArray[np.int64], capacity: int, max_items: int) -> Csr:
    """Next fit; see planner.h."""
    pack_of = np.empty(len(lengths), np.int64)
    packs = room = count = 0
    for i, length in enumerate(lengths.tolist()):
        if packs == 0 or length > room or count == max_items:
            packs, room, count = packs + 1, capacity, 0
        room -= length
        count += 1
        pack_of[i] = packs - 1
    return _by_first_item(pack_of, packs)
