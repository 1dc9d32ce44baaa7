"""Packing problems, checks of a plan, and the optimum by exhaustive search."""

import numpy as np
import pytest
from hypothesis import strategies as st

from mmkernels import PackingPlan
from mmkernels.runtime import native

needs_native = pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))

STRATEGIES = ("auto", "best_fit", "subset_sum", "histogram", "next_fit")
NO_CAP = 2**63 - 1


def check(plan: PackingPlan) -> None:
    """Every item exactly once or dropped, no pack above its caps or empty, and the figures that a plain loop finds."""
    lengths, images = plan.lengths.tolist(), None if plan.images is None else plan.images.tolist()
    assert plan.offsets.dtype == plan.items.dtype == np.int64
    assert plan.offsets[0] == 0
    assert plan.offsets[-1] == len(plan.items)
    assert sorted([*plan.items.tolist(), *plan.dropped.tolist()]) == list(range(len(lengths)))
    room = 0
    for number, pack in enumerate(plan):
        tokens, pictures = sum(lengths[i] for i in pack), sum(images[i] for i in pack) if images else 0
        room += max(plan.capacity, tokens)
        assert len(pack) > 0
        assert (plan.pack_lengths[number], plan.pack_images[number]) == (tokens, pictures)
        if number in plan.oversize_packs:
            assert len(pack) == 1
            assert tokens > plan.capacity or pictures > plan.max_images
            continue
        assert tokens <= plan.capacity
        assert plan.max_images is None or pictures <= plan.max_images
        assert plan.max_samples is None or len(pack) <= plan.max_samples
    assert plan.lower_bound <= plan.num_packs
    assert plan.efficiency == (sum(plan.pack_lengths.tolist()) / room if room else 1.0)


def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "why_absent", lambda: "taken away by a test")


@st.composite
def problems(draw, most_items: int = 60, capacities=None):
    """(lengths, images or None, capacity, max_images, max_samples), each item within the caps."""
    if capacities is None:
        capacities = st.one_of(st.integers(1, 40), st.integers(1, 5000), st.just(2**40))
    capacity = draw(capacities)
    lengths = draw(st.lists(st.integers(0, capacity), max_size=most_items))
    max_samples = draw(st.one_of(st.none(), st.integers(1, 6)))
    max_images = draw(st.one_of(st.none(), st.integers(1, 5), st.just(2**29)))
    images = (
        draw(st.lists(st.integers(0, max_images), min_size=len(lengths), max_size=len(lengths))) if max_images else None
    )
    return lengths, images, capacity, max_images, max_samples


def options_of(problem, strategy: str, lookahead: int = 128) -> dict:
    """The options that the call accepts: `lookahead` is an error without subset sum."""
    _, images, capacity, max_images, max_samples = problem
    options = {"strategy": strategy, "images": images, "max_images": max_images, "max_samples": max_samples}
    if strategy == "subset_sum" or (strategy == "auto" and capacity <= 2**24):
        options["lookahead"] = lookahead
    return options


def optimum(problem) -> int:
    """Fewest packs by exhaustive search: each item goes into an existing pack or a new one."""
    lengths, images, capacity, max_images, max_samples = problem
    images = images or [0] * len(lengths)
    best = len(lengths)

    def place(i: int, packs: list[tuple[int, int, int]]) -> None:
        nonlocal best
        if len(packs) >= best:
            return
        if i == len(lengths):
            best = len(packs)
            return
        for p, (tokens, pictures, count) in enumerate(packs):
            grown = tokens + lengths[i], pictures + images[i], count + 1
            if grown[0] <= capacity and grown[1] <= (max_images or NO_CAP) and grown[2] <= (max_samples or NO_CAP):
                place(i + 1, [*packs[:p], grown, *packs[p + 1 :]])
        place(i + 1, [*packs, (lengths[i], images[i], 1)])

    if lengths:
        place(0, [])
    return best
