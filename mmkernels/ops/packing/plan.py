"""Which items share a pack: the planner's public face and the plan itself."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from mmkernels.ops._checks import not_yet, wrong_type, wrong_value
from mmkernels.ops.packing import plan_python
from mmkernels.runtime import native

__all__ = ["STRATEGIES", "PackingPlan", "plan_packing"]

STRATEGIES = ("auto", "best_fit", "subset_sum", "histogram", "next_fit")
_NO_LIMIT = np.iinfo(np.int64).max
_LOOKAHEAD = 128
_MOST_SUBSET_SUM = 2**24  # kMostSubsetSum in planner.h


@dataclass(frozen=True, eq=False)
class PackingPlan:
    """The packs of a `plan_packing` call, in CSR form.

    `plan[p]` and iteration give the item indices of a pack. Packs come in the order of their first items and a pack's
    items in the order of the stream (the order given, or the one that `seed` makes of it).

    Attributes:
        offsets: [P+1] int64; pack p holds `items[offsets[p]:offsets[p+1]]`.
        items: [n] int64, each item index exactly once.
        lengths: [n] int64, the lengths planned for.
        capacity: most tokens in a pack.
        strategy: the one that made this plan; never "auto".
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int64]
    lengths: NDArray[np.int64]
    capacity: int
    strategy: str

    def __post_init__(self) -> None:
        for array in (self.offsets, self.items, self.lengths):
            array.flags.writeable = False

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.offsets) - 1

    @cached_property
    def pack_lengths(self) -> NDArray[np.int64]:
        """[P] int64: tokens in each pack."""
        ends = np.concatenate([[0], np.cumsum(self.lengths[self.items])])[self.offsets]
        return np.diff(ends)

    @property
    def efficiency(self) -> float:
        """Tokens over room: sum(lengths) / (P * capacity); 1.0 for a plan of nothing."""
        return int(self.lengths.sum()) / (self.num_packs * self.capacity) if self.num_packs else 1.0

    @property
    def lower_bound(self) -> int:
        """No plan has fewer packs: max(ceil(sum(lengths) / capacity), items longer than half the capacity).

        Caps on images and samples are not counted in.
        """
        if len(self.lengths) == 0:
            return 0
        by_sum = -(-int(self.lengths.sum()) // self.capacity)
        return max(1, by_sum, int(np.count_nonzero(self.lengths > self.capacity // 2)))

    @property
    def displacement(self) -> float:
        """Mean distance, in items, between an item's place in `items` and its place in the data."""
        if len(self.items) == 0:
            return 0.0
        return float(np.abs(self.items - np.arange(len(self.items))).mean())

    def __len__(self) -> int:
        return self.num_packs

    def __getitem__(self, pack: int) -> NDArray[np.int64]:
        number = operator.index(pack)
        if not -self.num_packs <= number < self.num_packs:
            raise IndexError(f"pack: expected at most {self.num_packs} packs, got index {pack}")
        number %= self.num_packs
        return self.items[self.offsets[number] : self.offsets[number + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[pack] for pack in range(self.num_packs))

    def __repr__(self) -> str:
        return (
            f"PackingPlan({len(self.items)} items in {self.num_packs} packs of {self.capacity}, "
            f"efficiency {self.efficiency:.2%}, at least {self.lower_bound} packs, strategy {self.strategy!r})"
        )


def plan_packing(
    lengths: ArrayLike,
    capacity: int,
    *,
    strategy: str = "auto",
    images: ArrayLike | None = None,
    max_images: int | None = None,
    max_samples: int | None = None,
    lookahead: int = _LOOKAHEAD,
    keep_order: bool = False,
    seed: int = 0,
) -> PackingPlan:
    """Group items into packs of at most `capacity` tokens, each item whole and in exactly one pack.

    Deterministic: the plan depends on the arguments alone, so every rank computes the same one.

    Args:
        lengths: [n] integers, tokens per item, each in [0, capacity].
        capacity: most tokens in a pack.
        strategy: how to group them.
            "best_fit": best fit decreasing, at most 11/9 of the optimum + 6/9; moves items far from their order.
            "subset_sum": the oldest waiting item, and the subset of the `lookahead` oldest others that fills its pack
            best; nearly keeps the order. Takes a capacity of at most 2^24 and no `max_samples` yet.
            "next_fit": keeps the order, and has the fewest packs of all plans that do.
            "auto": of the plans that the strategies make of this call the one with the fewest packs, and of those the
            one with the least displacement; "next_fit" with `keep_order`.
            "histogram" is not there yet.
        images, max_images: images per item and the most in a pack; not there yet.
        max_samples: most items in a pack; None for no limit.
        lookahead: how many of the oldest items "subset_sum" chooses from: more fills packs better and moves items
            further. An error where that strategy has no part.
        keep_order: the items must stay in order: only "next_fit" does that.
        seed: 0 takes the items in the order given; any other number takes them in a random order of its own (the same
            on every machine). "best_fit" then groups other items among those of equal length; `keep_order` forbids it.

    Returns:
        the plan.

    Raises:
        TypeError: lengths that are no integers.
        ValueError: an item that is negative or longer than the capacity (its index and length are named; nothing is
            ever truncated), or any other argument out of range.
        NotImplementedError: a part that is not there yet.

    Source: best fit decreasing: Johnson, Near-optimal bin packing algorithms, 1973, its bound: Dósa, 2007; the
        age-ordered subset sum is this package's own.
    """
    capacity = _integer("capacity", capacity, at_least=1)
    array = _check_lengths(lengths, capacity)
    max_items = _NO_LIMIT if max_samples is None else _integer("max_samples", max_samples, at_least=1)
    seed = _integer("seed", seed, at_least=0)
    if strategy not in STRATEGIES:
        wrong_value("strategy", f"one of {', '.join(STRATEGIES)}", strategy)
    for name, value in (("images", images), ("max_images", max_images)):
        if value is not None:
            not_yet(name, value)
    lookahead = _integer("lookahead", lookahead, at_least=1)
    if keep_order and (strategy not in ("auto", "next_fit") or seed):
        wrong_value("keep_order", "strategy='next_fit' or 'auto', and seed=0", f"strategy={strategy!r}, seed={seed}")

    order = _shuffled(len(array), seed) if seed else None
    stream = array if order is None else array[order]
    names = _strategies(strategy, capacity, max_samples, keep_order)
    if lookahead != _LOOKAHEAD and "subset_sum" not in names:
        wrong_value("lookahead", f"its default, for {' and '.join(names)} look at no window", lookahead)
    plans = []
    for name in names:
        offsets, items = _run(name, stream, capacity, max_items, lookahead)
        plans.append(PackingPlan(offsets, items, stream, capacity, name))
    best = min(plans, key=lambda plan: (plan.num_packs, plan.displacement))
    return best if order is None else replace(best, items=order[best.items], lengths=array)


def _strategies(strategy: str, capacity: int, max_samples: int | None, keep_order: bool) -> list[str]:
    """The strategies to try; raises for one that cannot serve the call."""
    if strategy == "histogram":
        not_yet("strategy", strategy)
    if strategy == "subset_sum" and capacity > _MOST_SUBSET_SUM:
        wrong_value("capacity", f"at most {_MOST_SUBSET_SUM} with strategy='subset_sum'", capacity)
    if strategy == "subset_sum" and max_samples is not None:
        not_yet("max_samples with strategy='subset_sum'", max_samples)
    if keep_order:
        return ["next_fit"]
    if strategy != "auto":
        return [strategy]
    sums = capacity <= _MOST_SUBSET_SUM and max_samples is None
    return ["best_fit", "next_fit", *(["subset_sum"] if sums else [])]


def _run(strategy: str, lengths: NDArray[np.int64], capacity: int, max_items: int, lookahead: int) -> plan_python.Csr:
    planner: Any = plan_python if native.why_absent() else native.core()
    option = lookahead if strategy == "subset_sum" else max_items
    return getattr(planner, f"plan_{strategy}")(lengths, capacity, option)


def _integer(name: str, value: Any, *, at_least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        wrong_type(name, f"an integer >= {at_least}", value)
    if not at_least <= number <= _NO_LIMIT:
        wrong_value(name, f"an integer >= {at_least}", value)
    return number


def _check_lengths(lengths: ArrayLike, capacity: int) -> NDArray[np.int64]:
    """A private int64 copy of the lengths."""
    if isinstance(lengths, torch.Tensor):
        if lengths.device.type != "cpu":
            wrong_value("lengths", "[n] integers on cpu", lengths)
        lengths = lengths.numpy()
    array = np.asarray(lengths)
    if array.ndim != 1:
        wrong_value("lengths", "[n] integers", f"{list(array.shape)} {array.dtype}")
    if array.size and array.dtype.kind not in "iu":
        wrong_type("lengths", "[n] integers", f"{list(array.shape)} {array.dtype}")
    bad = np.flatnonzero((array < 0) | (array > capacity))
    if len(bad):
        raise ValueError(
            f"lengths: expected each in [0, capacity={capacity}], got {array[bad[0]]} at index {bad[0]}"
            + (f" and {len(bad) - 1} more" if len(bad) > 1 else "")
        )
    return array.astype(np.int64, copy=True)


def _shuffled(n: int, seed: int) -> NDArray[np.int64]:
    """A permutation of n by SplitMix64 keys: our own, because NumPy's streams may change between its versions."""

    def mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return key ^ (key >> np.uint64(31))

    key = np.arange(1, n + 1, dtype=np.uint64)
    key += mixed(np.array([seed % 2**64], dtype=np.uint64))
    return np.argsort(mixed(key), kind="stable").astype(np.int64)
