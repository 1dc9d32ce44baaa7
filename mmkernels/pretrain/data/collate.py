"""Samples to a `Batch`: values, views, tokens, packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Batch, Piece
from mmkernels.pretrain.data.base import Sample, Source
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Collator", "Mode"]

# train: all views; loss: those that make the task (masks), drawn once and for all; plain: none.
Mode = Literal["train", "loss", "plain"]


class Collator:
    """Build the batches of some streams.

    Args:
        streams: by name.
        tokenizer: of the run.
        label_fields: fields whose values are labels.
        seed: of the views.
        in_use: step -> the objectives in use, for views that belong to some of them.
        without: streams that every sample lacks.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        tokenizer: TextTokenizer,
        label_fields: Sequence[str] = (),
        *,
        seed: int = 0,
        in_use: Callable[[int], frozenset[str]] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        self.streams, self.tokenizer, self.label_fields = dict(streams), tokenizer, tuple(label_fields)
        self.seed, self.in_use, self.without = seed, in_use, frozenset(without)
        for name, stream in self.streams.items():
            for view in stream.views:
                view.check(name, self.streams)
        self.views = {name: [v.fitted(s.encoder, tokenizer) for v in s.views] for name, s in self.streams.items()}

    def __call__(
        self, samples: Sequence[Sample], items: Sequence[int], step: int = 0, mode: Mode = "train", objective: str = ""
    ) -> Batch:
        """A batch; every draw depends on the seed, the step, and the number of its sample in the data set alone.

        Args:
            samples: at least one.
            items: their numbers in the data set.
            step: of the run.
            mode: which views apply.
            objective: the only one in use, for mode loss; empty: all are.
        """
        labels = {
            name: np.array([sample.values.get(name, -100) for sample in samples], np.int64)
            for name in self.label_fields
        }
        labels["concept"] = np.array([sample.concept for sample in samples], np.int64)
        numbers = np.asarray(items, np.int64)
        used = frozenset({objective}) if objective else None
        if self.in_use is not None and mode == "train":
            used = self.in_use(step)
        streams = {name: self._packed(name, samples, numbers, step, mode, used, labels) for name in self.streams}
        concepts = torch.from_numpy(labels.pop("concept"))
        return Batch(
            streams,
            {name: torch.from_numpy(values) for name, values in labels.items()},
            concepts,
            [sample.name for sample in samples],
            numbers.tolist(),
            step,
        )

    def lengths(self, source: Source) -> np.ndarray:
        """int64 [n]: at most how many tokens each sample of a data set has, over all streams."""
        found = np.zeros(len(source), np.int64)
        for i in range(len(source)):
            values = source.peek(i)
            for name, stream in self.streams.items():
                if name in self.without:
                    continue
                length = stream.encoder.length(values.get(stream.field or name), self.tokenizer)
                for view in self.views[name]:
                    length = view.length(length)
                found[i] += length
        return found

    def packed(self, stream: str, values: Sequence[Mapping[str, Any]], items: Sequence[int], mode: Mode) -> PackedBatch:
        """One stream of some samples' values, as in a batch."""
        samples = [Sample(each, 0, "") for each in values]
        return self._packed(stream, samples, np.asarray(items, np.int64), 0, mode, None, {})

    def _packed(
        self,
        name: str,
        samples: Sequence[Sample],
        numbers: np.ndarray,
        step: int,
        mode: Mode,
        used: frozenset[str] | None,
        labels: dict[str, np.ndarray],
    ) -> PackedBatch:
        stream = self.streams[name]
        field = stream.field or name
        values: list[Any] = [None if name in self.without else sample.values.get(field) for sample in samples]
        views = [
            view
            for view in self.views[name]
            if (mode == "train" or (mode == "loss" and view.evaluated))
            and (used is None or not view.when or not used.isdisjoint(view.when))
        ]

        def changed(view: Any, what: list[Any]) -> list[Any]:
            purpose = f"{field}/{type(view).__name__}/{view.salt}"
            return list(view(what, Draws(self.seed, step if mode == "train" else 0, purpose, numbers), labels))

        for view in (view for view in views if not view.of_tokens):
            values = changed(view, values)
        pieces: list[Piece] = stream.encoder.prepare(values, self.tokenizer)
        for view in (view for view in views if view.of_tokens):
            pieces = changed(view, pieces)
        labelled = any(piece.labels is not None for piece in pieces)
        empty = torch.zeros(0, dtype=torch.int64)
        return PackedBatch.from_samples(
            [piece.tokens for piece in pieces],
            labels=[empty if p.labels is None else p.labels for p in pieces] if labelled else None,
            mrope=any(isinstance(piece.tokens, list) for piece in pieces),
        )
