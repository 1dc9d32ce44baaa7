"""Which rank computes which pack: equal numbers of steps, and nearly equal work in each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmkernels.ops.checks import wrong_type, wrong_value
from mmkernels.planning.cost import AttentionCost
from mmkernels.planning.plan import integer, shuffled
from mmkernels.planning.plan_result import PackingPlan
from mmkernels.planning.saved import Saved

__all__ = ["NO_PACK", "RankSchedule", "balance_ranks"]

NO_PACK = -1
WINDOW = 4096


@dataclass(frozen=True, eq=False)
class RankSchedule(Saved):
    """What each of W ranks computes in each step, made by `balance_ranks`.

    Attributes:
        packs: [steps, W, accum] int64 pack numbers; NO_PACK (-1) where none is left for a rank, which then runs a
            dummy.
        costs: [steps, W, accum] float64, 0 for NO_PACK.
        no_image: [steps, W] bool: no pack of this rank's step has an image, so the vision encoder needs a dummy image
            for this rank to take part in the gradient reduction. All False when the plan was made without `images`.
        start: packs that earlier steps took.
        num_packs: packs in the plan.
    """

    packs: NDArray[np.int64]
    costs: NDArray[np.float64]
    no_image: NDArray[np.bool_]
    start: int
    num_packs: int

    @property
    def num_steps(self) -> int:
        """The same on every rank."""
        return self.packs.shape[0]

    @property
    def world_size(self) -> int:
        """W."""
        return self.packs.shape[1]

    def rank(self, rank: int) -> NDArray[np.int64]:
        """[steps, accum] int64: the packs of one rank."""
        if not 0 <= integer("rank", rank, at_least=0) < self.world_size:
            wrong_value("rank", f"in [0, {self.world_size})", rank)
        return self.packs[:, rank]

    def position(self, steps: int) -> int:
        """Packs taken once `steps` steps of this schedule are done: the `start` to continue from, at any world size."""
        if not 0 <= integer("steps", steps, at_least=0) <= self.num_steps:
            wrong_value("steps", f"in [0, {self.num_steps}]", steps)
        return min(self.num_packs, self.start + steps * self.packs[0].size) if steps else self.start

    @property
    def imbalance(self) -> float:
        """sum over steps of the slowest rank's cost / sum of the mean cost: at 1.02 ranks wait 2% of the time."""
        ranks = self.costs.sum(2)
        mean = float(ranks.mean(1).sum())
        return float(ranks.max(1).sum()) / mean if mean else 1.0

    @property
    def step_imbalance(self) -> NDArray[np.float64]:
        """[steps] float64: the slowest rank's cost over the mean, per step."""
        ranks = self.costs.sum(2)
        mean = ranks.mean(1)
        return np.divide(ranks.max(1), mean, out=np.ones_like(mean), where=mean > 0)

    def __repr__(self) -> str:
        return (
            f"RankSchedule({self.num_steps} steps of {self.world_size} ranks, imbalance {self.imbalance:.3f}, "
            f"{int((self.packs == NO_PACK).sum())} dummies, {int(self.no_image.sum())} without an image)"
        )


