"""Masked regions: the crop that was hidden, and the classes or the pixels that the model guesses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.objectives.masked_regions import MaskedPixels, MaskedTags, masked
from mmkernels.pretrain.pages import data_url
from mmkernels.pretrain.region_columns import CROP, HIDDEN
from mmkernels.pretrain.report.section import (
    Guess,
    Run,
    Section,
    first_found,
    guesses,
    objectives_of,
    some,
    spread_over,
    titled,
)
from mmkernels.pretrain.report.shown import laid_out, of_crops, regions_in

__all__ = ["masked_regions"]

_REGIONS = 12
_KINDS = (MaskedTags, MaskedPixels)


@dataclass(frozen=True)
class MaskedRegion:
    picture: str  # the regions of the image, hidden ones grey
    crop: str  # that was hidden
    tag: str
    guesses: list[Guess]  # where the model chooses a class
    painted: str | None  # where it paints


def masked_regions(run: Run) -> list[Section]:
    sections = []
    for name, objective in objectives_of(run, _KINDS):
        if shown := first_found(run, partial(_regions, run, name, objective)):
            held_out, regions = shown
            what = "the likeliest classes" if isinstance(objective, MaskedTags) else "what the model paints there"
            about = f"Split {held_out.name}: the image with hidden regions in grey, one of these, and {what}."
            sections.append(Section("regions", titled("Masked regions", name, run, _KINDS), about, regions))
    return sections


def _regions(run: Run, name: str, objective: MaskedTags | MaskedPixels, held_out: HeldOut) -> list[MaskedRegion]:
    batch = some(held_out, 2 * _REGIONS, "loss", name)
    if batch is None:
        return []
    chunk, packed = run.trained.whole(batch, name), batch[objective.stream]
    rows, tags = masked(chunk, objective.stream)
    of, crops = objective.owners(chunk).tolist(), of_crops(packed.tokens[rows, CROP])
    names = held_out.train.classes.get(run.recipe.objectives[name].tags, ())
    chosen = isinstance(objective, MaskedTags)
    predicted = objective.logits(chunk)[0] if isinstance(objective, MaskedTags) else objective.vectors(chunk)[0]
    painted = None if chosen else of_crops(predicted)
    hidden = torch.nonzero(packed.tokens[rows, HIDDEN] > 0).flatten().tolist()
    first = {of[n]: n for n in reversed(hidden)}  # of each sample
    return [
        MaskedRegion(
            data_url(laid_out(regions_in(packed, sample))),
            data_url(crops[n]),
            names[tags[n]] if names else "",
            guesses(predicted[n], int(tags[n]), names.__getitem__) if chosen else [],
            None if painted is None else data_url(painted[n]),
        )
        for sample, n in spread_over(sorted(first.items()), _REGIONS)
    ]
