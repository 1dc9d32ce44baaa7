"""How good the captions are that a next-token objective writes, and what of it is owed to what they describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels.pretrain.generate import context_of, go_on, writer
from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.caption_scores import NEEDS, SCORES, CaptionScores
from mmkernels.pretrain.metrics.constant_caption import constant_of, references_of
from mmkernels.pretrain.metrics.guessing import of_others
from mmkernels.pretrain.tokenizer import EOS

__all__ = ["Captioning", "Written"]


class Written(NamedTuple):
    """Captions of n samples."""

    items: list[int]  # numbers of the samples
    concepts: list[int]
    references: list[tuple[str, ...]]  # all captions of each
    texts: list[str]
    cut: list[bool]  # whether a text was cut before its end
    blind: list[str]  # written without what is described; empty, as the next: not asked for
    misled: list[str | None]  # written with that of another concept's sample; None: the batch has no other concept


@dataclass(frozen=True)
class Captioning:
    """Captions of held-out samples, written token by token, against all of their true ones: CIDEr-D, ROUGE-L and
    BLEU-4. Chance is the best constant caption: of training captions, that with the highest CIDEr-D for others. Beside
    each there is a figure of captions written without what is described, and one with that of another sample, the next
    one of another concept in the held-out batch; samples of a batch of one concept take no part in the latter."""

    objective: str = ""
    """Name of the objective, a `NextToken`."""
    stream: str = "image"
    """The stream that the captions describe."""
    scores: tuple[str, ...] = SCORES
    """Some of CIDEr, ROUGE-L and BLEU-4; the latter two need the packages of mmkernels[evaluate]."""
    most_tokens: int = 32
    """Longer captions are cut."""
    limit: int = 128
    """Most samples of a held-out set, evenly spaced."""

    def __post_init__(self) -> None:
        for name in ("most_tokens", "limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.scores or not set(self.scores) <= set(SCORES):
            raise ValueError(f"scores: expected some of {', '.join(SCORES)}, got {self.scores!r}")

    @property
    def needs(self) -> tuple[str, ...]:
        """Packages, by import name."""
        return tuple(NEEDS[score] for score in self.scores if score in NEEDS)

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = self.write(model, held_out)
        if not found.items:
            return []
        constant = constant_of(held_out, self._field(model, held_out))
        scored = CaptionScores(found.references, constant, found.concepts, self.scores)
        before, figures = f"{self.objective}: ", []
        for way, texts in {"": found.texts, f" without {self.stream}": found.blind}.items():
            figures += scored.figures(texts, before, way, headline="" if way else self.scores[0])
        misled = {i: text for i, text in enumerate(found.misled) if text is not None}
        if 0 < len(misled) < len(found.texts):
            references, concepts = [found.references[i] for i in misled], [found.concepts[i] for i in misled]
            scored = CaptionScores(references, constant, concepts, self.scores)
        if misled:
            figures += scored.figures(list(misled.values()), before, f" of another {self.stream}")
        cut, clusters = np.array(found.cut), np.array(found.concepts)
        name = f"{self.objective}: captions cut at {self.most_tokens} tokens"
        return [*figures, Figure.of_each(name, cut, clusters=clusters, higher_is_better=False)]

    def write(self, model: Any, held_out: HeldOut, count: int | None = None, ablations: bool = True) -> Written:
        """The captions of held-out samples that have both a caption and what it describes.

        Args:
            model: in evaluation mode, without gradients.
            held_out: the samples.
            count: of samples; None: `limit`.
            ablations: write the blind and the misled ones too.
        """
        limits = [each for each in (count or self.limit, held_out.limit) if each is not None]
        field, decode = self._field(model, held_out), held_out.collator.tokenizer.decode
        found = Written([], [], [], [], [], [], [])
        for batch in replace(held_out, limit=min(limits)).batches():
            true = [references_of(held_out.source.peek(number).get(field)) for number in batch.numbers]
            context = context_of(model, batch, self.objective)
            if self.stream not in context:
                raise ValueError(f"stream: expected one that is read ({', '.join(context)}), got {self.stream!r}")
            lengths = context[self.stream].cu_seqlens.diff().tolist()
            withheld = self.stream in held_out.collator.without
            kept = [i for i, texts in enumerate(true) if texts and (lengths[i] or withheld)]
            rows = torch.tensor(kept, dtype=torch.int64, device=held_out.device)
            context = {name: tokens.take(rows) for name, tokens in context.items()}
            ids = self._written(model, context, len(kept))
            found.items.extend(batch.numbers[i] for i in kept)
            concepts = batch.concepts[rows]
            found.concepts.extend(concepts.tolist())
            found.references.extend(true[i] for i in kept)
            found.texts.extend(map(decode, ids))
            found.cut.extend(each[-1] != EOS for each in ids)
            if ablations:
                blind, misled = self._ablated(model, context, ids, of_others(concepts))
                found.blind.extend(map(decode, blind))
                found.misled.extend(None if each is None else decode(each) for each in misled)
        return found

    def _ablated(
        self, model: Any, context: dict[str, Any], ids: Sequence[list[int]], others: Tensor | None
    ) -> tuple[list[list[int]], Sequence[list[int] | None]]:
        """Without what is described, and with that of others, int64 [n], if there are any."""
        n, lost = len(ids), context[self.stream]
        if len(context) == 1:  # nothing else is read, so the former are all alike, and the latter are those of others
            blind = self._written(model, {self.stream: lost.between(0, min(n, 1)).emptied()}, min(n, 1)) * n
            return blind, [None] * n if others is None else [ids[i] for i in others.tolist()]
        blind = self._written(model, {**context, self.stream: lost.emptied()}, n)
        if others is None:
            return blind, [None] * n
        return blind, self._written(model, {**context, self.stream: lost.take(others)}, n)

    def _written(self, model: Any, context: dict[str, Any], n: int) -> list[list[int]]:
        return go_on(model, self.objective, context, [[]] * n, self.most_tokens)

    def _field(self, model: Any, held_out: HeldOut) -> str:
        """That has the true captions."""
        stream = writer(model, self.objective).stream
        return held_out.collator.streams[stream].field or stream
