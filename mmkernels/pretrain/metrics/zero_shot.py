"""Zero-shot classification: the class whose name, in some phrases, is nearest to an image.

Source: Radford et al. 2021 (arXiv:2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import topk_similar
from mmkernels.pretrain.data.base import Sample, Text
from mmkernels.pretrain.metrics.base import Each, Figure, HeldOut

__all__ = ["ZeroShot"]

_NAMES = 256  # encoded at a time


@dataclass(frozen=True)
class ZeroShot:
    """Share of samples whose own class is the nearest, by the mean embedding of its name in several phrases. Chance is
    that of the most frequent class. The classes are those that occur in the held-out set."""

    stream: str = "image"
    """The stream to classify."""
    text: str = "text"
    """The stream that reads the names."""
    label: str = ""
    """Label field of the data; empty: the concept, whose name is its first text."""
    templates: tuple[str, ...] = ("{}", "a picture of {}", "an image of a {}")
    """Phrases, with the name in place of {}."""

    def __post_init__(self) -> None:
        if not self.templates or any(each.count("{}") != 1 for each in self.templates):
            raise ValueError(f"templates: expected phrases with one {{}} each, got {self.templates}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        each = self.each(model, held_out)
        return [] if each is None else [each.figure(headline=True)]

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        """Whether each sample is recognised."""
        rows, classes, items = [], [], []
        for batch in held_out.batches():
            labels = batch.labels[self.label] if self.label else batch.concepts
            have = (batch[self.stream].cu_seqlens.diff() > 0) & (labels >= 0)
            rows.append(model.encoder(self.stream).embeddings(batch[self.stream])[have].float())
            classes += labels[have].tolist()
            items += [number for number, kept in zip(batch.numbers, have.tolist(), strict=True) if kept]
        if not items:
            return None
        known, targets = np.unique(np.array(classes), return_inverse=True)
        names = self._names(held_out, known.tolist(), classes, items)
        kept = [i for i, name in enumerate(names) if name is not None]
        if len(kept) < 2:
            return None
        keys = self.classifier(model, held_out, [name for name in names if name is not None])
        guesses = np.array([*kept, -1])[nearest_key(torch.cat(rows), keys).cpu().numpy()]
        named = np.isin(targets, kept)
        what = self.label or "concept"
        of, numbers = targets.reshape(-1)[named], np.array(items)[named]
        concepts = held_out.source.concepts[numbers]
        return Each(f"{self.stream}: {what} by its name", guesses[named] == of, numbers, concepts, of)

    def _names(
        self, held_out: HeldOut, known: Sequence[int], classes: Sequence[int], items: Sequence[int]
    ) -> list[str | None]:
        """Of some classes; None for one whose samples have no text."""
        if self.label:
            return [held_out.source.classes[self.label][each] for each in known]
        field = held_out.collator.streams[self.text].field or self.text
        first = dict(zip(reversed(classes), reversed(items), strict=True))
        values = [held_out.source.peek(first[each]).get(field) for each in known]
        return [value.captions[0] if isinstance(value, Text) else value for value in values]

    def classifier(self, model: Any, held_out: HeldOut, names: Sequence[str]) -> Tensor:
        """Unit vectors float32 [n, E] of n names."""
        field = held_out.collator.streams[self.text].field or self.text
        total: Any = 0.0
        for template in self.templates:
            phrases = [template.replace("{}", name) for name in names]
            found = []
            for first in range(0, len(phrases), _NAMES):
                some = [Sample({field: Text((phrase,))}, 0, phrase) for phrase in phrases[first : first + _NAMES]]
                batch = held_out.collator(some, range(len(some)), mode="plain").to(held_out.device)
                found.append(model.encoder(self.text).embeddings(batch[self.text]).float())
            total = total + torch.cat(found)
        return F.normalize(total, dim=1)


def nearest_key(queries: Tensor, keys: Tensor) -> Tensor:
    """int64 [N]: which of at least two keys [M, E] is nearest to each of [N, E]; -1 for a tie, and beside a NaN."""
    scores, nearest = topk_similar(queries, keys, 2)
    known = queries.isfinite().all(1) & keys.isfinite().all()
    return torch.where(known & (scores[:, 0] > scores[:, 1]), nearest[:, 0], -1)
