"""A planner's packs and their quality."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmkernels.planning import plan_python
from mmkernels.planning.saved import Saved
from mmkernels.runtime import native

__all__ = ["CountedPlan", "PackingPlan", "planner"]

Array = NDArray[np.int64]


def _nothing() -> Array:
    return np.zeros(0, np.int64)


def planner() -> Any:
    """The algorithms: the native core's, or Python's without the core."""
    return plan_python if native.why_absent() else native.core


@dataclass(frozen=True, eq=False)
class PackingPlan(Saved):
    """The packs of a `plan_packing` call, in CSR form.

    `plan[p]` and iteration give the item indices of a pack. Packs come in the order of their first items and a pack's
    items in the order of the stream (the given order, or the one shuffled by `seed`).

    Attributes:
        offsets: [P+1] int64; pack p holds `items[offsets[p]:offsets[p+1]]`.
        items: [n - dropped] int64, each item that is not dropped exactly once.
        lengths: [n] int64, the planned lengths.
        capacity: most tokens in a pack.
        strategy: the one that made this plan; never "auto".
        images: [n] int64, images per item, or None.
        max_images, max_samples: the caps, or None.
        dropped: int64, ascending: the items that fit in no pack, left out by `oversize="drop"`.
        oversize_packs: int64, ascending: the packs that hold one such item each, made by `oversize="own_pack"`.
    """

    offsets: Array
    items: Array
    lengths: Array
    capacity: int
    strategy: str
    images: Array | None = None
    max_images: int | None = None
    max_samples: int | None = None
    dropped: Array = field(default_factory=_nothing)
    oversize_packs: Array = field(default_factory=_nothing)

    def __post_init__(self) -> None:
        for array in (self.offsets, self.items, self.lengths, self.images, self.dropped, self.oversize_packs):
            if array is not None:
                array.flags.writeable = False

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.offsets) - 1

    @cached_property
    def pack_lengths(self) -> Array:
        """[P] int64: tokens in each pack."""
        return self.pack_sums(self.lengths)

    @cached_property
    def pack_images(self) -> Array:
        """[P] int64: images in each pack; all zero when the plan was made without `images`."""
        return np.zeros(self.num_packs, np.int64) if self.images is None else self.pack_sums(self.images)

    def pack_sums(self, per_item: NDArray[Any]) -> NDArray[Any]:
        """[P]: the sum over each pack of a number per item, [n]; int64 stays exact."""
        return np.diff(np.concatenate([per_item[:0].sum(keepdims=True), np.cumsum(per_item[self.items])])[self.offsets])

    @property
    def _tokens(self) -> int:
        """Packed tokens."""
        return int(self.lengths.sum()) - int(self.lengths[self.dropped].sum())

    @property
    def efficiency(self) -> float:
        """Tokens / room; a pack's room is the capacity, or its length if that is larger. 1.0 for no packs."""
        if self.num_packs == 0:
            return 1.0
        room = self.num_packs * self.capacity
        if len(self.oversize_packs):
            room += int(np.maximum(self.pack_lengths[self.oversize_packs] - self.capacity, 0).sum())
        return self._tokens / room

    @property
    def lower_bound(self) -> int:
        """No plan has fewer packs: the maximum of these bounds.

        ceil(sum(lengths) / capacity), items longer than half the capacity, the same two of images and `max_images`, and
        ceil(items / max_samples); plus one pack for each oversize item that is not dropped.
        """
        own = self.items[self.offsets[self.oversize_packs]] if len(self.oversize_packs) else self.oversize_packs
        kept = np.ones(len(self.lengths), bool)
        kept[self.dropped] = kept[own] = False
        bounds = [_bound(self.lengths[kept], self.capacity)]
        if self.images is not None and self.max_images is not None:
            bounds.append(_bound(self.images[kept], self.max_images))
        if self.max_samples is not None:
            bounds.append(-(-int(kept.sum()) // self.max_samples))
        return len(own) + max(bounds)

    @property
    def displacement(self) -> float:
        """Mean distance, in items, between an item's position in `items` and in the data, dropped items not counted."""
        if len(self.items) == 0:
            return 0.0
        places = self.items - np.searchsorted(self.dropped, self.items) if len(self.dropped) else self.items
        return float(np.abs(places - np.arange(len(places))).mean())

    def __len__(self) -> int:
        return self.num_packs

    def __getitem__(self, pack: int) -> Array:
        number = operator.index(pack)
        if not -self.num_packs <= number < self.num_packs:
            raise IndexError(f"pack: expected at most {self.num_packs} packs, got index {pack}")
        number %= self.num_packs
        return self.items[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[pack] for pack in range(self.num_packs))

    def __repr__(self) -> str:
        notes = [f", {len(self.dropped)} items dropped"] if len(self.dropped) else []
        notes += [f", {len(self.oversize_packs)} packs oversize"] if len(self.oversize_packs) else []
        return (
            f"PackingPlan({len(self.lengths) - len(self.dropped)} items in {self.num_packs} packs of {self.capacity}, "
            f"efficiency {self.efficiency:.2%}, at least {self.lower_bound} packs, strategy {self.strategy!r}"
            f"{''.join(notes)})"
        )


def _bound(amounts: Array, cap: int) -> int:
    """Lower bound on the packs for these amounts; at least 1 if there are items."""
    if len(amounts) == 0:
        return 0
    return max(1, -(-int(amounts.sum()) // cap), int(np.count_nonzero(amounts > cap // 2)))


class CountedPlan(PackingPlan):
    """A plan made over counts of equal items: `num_packs`, `efficiency` and `lower_bound` are known at once; `offsets`
    and `items` are listed on first access, which takes far longer than the plan itself."""

    def __init__(self, steps: Array, num_packs: int, lengths: NDArray[Any], capacity: int, **caps: Any) -> None:
        """lengths: [n], of any integer dtype, owned by the plan."""
        given = {"capacity": capacity, "strategy": "histogram", "images": None, "max_images": None, "max_samples": None}
        given |= {
            "dropped": _nothing(),
            "oversize_packs": _nothing(),
            "_steps": steps,
            "_num_packs": num_packs,
            "_narrow": lengths,
        }
        for name, value in (given | caps).items():
            object.__setattr__(self, name, value)

    @property
    def num_packs(self) -> int:
        """P."""
        count: int = self.__dict__["_num_packs"]
        return count

    @property
    def _tokens(self) -> int:
        return int(self.__dict__["_narrow"].sum(dtype=np.int64))

    @cached_property
    def lengths(self) -> Array:
        array = np.array(self.__dict__["_narrow"], np.int64)
        array.flags.writeable = False
        return array

    @cached_property
    def _listed(self) -> tuple[Array, Array]:
        offsets, items = planner().list_histogram(
            self.lengths, self.images if self.max_images is not None else None, self.__dict__["_steps"], self.num_packs
        )
        offsets.flags.writeable = items.flags.writeable = False
        return offsets, items

    @property
    def offsets(self) -> Array:
        return self._listed[0]

    @property
    def items(self) -> Array:
        return self._listed[1]
