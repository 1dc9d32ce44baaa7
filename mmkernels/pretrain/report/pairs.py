"""Matching: how likely each of a few samples' streams belong together, every one with every other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.metrics.pairs import Pairs
from mmkernels.pretrain.objectives.matching import MatchingLoss
from mmkernels.pretrain.report.section import Run, Section, first_set, objectives_of, some, titled
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
    held_out, sections = first_set(run), []
    for name, objective in objectives_of(run, MatchingLoss) if held_out is not None else ():
        assert held_out is not None
        if found := _pairs(run, held_out, name, objective):
            about = f"Split {held_out.name}: how likely they belong together, in %. Those in the frames do."
            sections.append(Section("pairs", titled("Matching", name, run, MatchingLoss), about, found))
    return sections


def _pairs(run: Run, held_out: HeldOut, name: str, objective: MatchingLoss) -> PairTable | None:
    a, b = objective.part.a, objective.part.b
    batch = some(held_out, 3 * _SAMPLES)
    if batch is None:
        return None
    have = (batch[a].cu_seqlens.diff() > 0) & (batch[b].cu_seqlens.diff() > 0)
    concepts = {int(batch.concepts[i]): i for i in reversed(torch.nonzero(have).flatten().tolist())}
    chosen = sorted(concepts.values())[:_SAMPLES]
    if not chosen:
        return None
    of_b, of_a = (
        each.flatten() for each in torch.meshgrid(*2 * [have.new_tensor(chosen, dtype=torch.int64)], indexing="ij")
    )
    pairs = Pairs(run.trained, objective, run.trained.whole(batch, name))
    streams = [a, b] if objective.part.negatives == "sampled" else pairs.fused(a, b)  # as in training
    likely = pairs.scores({**dict.fromkeys(streams, of_a), b: of_b}).sigmoid()
    fields = [run.recipe.streams[stream].field or stream for stream in (a, b)]
    columns, rows = (
        [item_of(held_out.source[batch.numbers[i]], field) for i in chosen] for field in fields
    )  # fmt: skip
    return PairTable(columns, rows, likely.reshape(len(chosen), len(chosen)).tolist())
