"""Which region of an image a phrase is about.

Source of the task: Plummer et al. 2015 (Flickr30k Entities, arXiv:1505.04870).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmkernels.pretrain.data.base import Text
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.pairs import pairs_of
from mmkernels.pretrain.tokens import Layout, Tokens

__all__ = ["Grounding"]


@dataclass(frozen=True)
class Grounding:
    """Share of phrases, one for each kind of object in an image, for which a matching objective prefers a region that
    shows it, when each region is seen alone. Chance is a region drawn blindly. Images of one kind are left out. A
    region whose kind the training data lacks is not asked about, and never right."""

    objective: str = "matching"
    """A `Matching`."""
    text: str = "text"
    """The stream of the phrases."""
    regions: str = "regions"
    """The stream of the regions."""
    template: str = "a picture of a {}"
    """The phrase, with the name of the object in place of {}."""
    label: str = "tag"
    """Label of the data that has the names."""
    limit: int = 128
    """Most images, evenly spaced."""

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template: expected a phrase with one {{}}, got {self.template!r}")
        if self.limit < 1:
            raise ValueError(f"limit: expected at least 1, got {self.limit}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        streams = held_out.collator.streams
        fields = [streams[name].field or name for name in (self.text, self.regions)]
        names, read = held_out.train.classes[self.label], held_out.source.read_some(held_out.items(self.limit))
        samples, wanted, images = [], [], []
        for sample, item in zip(read.samples, read.items, strict=True):
            value: Any = sample.values.get(fields[1])
            kinds = [] if value is None else sorted({tag for tag in value.tags.tolist() if tag >= 0})  # -100: unknown
            for kind in kinds if len(kinds) > 1 else ():
                phrase = Text((self.template.replace("{}", names[kind]),))
                samples.append(replace(sample, values={fields[0]: phrase, fields[1]: value}))
                wanted.append(value.tags == kind)
                images.append(item)
        found = pairs_of(model, held_out, self.objective, self.limit, samples)
        if found is None:
            return []
        whole = found.chunk.whole.tokens(self.regions)
        n = len(whole.x)  # each region becomes a sample of its own
        ends = torch.arange(n + 1, dtype=torch.int32, device=whole.x.device)
        alone = Tokens(whole.x, Layout(ends, tuple(range(n + 1))))
        pairing = {self.text: whole.layout.owners(), self.regions: torch.arange(n, device=whole.x.device)}
        scores = found.scores(pairing, {self.regions: alone}).cpu().numpy()
        right, chance = [], []
        for own, these in zip(wanted, np.split(scores, np.cumsum([len(each) for each in wanted])[:-1]), strict=True):
            best = these == these.max()
            right.append(float(best.any() and own[best].all()))  # a tie with a wrong region, or NaN, is wrong
            chance.append(own.mean())
        name, concepts = f"{self.text} → {self.regions}: grounding", held_out.source.concepts[images]
        return [Figure.of_each(name, np.array(right), float(np.mean(chance)), clusters=concepts, headline=True)]
