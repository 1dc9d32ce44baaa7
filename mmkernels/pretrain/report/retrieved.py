"""Retrieval: the nearest answers of some held-out queries, both ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from mmkernels.pretrain.metrics import HeldOut, Retrieval
from mmkernels.pretrain.metrics.retrieval import embed
from mmkernels.pretrain.report.figures import about
from mmkernels.pretrain.report.section import Run, Section
from mmkernels.pretrain.report.shown import Item, item_of, spread

__all__ = ["retrieved"]

_QUERIES = (12, 9)  # of each way, and k answers each
_K = 5
_SETS = 3  # whose examples are shown


@dataclass(frozen=True)
class Answer:
    item: Item
    similarity: float
    right: bool


@dataclass(frozen=True)
class Query:
    item: Item
    rank: int  # of its first right answer, from 1
    found: list[Answer]


def retrieved(run: Run) -> list[Section]:
    """Of every metric that retrieves, on the first held-out sets: queries spread evenly, hits and misses alike."""
    sections, metrics = [], [metric for metric in run.recipe.metrics if isinstance(metric, Retrieval)]
    for metric in metrics:
        every = ((name, ways) for name, held_out in run.held_out.items() if (ways := _ways(run, metric, held_out)))
        shown = list(islice(every, _SETS + 1))
        more = f" The first {_SETS} of the splits are shown." if len(shown) > _SETS else ""
        for name, ways in shown[:_SETS]:
            which = f"{metric.a} and {metric.b}, split" if len(metrics) > 1 else "Split"
            if metric.through and any({m.a, m.b} == {metric.a, metric.b} for m in metrics if m != metric):
                which = f"through {metric.through}: {which}"
            title = f"{which[0].upper()}{which[1:]} {name}" + (f": {about(name)}" if about(name) else "")
            sections.append(Section("retrieved", title, _ABOUT + more, ways))
    return sections


_ABOUT = (
    "Queries spread evenly over the held-out set, hits and misses alike. Green is the right answer; the rank is its "
    "position."
)


def _ways(run: Run, metric: Retrieval, held_out: HeldOut) -> list[tuple[str, list[Query]]]:
    """(way, queries) for both ways."""
    space = embed(run.trained, held_out, metric.a, metric.b, metric.through)
    if not len(space.targets):
        return []
    show_a, show_b = (
        _shower(held_out, run.recipe.streams[stream].field or stream, items)
        for stream, items in ((metric.a, space.items_a), (metric.b, space.items_b))
    )
    numbers = torch.arange(len(space.b), device=space.targets.device)
    of_a = [
        _query(show_a(i), space.b @ space.a[i], space.targets[i] == numbers, show_b)
        for i in spread(len(space.a), _QUERIES[0])
    ]
    of_b = [
        _query(show_b(i), space.a @ space.b[i], space.targets == i, show_a) for i in spread(len(space.b), _QUERIES[1])
    ]
    return list(zip(metric.ways, (of_a, of_b), strict=True))


def _shower(held_out: HeldOut, field: str, items: list[int]) -> Callable[[int], Item]:
    """How the i-th of some samples shows its value of a field."""
    return lambda i: item_of(held_out.source[items[i]], field)


def _query(item: Item, scores: Tensor, right: Tensor, show: Callable[[int], Item]) -> Query:
    best = scores.masked_fill(~right, -torch.inf).max()
    nearest = scores.topk(min(_K, len(scores))).indices.tolist()
    found = [Answer(show(j), scores[j].item(), bool(right[j])) for j in nearest]
    before = ~right & ~(scores < best)  # as in the figures, a tie counts as wrong, and so does what is beside a NaN
    return Query(item, 1 + int(before.sum()), found)
