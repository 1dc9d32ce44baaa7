"""The planner's algorithms in Python: the same plan as csrc/packing/planner*.cpp, item by item, ties included.

Used without the native core, and far slower; the tests check that the two agree. Arguments and results are the core's:
lengths [n] int64, images [n] int64 or None, the capacity, the most images and samples in a pack.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

__all__ = ["fullest_pack", "list_histogram", "plan_best_fit", "plan_histogram", "plan_next_fit", "plan_subset_sum"]

NO_CAP = 2**63 - 1

Array = NDArray[np.int64]
Csr = tuple[Array, Array]


class _Rooms:
    """Open packs (or groups of equal ones) by their room for tokens and for images, last in, first out among equals."""

    def __init__(self) -> None:
        self.rooms: list[tuple[int, int]] = []  # ascending, each once
        self.packs: dict[tuple[int, int], list[int]] = {}

    def put(self, pack: int, room: tuple[int, int]) -> None:
        if room not in self.packs:
            insort(self.rooms, room)
            self.packs[room] = []
        self.packs[room].append(pack)

    def take(self, wanted: tuple[int, int]) -> tuple[int, tuple[int, int]] | None:
        """The pack with the least room that is at least `wanted` in both, and that room."""
        at = bisect_left(self.rooms, wanted)
        while at < len(self.rooms) and self.rooms[at][1] < wanted[1]:
            at += 1
        if at == len(self.rooms):
            return None
        room = self.rooms[at]
        pack = self.packs[room].pop()
        if not self.packs[room]:
            del self.packs[room], self.rooms[at]
        return pack, room


def _counted(lengths: Array, images: Array | None) -> Array:
    """Images per item; zeros if they are not counted."""
    return np.zeros_like(lengths) if images is None else images


def _longest_first(lengths: Array, images: Array | None) -> list[int]:
    """Items from the longest to the shortest, of equals the one with more images first, then the earlier."""
    order: list[int] = np.lexsort((-_counted(lengths, images), -lengths)).tolist()
    return order


def _by_first_item(pack_of: Array, num_packs: int) -> Csr:
    """CSR from the pack of each item, packs renumbered by their first item."""
    if num_packs == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.int64)
    first = np.unique(pack_of, return_index=True)[1]
    number = np.empty(num_packs, np.int64)
    number[np.argsort(first)] = np.arange(num_packs)
    numbered = number[pack_of]
    offsets = np.concatenate([[0], np.cumsum(np.bincount(numbered, minlength=num_packs))]).astype(np.int64)
    return offsets, np.argsort(numbered, kind="stable").astype(np.int64)


def plan_best_fit(lengths: Array, images: Array | None, capacity: int, max_images: int, max_samples: int) -> Csr:
    """Best fit decreasing; see planner.h."""
    pack_of = np.empty(len(lengths), np.int64)
    size, pictures = lengths.tolist(), _counted(lengths, images).tolist()
    count: list[int] = []
    rooms = _Rooms()
    for i in _longest_first(lengths, images):
        found = rooms.take((size[i], pictures[i]))
        if found is None:
            found = len(count), (capacity, max_images)
            count.append(0)
        pack, room = found
        pack_of[i] = pack
        count[pack] += 1
        if count[pack] < max_samples:
            rooms.put(pack, (room[0] - size[i], room[1] - pictures[i]))
    return _by_first_item(pack_of, len(count))


def plan_next_fit(lengths: Array, images: Array | None, capacity: int, max_images: int, max_samples: int) -> Csr:
    """Next fit; see planner.h."""
    pack_of = np.empty(len(lengths), np.int64)
    packs = room = image_room = count = 0
    for i, (length, pictures) in enumerate(zip(lengths.tolist(), _counted(lengths, images).tolist(), strict=True)):
        if packs == 0 or length > room or pictures > image_room or count == max_samples:
            packs, room, image_room, count = packs + 1, capacity, max_images, 0
        room -= length
        image_room -= pictures
        count += 1
        pack_of[i] = packs - 1
    return _by_first_item(pack_of, packs)


# Subset sum


def plan_subset_sum(
    lengths: Array, images: Array | None, capacity: int, max_images: int, max_samples: int, lookahead: int
) -> Csr:
    """Age-ordered subset sum; see planner.h."""
    pack_of = np.empty(len(lengths), np.int64)
    waiting = np.zeros(0, np.int64)
    cursor = packs = 0
    while cursor < len(lengths) or len(waiting):
        joining = min(len(lengths) - cursor, lookahead - len(waiting))
        waiting = np.concatenate([waiting, np.arange(cursor, cursor + joining)])
        cursor += joining
        some = None if images is None else images[waiting]
        taken = fullest_pack(lengths[waiting], some, capacity, max_images, max_samples)
        pack_of[waiting[taken]] = packs
        packs += 1
        waiting = np.delete(waiting, taken)
    return _by_first_item(pack_of, packs)


def fullest_pack(lengths: Array, images: Array | None, capacity: int, max_images: int, max_samples: int) -> Array:
    """The next pack from the waiting items; see planner.h."""
    size, pictures = lengths.tolist(), _counted(lengths, images).tolist()
    if not size:
        return np.zeros(0, np.int64)
    room, image_room, sample_room = capacity - size[0], max_images - pictures[0], max_samples - 1
    taken = [0]
    if sample_room > 0:
        joining = [i for i in range(1, len(size)) if 0 < size[i] <= room and pictures[i] <= image_room]
        taken += _joining(
            joining, size, pictures, images is not None and max_images != NO_CAP, room, image_room, sample_room
        )
    image_room = max_images - sum(pictures[i] for i in taken)
    sample_room = max_samples - len(taken)
    for i in range(1, len(size)):  # items without tokens
        if size[i] == 0 and pictures[i] <= image_room and sample_room > 0:
            taken.append(i)
            image_room -= pictures[i]
            sample_room -= 1
    return np.array(sorted(taken), np.int64)


def _joining(
    joining: list[int],
    size: list[int],
    pictures: list[int],
    count_images: bool,
    room: int,
    image_room: int,
    sample_room: int,
) -> list[int]:
    """The items that join the oldest."""
    count_samples = sample_room + 1 < len(size)
    if not count_images and not count_samples:
        return _largest_sum(joining, size, room)

    def keep(taken: list[int]) -> bool:
        return sum(pictures[i] for i in taken) <= image_room and len(taken) <= sample_room

    chosen: list[int] = []
    if count_images:
        chosen = _largest_affordable(joining, size, room, pictures, image_room, keep)
    if count_samples and sum(size[i] for i in chosen) < room:
        by_samples = _largest_affordable(joining, size, room, [1] * len(size), sample_room, keep)
        if not count_images or sum(size[i] for i in by_samples) > sum(size[i] for i in chosen):
            chosen = by_samples
    return chosen


def _largest_sum(joining: list[int], size: list[int], room: int) -> list[int]:
    """The oldest items whose sum is the largest that fits in the room."""
    steps: list[int] = []
    reached = [1]  # after each step, bit s: a subset of the items so far has sum s
    for i in joining:
        if reached[-1] >> room & 1:
            break
        steps.append(i)
        reached.append((reached[-1] | reached[-1] << size[i]) & ((2 << room) - 1))
    total = reached[-1].bit_length() - 1
    taken = []
    while total > 0:
        # The first step that reached the sum is the item that made it possible.
        first = bisect_left(reached, 1, key=lambda bits: bits >> total & 1)
        taken.append(steps[first - 1])
        total -= size[steps[first - 1]]
    return taken


def _largest_affordable(
    joining: list[int], size: list[int], room: int, cost: list[int], most: int, keep: Callable[[list[int]], bool]
) -> list[int]:
    """The oldest items of the largest sum that cost at most `most` and pass `keep`. Tracks the least cost of each sum;
    after many that fail `keep`, some sums are skipped untried."""
    steps: list[int] = []
    least: list[dict[int, int]] = [{0: 0}]  # after each step: sum -> the least cost of a subset
    for i in joining:
        if room in least[-1]:
            break
        now = dict(least[-1])
        for total, spent in least[-1].items():
            longer, dearer = total + size[i], spent + cost[i]
            if longer <= room and dearer <= most and dearer < now.get(longer, NO_CAP):
                now[longer] = dearer
        steps.append(i)
        least.append(now)

    def trace(total: int) -> list[int]:
        left, taken = most, []
        while total > 0:
            first = bisect_left(least, True, key=lambda costs: costs.get(total, NO_CAP) <= left)
            taken.append(steps[first - 1])
            total -= size[steps[first - 1]]
            left -= cost[steps[first - 1]]
        return taken

    total, seen = room, 0
    while total > 0:
        if total in least[-1]:
            taken = trace(total)
            if keep(taken):
                return taken
            seen += 1
        total -= 1 + seen // 64
    return []


# Histogram


def plan_histogram(
    lengths: Array, images: Array | None, capacity: int, max_images: int, max_samples: int
) -> tuple[Array, int]:
    """Best fit decreasing over counts; see planner.h."""
    size, pictures = lengths.tolist(), _counted(lengths, images).tolist()
    steps: list[tuple[int, int, int]] = []
    groups: list[tuple[int, int, int]] = []  # first pack, packs, items in each
    rooms = _Rooms()
    num_packs = 0

    def put(group: tuple[int, int, int], room: tuple[int, int]) -> None:
        if group[2] < max_samples:
            groups.append(group)
            rooms.put(len(groups) - 1, room)

    def fitting(room: tuple[int, int], samples: int) -> int:
        most = [count, samples]
        most += [left // need for left, need in zip(room, one, strict=True) if need]
        return min(most)

    def fill(first: int, packs: int, items: int, each: int) -> None:
        steps.append((first, packs, each))
        put((first, packs, items + each), (room[0] - each * one[0], room[1] - each * one[1]))

    for one, equals in groupby((size[i], pictures[i]) for i in _longest_first(lengths, images)):
        count = len(list(equals))
        while count:
            found = rooms.take(one)
            if found is None:
                room = capacity, max_images
                each = fitting(room, max_samples)
                for packs, items in ((count // each, each), (int(count % each > 0), count % each)):
                    if packs:
                        fill(num_packs, packs, 0, items)
                    num_packs += packs
                break
            (first, packs, items), room = groups[found[0]], found[1]
            each = fitting(room, max_samples - items)
            full = min(packs, count // each)
            rest = count % each if full < packs else 0
            used = full + (rest > 0)
            if used < packs:
                put((first + used, packs - used, items), room)
            fill(first, full, items, each)
            if rest:
                fill(first + full, 1, items, rest)
            count -= full * each + rest
    return np.array(steps, np.int64).reshape(-1), num_packs


def list_histogram(lengths: Array, images: Array | None, steps: Array, num_packs: int) -> Csr:
    """List the packs of a counted plan; see planner.h."""
    order = _longest_first(lengths, images)
    first, packs, each = steps.reshape(-1, 3).T
    owners = [np.repeat(np.arange(a, a + b), c) for a, b, c in zip(first, packs, each, strict=True)]
    pack_of = np.empty(len(lengths), np.int64)
    pack_of[order] = np.concatenate([np.zeros(0, np.int64), *owners])
    return _by_first_item(pack_of, num_packs)
