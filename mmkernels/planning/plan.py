"""Which items share a pack: the planner's public API."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from mmkernels.ops import checks
from mmkernels.ops.checks import wrong_type, wrong_value
from mmkernels.planning.plan_result import CountedPlan, PackingPlan, planner
from mmkernels.runtime import native

__all__ = ["LOOKAHEAD", "OVERSIZE", "STRATEGIES", "Caps", "PackingPlan", "plan_packing", "shuffled"]

STRATEGIES = ("auto", "best_fit", "subset_sum", "histogram", "next_fit")
OVERSIZE = ("error", "drop", "own_pack")
LOOKAHEAD = 128

_NO_CAP = np.iinfo(np.int64).max
_MOST_SUBSET_SUM = 2**24  # kMostSubsetSum in planner.h
_MOST_IMAGES = 2**30 - 1  # per pack of subset sum, so that a cost fits into 32 bits
_MOST_BYTES = 2**30  # of subset sum's tables
_MOST_TABLE = 2**20  # a capacity up to which lengths are counted in a table

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Caps:
    """The limits of a pack; None for no limit."""

    capacity: int
    max_images: int | None = None
    max_samples: int | None = None

    @classmethod
    def checked(cls, capacity: Any, max_images: Any, max_samples: Any) -> Caps:
        """Raise TypeError or ValueError for a cap that is not an integer >= 1."""
        caps = {"max_images": max_images, "max_samples": max_samples}
        given = {name: integer(name, cap, at_least=1) for name, cap in caps.items() if cap is not None}
        return cls(integer("capacity", capacity, at_least=1), **given)

    def arguments(self) -> tuple[int, int, int]:
        """The caps as the planner's functions take them."""
        images, samples = (_NO_CAP if cap is None else cap for cap in (self.max_images, self.max_samples))
        return self.capacity, images, samples

    def counted(self, images: Array | None) -> Array | None:
        """The images if they are limited, else None."""
        return None if self.max_images is None else images

    def oversize(self, lengths: Array, images: Array | None) -> NDArray[np.bool_]:
        """[n]: items that do not even fit in an empty pack."""
        over = lengths > self.capacity
        return over | (images > self.max_images) if images is not None and self.max_images is not None else over

    def why_no_subset_sum(self, lookahead: int) -> tuple[str, str, int] | None:
        """(argument, expected, actual) of a limit that strategy "subset_sum" exceeds; None if it can run."""
        if self.capacity > _MOST_SUBSET_SUM:
            return "capacity", f"at most {_MOST_SUBSET_SUM}", self.capacity
        if self.max_images is not None and self.max_images > _MOST_IMAGES:
            return "max_images", f"at most {_MOST_IMAGES}", self.max_images
        bits = 1 if self.max_images is None and self.max_samples is None else 32
        most = 8 * _MOST_BYTES // (bits * (self.capacity + 64)) - 1
        return ("lookahead", f"at most {most} (1 GiB of tables)", lookahead) if lookahead > most else None


