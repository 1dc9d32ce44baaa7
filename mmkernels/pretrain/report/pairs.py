"""Matching: how likely each of a few samples' streams belong together, every one with every other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.metrics.pairs import Pairs
from mmkernels.pretrain.objectives.matching import MatchingLoss
from mmkernels.pretrain.report.section import Run, Section, first_found, objectives_of, some, spread_over, titled
from mmkernels.pretrain.report.shown import Item, item_of

__all__ = ["matched_pairs"]

_SAMPLES = 5


@dataclass(frozen=True)
class PairTable:
    """A table: a column for each value of the one stream, a row for each of the other."""

    columns: list[Item]
    rows: list[Item]
    likely: list[list[float]]  # [row][column]


def matched_pairs(run: Run) -> list[Section]:
    sections = []
    for name, objective in objectives_of(run, MatchingLoss):
        if shown := first_found(run, partial(_pairs, run, name, objective)):
            held_out, found = shown
            about = f"Split {held_out.name}: how likely they belong together, in %. Those in the frames do."
            sections.append(Section("pairs", titled("Matching", name, run, MatchingLoss), about, found))
    return sections


def _pairs(run: Run, name: str, objective: MatchingLoss, held_out: HeldOut) -> PairTable | None:
    a, b = objective.part.a, objective.part.b
    batch = some(held_out, 3 * _SAMPLES)
    if batch is None:
        return None
    have = (batch[a].cu_seqlens.diff() > 0) & (batch[b].cu_seqlens.diff() > 0)
    concepts = {int(batch.concepts[i]): i for i in reversed(torch.nonzero(have).flatten().tolist())}
    chosen = spread_over(sorted(concepts.values()), _SAMPLES)
    if not chosen:
        return None
    of_b, of_a = (
        each.flatten() for each in torch.meshgrid(*2 * [have.new_tensor(chosen, dtype=torch.int64)], indexing="ij")
    )
    pairs = Pairs(run.trained, objective, run.trained.whole(batch, name))
    # As in training: what else is fused stays with the one of the two that no view swaps.
    swapped = any(getattr(view, "swaps", False) for view in run.recipe.streams[a].views)
    streams = pairs.fused(a, b)
    likely = pairs.scores({**dict.fromkeys(streams, of_b if swapped else of_a), a: of_a, b: of_b}).sigmoid()
    fields = [run.recipe.streams[stream].field or stream for stream in (a, b)]
    columns, rows = (
        [item_of(held_out.source[batch.numbers[i]], field) for i in chosen] for field in fields
    )  # fmt: skip
    return PairTable(columns, rows, likely.reshape(len(chosen), len(chosen)).tolist())
