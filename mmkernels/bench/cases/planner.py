"""The planner: items per second and efficiency of each strategy and of a stream, and how evenly ranks share the packs.

Single-threaded.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from mmkernels import AttentionCost, EncoderCost, PackingPlan, RankSchedule, StreamPlanner, balance_ranks, plan_packing
from mmkernels.bench.case import Case, Inputs, Settings, Work
from mmkernels.bench.planner_peers import LengthsOfPacks
from mmkernels.testing.lengths import LENGTHS, samples_like

Params = Mapping[str, Any]
SLOW = ("trl", "numba", "torchtune", "best fit in Python")  # beyond tens of thousands of items


def setup(p: Params, device: torch.device) -> Inputs:
    once = samples_like(p["lengths"], min(p["n"], 1_000_000))
    lengths = np.tile(once.lengths, -(-p["n"] // len(once.lengths)))[: p["n"]]
    images = {"images": once.images, "max_images": _image_cap(once)} if p.get("images") else {}
    return {"lengths": lengths, "capacity": once.capacity, "caps": images}


def _image_cap(samples: Any) -> int:
    """10% more than packs need on average, and enough for every item."""
    return max(int(samples.images.max()), int(1.1 * samples.images.sum() * samples.capacity / samples.lengths.sum()))


def plan_with(strategy: str, inputs: Inputs, backend: str | None = None) -> tuple[PackingPlan]:
    plan = plan_packing(inputs["lengths"], inputs["capacity"], strategy=strategy, **inputs["caps"])
    assert plan.num_packs > 0  # a histogram plan lists its packs only on demand
    return (plan,)


def best_fit(inputs: Inputs, backend: str | None) -> tuple[PackingPlan]:
    return plan_with("best_fit", inputs)


def listed(inputs: Inputs) -> tuple[PackingPlan]:
    (plan,) = plan_with("histogram", inputs)
    assert len(plan.items)
    return (plan,)


def stream(inputs: Inputs) -> tuple[list[Any]]:
    planner, packs = StreamPlanner(inputs["capacity"]), []
    for length in inputs["lengths"].tolist():
        planner.push(length)
        while (pack := planner.pop()) is not None:
            packs.append(pack)
    planner.flush()
    while (pack := planner.pop()) is not None:
        packs.append(pack)
    return (packs,)


def best_fit_in_python(inputs: Inputs) -> tuple[list[list[int]]]:
    """Best fit decreasing with a sorted list of the room that packs have left, as collators write it."""
    lengths, packs = inputs["lengths"], list[list[int]]()
    room: list[tuple[int, int]] = []  # and the pack, sorted
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        at = bisect.bisect_left(room, (length, -1))
        left, pack = room.pop(at) if at < len(room) else (inputs["capacity"], len(packs))
        if pack == len(packs):
            packs.append([])
        packs[pack].append(item)
        bisect.insort(room, (left - length, pack))
    return (packs,)


def pad_to_longest(inputs: Inputs, batch: int = 32) -> tuple[float]:
    """Not a plan: the efficiency of padding batches of 32 to their longest sample."""
    lengths = inputs["lengths"]
    padded = np.resize(lengths, -(-len(lengths) // batch) * batch).reshape(-1, batch).max(1).sum() * batch
    return (float(lengths.sum() / padded),)


def check_plan(name: str, outputs: Sequence[Any], inputs: Inputs) -> None:
    """Each item once, no pack over the capacity."""
    lengths, capacity, result = inputs["lengths"], inputs["capacity"], outputs[0]
    if isinstance(result, float):
        return
    if isinstance(result, LengthsOfPacks):
        assert max(sum(pack) for pack in result) <= capacity, f"{name}: a pack is over the capacity"
        assert sorted(x for pack in result for x in pack) == np.sort(lengths).tolist(), f"{name}: not each item once"
        return
    items = result.items if isinstance(result, PackingPlan) else np.concatenate([np.asarray(pack) for pack in result])
    sums = (
        result.pack_lengths if isinstance(result, PackingPlan) else [int(lengths[np.asarray(p)].sum()) for p in result]
    )
    assert np.array_equal(np.sort(items), np.arange(len(lengths))), f"{name}: not each item once"
    assert max(sums) <= capacity, f"{name}: a pack is over the capacity"


def figures_of_plan(outputs: Sequence[Any], inputs: Inputs) -> dict[str, float]:
    result = outputs[0]
    if isinstance(result, float):
        return {"efficiency %": 100 * result}
    if isinstance(result, PackingPlan):
        above = result.num_packs - result.lower_bound
        return {"efficiency %": 100 * result.efficiency, "above bound": above, "moved by": result.displacement}
    return {"efficiency %": 100 * float(inputs["lengths"].sum()) / (len(result) * inputs["capacity"])}


PLAN = Case(
    name="plan",
    full=[
        *({"lengths": name, "n": 20_000} for name in LENGTHS),
        *({"lengths": name, "n": 1_000_000} for name in ("caption@4096", "navit@1024", "qwen2vl@16384")),
    ],
    quick=[{"lengths": name, "n": 2000} for name in LENGTHS],
    setup=setup,
    ours=partial(plan_with, "auto"),
    others={
        "mmkernels best_fit": partial(plan_with, "best_fit"),
        "mmkernels subset_sum": partial(plan_with, "subset_sum"),
        "mmkernels histogram": partial(plan_with, "histogram"),
        "mmkernels next_fit": partial(plan_with, "next_fit"),
        "mmkernels StreamPlanner": stream,
        "best fit in Python": best_fit_in_python,
        "padding 32 to the longest": pad_to_longest,
    },
    peers={"trl": "bfd", "numba": "first_fit", "lightbinpack": "obfd", "torchtune": "next_fit"},
    check=check_plan,
    figures=figures_of_plan,
    limits=lambda p, name: "too slow" if p["n"] > 20_000 and name in (*SLOW, "mmkernels StreamPlanner") else None,
    baseline=("best fit in Python", "trl", "numba", "lightbinpack", "torchtune"),
    work=lambda p: Work(items=p["n"]),
    memory=False,
    backends=False,
)

COUNTS = Case(
    name="counts",
    full=[{"lengths": name, "n": 16_000_000} for name in ("navit@1024", "qwen2vl@16384")],
    quick=[{"lengths": "qwen2vl@16384", "n": 20_000}],
    setup=setup,
    ours=partial(plan_with, "histogram"),
    others={"mmkernels histogram, listed": listed, "mmkernels best_fit": partial(plan_with, "best_fit")},
    check=check_plan,
    figures=figures_of_plan,
    baseline=("mmkernels best_fit",),
    work=lambda p: Work(items=p["n"]),
    memory=False,
    backends=False,
)

IMAGES = Case(
    name="plan with image caps",
    full=[{"lengths": name, "n": 20_000, "images": True} for name in LENGTHS if not name.startswith("navit")],
    quick=[{"lengths": "obelics@8192", "n": 2000, "images": True}],
    setup=setup,
    ours=partial(plan_with, "auto"),
    others={f"mmkernels {name}": partial(plan_with, name) for name in ("best_fit", "subset_sum", "next_fit")},
    check=check_plan,
    figures=figures_of_plan,
    baseline=(),
    work=lambda p: Work(items=p["n"]),
    memory=False,
    backends=False,
)

# Ranks


def setup_ranks(p: Params, device: torch.device) -> Inputs:
    samples = samples_like(p["lengths"], p["n"])
    squares = samples.vision**2 // np.maximum(samples.images, 1)
    vision = EncoderCost.transformer(1152, 27, tokens=samples.vision, pairs=squares)
    language = EncoderCost.transformer(4096, 32, gated=True, causal=True, feed_forward=14336)
    cost = {"default": AttentionCost(), "joint": AttentionCost(vision, language)}[p["cost"]]
    plan = plan_packing(samples.lengths, samples.capacity, images=samples.images)
    return {"plan": plan, "cost": cost, "ranks": p["W"]}


def balance(inputs: Inputs, backend: str | None = None) -> tuple[RankSchedule]:
    return (balance_ranks(inputs["plan"], inputs["ranks"], cost=inputs["cost"]),)


def in_turn(inputs: Inputs) -> tuple[Any]:
    costs = inputs["cost"].of_packs(inputs["plan"])
    return (np.pad(costs, (0, -len(costs) % inputs["ranks"])).reshape(-1, inputs["ranks"]),)


def check_ranks(name: str, outputs: Sequence[Any], inputs: Inputs) -> None:
    if isinstance(outputs[0], RankSchedule):
        dealt = np.sort(outputs[0].packs[outputs[0].packs >= 0])
        assert np.array_equal(dealt, np.arange(inputs["plan"].num_packs)), f"{name}: not each pack once"


def figures_of_ranks(outputs: Sequence[Any], inputs: Inputs) -> dict[str, float]:
    ranks = outputs[0].costs.sum(2) if isinstance(outputs[0], RankSchedule) else outputs[0]
    return {"max / mean": float(ranks.max(1).sum() / ranks.mean(1).sum())}


RANKS = Case(
    name="balance",
    full=[
        {"lengths": name, "n": 200_000 if name in ("caption@4096", "navit@4096") else 100_000, "W": 64, "cost": cost}
        for name in ("caption@4096", "navit@1024", "obelics@8192", "qwen2vl@16384")
        for cost in ("default", "joint")
    ],
    quick=[{"lengths": "qwen2vl@16384", "n": 2000, "W": 4, "cost": "joint"}],
    setup=setup_ranks,
    ours=balance,
    others={"in turn": in_turn},
    check=check_ranks,
    figures=figures_of_ranks,
    baseline=(),
    work=lambda p: Work(items=p["n"]),
    memory=False,
    backends=False,
)


def cases(settings: Settings) -> list[Case]:
    return [PLAN, COUNTS, IMAGES, RANKS]