def plan_packing(
    lengths: ArrayLike,
    capacity: int,
    *,
    strategy: str = "auto",
    images: ArrayLike | None = None,
    max_images: int | None = None,
    max_samples: int | None = None,
    lookahead: int = LOOKAHEAD,
    keep_order: bool = False,
    oversize: str = "error",
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
            best; nearly keeps the order. Takes a capacity of at most 2^24.
            "histogram": best fit over counts of equal items. It lists its packs only on first access, so it quickly
            shows how well tens of millions of items pack. "next_fit": keeps the order, and has the fewest packs of all
            plans that do. "auto": the strategies' plan with the fewest packs and, among equals, the least displacement;
            "next_fit" with `keep_order`.
        images: [n] integers, images per item (or another quantity to limit); the plan keeps them.
        max_images: most images in a pack; None for no limit.
        max_samples: most items in a pack; None for no limit.
        lookahead: how many of the oldest items "subset_sum" chooses from: more fills packs better and moves items
            further. An error if that strategy is not used.
        keep_order: keep the items in order, which only "next_fit" does.
        oversize: what to do with items that fit in no pack, longer than the capacity or with more than `max_images`.
            "error" raises; "drop" leaves them out and lists them in `plan.dropped`; "own_pack" gives each its own pack,
            above the caps, listed in `plan.oversize_packs`.
        seed: 0 keeps the given order; any other number shuffles the items (identically on every machine). "best_fit"
            then chooses differently among items of equal length. Not allowed with `keep_order`.

    Returns:
        the plan.

    Raises:
        TypeError: lengths or images that are not integers.
        ValueError: an item that is negative, or oversize with oversize="error" (the message has its index and size;
            nothing is ever truncated), or any other argument out of range.

    Source: best fit decreasing: Johnson, Near-optimal bin packing algorithms, 1973, its bound: Dósa, 2007; packing
        counts of equal lengths: Krell et al., Efficient sequence packing without cross-contamination, 2021; the
        age-ordered subset sum is this package's own.
    """
    caps = Caps.checked(capacity, max_images, max_samples)
    seed, lookahead = integer("seed", seed, at_least=0), integer("lookahead", lookahead, at_least=1)
    for name, value, known in (("strategy", strategy, STRATEGIES), ("oversize", oversize, OVERSIZE)):
        if value not in known:
            wrong_value(name, f"one of {', '.join(known)}", value)
    if max_images is not None and images is None:
        wrong_value("images", "[n] integers with max_images", images)
    if keep_order and (strategy not in ("auto", "next_fit") or seed):
        wrong_value("keep_order", "strategy='next_fit' or 'auto', and seed=0", f"strategy={strategy!r}, seed={seed}")
    names = _strategies(strategy, caps, lookahead, keep_order)
    if strategy == "histogram" and images is None and not seed:
        counted = _count_and_plan(lengths, caps)
        if counted is not None:
            return counted

    sizes = integers("lengths", lengths)
    pictures = None if images is None else integers("images", images, n=len(sizes))
    over = caps.oversize(sizes, pictures)
    if oversize == "error" and over.any():
        _refuse(sizes, pictures, caps)
    order = shuffled(len(sizes), seed) if seed else None
    if order is None and not over.any():
        plans = [_run(name, sizes, pictures, caps, lookahead) for name in names]
        return min(plans, key=lambda plan: (plan.num_packs, plan.displacement if len(plans) > 1 else 0))
    order = np.arange(len(sizes)) if order is None else order
    stream = order[~over[order]]
    some = None if pictures is None else pictures[stream]
    plans = [_run(name, sizes[stream], some, caps, lookahead) for name in names]
    best = min(plans, key=lambda plan: (plan.num_packs, plan.displacement))
    plan = replace(_listed(best), items=stream[best.items], lengths=sizes, images=pictures)
    if oversize == "drop":
        return replace(plan, dropped=np.flatnonzero(over))
    return _with_own_packs(plan, order, over) if over.any() else plan


def _strategies(strategy: str, caps: Caps, lookahead: int, keep_order: bool) -> list[str]:
    """The strategies to try; raise if the requested one cannot handle the call."""
    why = caps.why_no_subset_sum(lookahead)
    if strategy == "subset_sum" and why is not None:
        wrong_value(why[0], f"{why[1]} with strategy='subset_sum'", why[2])
    if keep_order:
        names = ["next_fit"]
    elif strategy != "auto":
        names = [strategy]
    else:
        # Without caps on images or samples, histogram has as many packs as best fit.
        capped = caps.max_images is not None or caps.max_samples is not None
        names = ["best_fit", "next_fit", *(["subset_sum"] if why is None else []), *(["histogram"] if capped else [])]
    if lookahead != LOOKAHEAD and "subset_sum" not in names:
        wrong_value("lookahead", f"its default for {' and '.join(names)} (no window)", lookahead)
    return names


def _run(strategy: str, lengths: Array, images: Array | None, caps: Caps, lookahead: int) -> PackingPlan:
    arguments = (lengths, caps.counted(images), *caps.arguments())
    kept: dict[str, Any] = {"images": images, "max_images": caps.max_images, "max_samples": caps.max_samples}
    if strategy == "histogram":
        steps, num_packs = planner().plan_histogram(*arguments)
        return CountedPlan(steps, num_packs, lengths, caps.capacity, **kept)
    if strategy == "subset_sum":
        offsets, items = planner().plan_subset_sum(*arguments, min(lookahead, max(len(lengths), 1)))
    elif strategy == "best_fit":
        offsets, items = planner().plan_best_fit(*arguments)
    else:
        offsets, items = planner().plan_next_fit(*arguments)
    return PackingPlan(offsets, items, lengths, caps.capacity, strategy, **kept)


def _count_and_plan(lengths: ArrayLike, caps: Caps) -> CountedPlan | None:
    """A histogram plan in one pass over the lengths; None if they must be validated or converted first."""
    array = np.asarray(lengths)
    plain = array.ndim == 1 and array.dtype == np.int64 and array.flags.c_contiguous and array.flags.aligned
    if native.why_absent() or not plain or caps.capacity > _MOST_TABLE:
        return None
    counted = native.core.count_and_plan(array, caps.capacity, caps.arguments()[2])
    if counted is None:
        return None
    steps, num_packs, copy = counted
    return CountedPlan(steps, num_packs, copy, caps.capacity, max_samples=caps.max_samples)


def _listed(plan: PackingPlan) -> PackingPlan:
    """A plan that `replace` can change."""
    names = ("offsets", "items", "lengths", "capacity", "strategy", "images", "max_images", "max_samples")
    return PackingPlan(*(getattr(plan, name) for name in names)) if isinstance(plan, CountedPlan) else plan


def _with_own_packs(plan: PackingPlan, order: Array, over: NDArray[np.bool_]) -> PackingPlan:
    """The plan plus one pack per oversize item, at the item's position in the stream `order`."""
    alone = order[over[order]]
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    first = np.concatenate([place[plan.items[plan.offsets[:-1]]], place[alone]])
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    sizes = np.concatenate([np.diff(plan.offsets), np.ones(len(alone), np.int64)])
    by_pack = np.argsort(np.repeat(number, sizes), kind="stable")
    offsets = np.concatenate([[0], np.cumsum(sizes[np.argsort(number)])])
    items = np.concatenate([plan.items, alone])[by_pack]
    return replace(plan, offsets=offsets, items=items, oversize_packs=np.sort(number[plan.num_packs :]))


def integer(name: str, value: Any, *, at_least: int) -> int:
    """An integer argument that fits in 64 bits; raise TypeError or ValueError otherwise."""
    expected = f"an integer >= {at_least}"
    number = checks.integer(name, value, expected, at_least=at_least)
    if number > _NO_CAP:
        wrong_value(name, expected, value)
    return number


def integers(name: str, values: ArrayLike, n: int | None = None) -> Array:
    """A private int64 copy of numbers >= 0, one per item."""
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            wrong_value(name, "[n] integers on cpu", values)
        values = values.numpy()
    array = np.asarray(values)
    if array.ndim != 1 or (n is not None and len(array) != n):
        wrong_value(name, f"[{'n' if n is None else n}] integers", f"{list(array.shape)} {array.dtype}")
    if array.size and array.dtype.kind not in "iu":
        wrong_type(name, "[n] integers", f"{list(array.shape)} {array.dtype}")
    _refuse_where((array < 0) | (array > _NO_CAP), name, array, "an integer in [0, 2^63)")
    return array.astype(np.int64, copy=True)


def _refuse(lengths: Array, images: Array | None, caps: Caps) -> None:
    """Raise for the oversize items."""
    _refuse_where(lengths > caps.capacity, "lengths", lengths, f"each in [0, capacity={caps.capacity}]")
    if images is not None and caps.max_images is not None:
        _refuse_where(images > caps.max_images, "images", images, f"each in [0, max_images={caps.max_images}]")


def _refuse_where(bad: NDArray[np.bool_], name: str, array: NDArray[Any], expected: str) -> None:
    at = np.flatnonzero(bad)
    if len(at):
        more = f" and {len(at) - 1} more" if len(at) > 1 else ""
        raise ValueError(f"{name}: expected {expected}, got {array[at[0]]} at index {at[0]}{more}")


def shuffled(n: int, seed: int) -> Array:
    """A permutation of n by SplitMix64 keys: not NumPy's, whose streams may change between versions."""

    def mixed(key: NDArray[np.uint64]) -> NDArray[np.uint64]:
        key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return key ^ (key >> np.uint64(31))

    key = np.arange(1, n + 1, dtype=np.uint64)
    key += mixed(np.array([seed % 2**64], dtype=np.uint64))
    return np.argsort(mixed(key), kind="stable").astype(np.int64)