def balance_ranks(
    plan: PackingPlan,
    world_size: int,
    *,
    accum: int = 1,
    cost: AttentionCost | None = None,
    seed: int = 0,
    start: int = 0,
    window: int = WINDOW,
    last: str = "pad",
) -> RankSchedule:
    """Deal the packs of a plan to ranks, so that in each step every rank has nearly the same work.

    Packs are sorted by cost inside windows, ascending in one and descending in the next; this one order is cut into
    steps: neighbours cost nearly the same. The order depends on the plan, the cost, the seed and the window alone. The
    number of ranks only determines where it is cut, so a run resumes at another world size with the same packs in the
    same order. There is no communication: every rank computes the same schedule. Packs stay whole, so no rank has more
    than accum * capacity tokens in a step.

    Args:
        plan: the packs.
        world_size: W, ranks that share the packs.
        accum: packs per rank and step (gradient accumulation).
        cost: of a pack; default `AttentionCost()`.
        seed: 0 fills the windows in the plan's order; any other number shuffles the packs first.
        start: packs already done, `RankSchedule.position` of an earlier schedule.
        window: packs per window: larger windows balance better, but more packs of similar cost share a step. From 16 *
            W on the balance no longer depends on W.
        last: for a last step with too few packs: "pad" gives some ranks NO_PACK, "drop" discards its packs.

    Returns:
        the schedule; the same number of steps on every rank.

    Raises:
        TypeError, ValueError: an argument that is wrong or out of range.

    Source: balancing by attention cost: Wang et al., WLB-LLM, 2025; Zheng et al., OrchMLLM, 2025.
    """
    if not isinstance(plan, PackingPlan):
        wrong_type("plan", "a PackingPlan", plan)
    if cost is not None and not isinstance(cost, AttentionCost):
        wrong_type("cost", "an AttentionCost", cost)
    ranks, accum = integer("world_size", world_size, at_least=1), integer("accum", accum, at_least=1)
    window, seed = integer("window", window, at_least=1), integer("seed", seed, at_least=0)
    start = integer("start", start, at_least=0)
    if start > plan.num_packs:
        wrong_value("start", f"at most the {plan.num_packs} packs of the plan", start)
    if last not in ("pad", "drop"):
        wrong_value("last", "'pad' or 'drop'", last)

    costs = (cost or AttentionCost()).of_packs(plan)
    left = _global_order(costs, seed, window)[start:]
    per_step = ranks * accum
    steps = len(left) // per_step if last == "drop" else -(-len(left) // per_step)
    slots = np.full(steps * per_step, NO_PACK, np.int64)
    slots[: min(len(left), len(slots))] = left[: len(slots)]
    known = np.append(costs, 0.0)  # the cost of NO_PACK
    packs = _deal(slots.reshape(steps, accum, ranks), known, seed, start)
    no_image = np.zeros((steps, ranks), np.bool_)
    if plan.images is not None:
        seen = np.append(plan.pack_images > 0, False)
        _spread_images(packs, known, seen)
        no_image = np.logical_not(np.any(seen[packs], axis=2))
    return RankSchedule(packs, known[packs], no_image, start, plan.num_packs)


def _global_order(costs: NDArray[np.float64], seed: int, window: int) -> NDArray[np.int64]:
    """[P]: rising in the first window, falling in the second, so that a step across two windows is balanced too."""
    order = shuffled(len(costs), seed) if seed else np.arange(len(costs))
    number = np.arange(len(costs)) // window
    signed = np.where(number % 2 == 0, costs[order], -costs[order])
    return order[np.lexsort((signed, number))]


def _deal(slots: NDArray[np.int64], costs: NDArray[np.float64], seed: int, start: int) -> NDArray[np.int64]:
    """[steps, W, accum] from [steps, accum, W]: of each W packs the cheapest goes to the rank with most work so far.

    The first are dealt at random, so that no rank is the slowest in every step.
    """
    steps, accum, ranks = slots.shape
    packs = np.empty((steps, ranks, accum), np.int64)
    done = np.empty((steps, ranks))
    for step in range(steps):
        done[step] = shuffled(ranks, 1 + seed + start + step * ranks * accum)  # depends on the position alone
    for turn in range(accum):
        falling = np.argsort(-done, axis=1, kind="stable")
        rising = np.argsort(costs[slots[:, turn]], axis=1, kind="stable")
        np.put_along_axis(packs[:, :, turn], falling, np.take_along_axis(slots[:, turn], rising, 1), 1)
        done = (0 if turn == 0 else done) + costs[packs[:, :, turn]]
    return packs


def _spread_images(packs: NDArray[np.int64], costs: NDArray[np.float64], seen: NDArray[np.bool_]) -> None:
    """Swap packs of a step, in place, so that a rank without an image gets one from a rank that has several: the swap
    that changes the two ranks' work least."""
    for step in np.flatnonzero(~np.all(seen[packs].any(2), axis=1)):
        for rank in np.flatnonzero(~seen[packs[step]].any(1)):
            image = seen[packs[step]]  # [W, accum]
            spare = image & (image.sum(1) > 1)[:, None]
            if not spare.any():
                break
            change = np.where(spare, np.abs(costs[packs[step]] - costs[packs[step, rank]]), np.inf)
            giver, turn = np.unravel_index(np.argmin(change), change.shape)
            packs[step, [rank, giver], turn] = packs[step, [giver, rank], turn]
