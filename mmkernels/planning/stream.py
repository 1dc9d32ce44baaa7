"""Packs from a stream: the age-ordered subset sum of `plan_packing`, one item at a time, with a state that resumes."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from mmkernels.ops.checks import wrong_value
from mmkernels.planning.plan import LOOKAHEAD, OVERSIZE, Array, Caps, integer
from mmkernels.planning.plan_result import planner

__all__ = ["StreamPlanner"]


class StreamPlanner:
    """Groups the items of a stream into packs, looking `lookahead` items ahead.

        for record in stream:
            planner.push(len(record))
            while (pack := planner.pop()) is not None:
                ...  # numbers of items, counted from the first ever pushed
        planner.flush()  # no more to come: pop() now returns the rest
        while (pack := planner.pop()) is not None: ...

    The packs are those of `plan_packing(strategy="subset_sum")` over the whole stream. At most `lookahead` items wait
    at a time; they and a few counters are the state, so a planner that loads it continues exactly where it was saved.
    It does not depend on ranks and workers: each runs the same planner over the same stream and takes its share of
    packs.

    Args:
        capacity: most tokens in a pack, at most 2^24.
        lookahead: how many items wait before a pack is made.
        max_images, max_samples: most images and items in a pack; None for no limit.
        oversize: what to do with an item that does not fit in any pack. "error": `push` raises; "drop": it is left out
            and counted in `dropped`; "own_pack": the next pack is that item alone.

    Raises:
        TypeError, ValueError: an argument that is wrong or out of range.

    Source: this package's own; see `plan_packing`.
    """

    def __init__(
        self,
        capacity: int,
        *,
        lookahead: int = LOOKAHEAD,
        max_images: int | None = None,
        max_samples: int | None = None,
        oversize: str = "error",
    ) -> None:
        self._caps = Caps.checked(capacity, max_images, max_samples)
        self._lookahead = integer("lookahead", lookahead, at_least=1)
        if oversize not in OVERSIZE:
            wrong_value("oversize", f"one of {', '.join(OVERSIZE)}", oversize)
        why = self._caps.why_no_subset_sum(self._lookahead)
        if why is not None:
            wrong_value(*why)
        self._oversize = oversize
        self.items = 0
        """Items pushed so far; the number of the next one."""
        self.packs = 0
        """Packs popped so far."""
        self.dropped = 0
        """Items left out so far."""
        self._waiting: list[tuple[int, int, int]] = []  # number, length, images; oldest first
        self._alone: deque[int] = deque()  # oversize items, each a pack
        self._flushing = False

    def __len__(self) -> int:
        """Number of waiting items."""
        return len(self._waiting) + len(self._alone)

    @property
    def waiting(self) -> list[int]:
        """Numbers of the waiting items, ascending."""
        return sorted([*self._alone, *(number for number, _, _ in self._waiting)])

    @property
    def ready(self) -> bool:
        """True when `pop` has a pack, which must be popped before the next `push`."""
        return bool(self._alone or len(self._waiting) >= self._lookahead or (self._flushing and self._waiting))

    def push(self, length: int, images: int = 0) -> int:
        """Append an item.

        Args:
            length: its tokens.
            images: its images; they count where `max_images` is given.

        Returns:
            its number, counted from the first item ever pushed.

        Raises:
            RuntimeError: a pack is `ready`; pop it first, or the state would grow.
            ValueError: a negative number, or with oversize="error" an item that fits in no pack.
        """
        if self.ready:
            raise RuntimeError("push: a pack is ready; pop() it first, so that no more than `lookahead` items wait")
        length, images = integer("length", length, at_least=0), integer("images", images, at_least=0)
        number = self.items
        over = [
            ("length", length, "capacity", self._caps.capacity),
            ("images", images, "max_images", self._caps.max_images),
        ]
        over = [each for each in over if each[3] is not None and each[1] > each[3]]
        if over and self._oversize == "error":
            name, got, cap, most = over[0]
            raise ValueError(f"{name}: expected at most {cap}={most}, got {got} of item {number}")
        self.items += 1
        if not over:
            self._waiting.append((number, length, images))
        elif self._oversize == "drop":
            self.dropped += 1
        else:
            self._alone.append(number)
        return number

    def flush(self) -> None:
        """Declare the end of the input: `pop` returns the rest. Once no item waits, `push` starts over."""
        self._flushing = bool(self._alone or self._waiting)

    def pop(self) -> Array | None:
        """The next pack, [k] int64 item numbers, ascending; None if too few items wait."""
        if not self.ready:
            return None
        self.packs += 1
        if self._alone:
            pack = np.array([self._alone.popleft()], np.int64)
        else:
            numbers, lengths, images = np.array(self._waiting, np.int64).T.copy()
            taken = planner().fullest_pack(lengths, self._caps.counted(images), *self._caps.arguments())
            pack = numbers[taken]
            gone = set(taken.tolist())
            self._waiting = [item for place, item in enumerate(self._waiting) if place not in gone]
        self._flushing = self._flushing and len(self) > 0
        return pack

    def _options(self) -> dict[str, Any]:
        caps = self._caps
        return {
            "capacity": caps.capacity,
            "max_images": caps.max_images,
            "max_samples": caps.max_samples,
            "lookahead": self._lookahead,
            "oversize": self._oversize,
        }

    def state_dict(self) -> dict[str, Any]:
        """The whole state as JSON values: three numbers for each waiting item, and a few counters."""
        return {
            **self._options(),
            "items": self.items,
            "packs": self.packs,
            "dropped": self.dropped,
            "waiting": [list(item) for item in self._waiting],
            "alone": list(self._alone),
            "flushing": self._flushing,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: push item `state["items"]` next.

        Raises:
            ValueError: the state is from a planner with other options.
        """
        for name, mine in self._options().items():
            if state[name] != mine:
                raise ValueError(f"state: expected {name} {mine!r} as in this planner, got {state[name]!r}")
        self.items, self.packs, self.dropped = (int(state[name]) for name in ("items", "packs", "dropped"))
        self._waiting = [(int(number), int(length), int(images)) for number, length, images in state["waiting"]]
        self._alone = deque(int(number) for number in state["alone"])
        self._flushing = bool(state["flushing"])
