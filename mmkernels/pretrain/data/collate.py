"""Samples to a `Batch`: values, views, tokens, packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Batch, Piece
from mmkernels.pretrain.candidates import SWAPPED_BY, Candidates
from mmkernels.pretrain.data.base import Sample, Source
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Collator", "Mode", "Others"]


class Others:
    """The whole batch, of which what is collated is a part: what a view that swaps may take.

    Args:
        source: the training data.
        items: int64 [B]: the numbers of the batch's samples.
        present: stream -> bool [B]: the samples that have it; empty: other ranks have no part of the batch, and what is
            not collated cannot be read.
    """

    def __init__(self, source: Source, items: np.ndarray, present: Mapping[str, np.ndarray]) -> None:
        self.source, self.items, self.present = source, items, present

    @property
    def concepts(self) -> np.ndarray:
        """int64 [B]."""
        found: np.ndarray = self.source.concepts[self.items]
        return found

    def sample(self, stream: str, place: int) -> Sample | None:
        """One that is not collated here; None if it lacks the stream or cannot be read."""
        if not self.present or not self.present[stream][place]:
            return None
        read = self.source.read_some([int(self.items[place])])
        return read.samples[0] if read.samples else None


# train: all views; loss: those that make the task (masks), drawn once and for all; plain: none.
Mode = Literal["train", "loss", "plain"]


class Collator:
    """Build the batches of some streams.

    Args:
        streams: by name.
        tokenizer: of the run.
        label_fields: fields whose values are labels.
        seed: of the views.
        without: streams that every sample lacks.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        tokenizer: TextTokenizer,
        label_fields: Sequence[str] = (),
        *,
        seed: int = 0,
        without: Sequence[str] = (),
    ) -> None:
        self.streams, self.tokenizer, self.label_fields = dict(streams), tokenizer, tuple(label_fields)
        self.seed, self.without = seed, frozenset(without)
        for name, stream in self.streams.items():
            for view in stream.views:
                view.check(name, self.streams)
        self.views = {name: [v.fitted(s.encoder, tokenizer) for v in s.views] for name, s in self.streams.items()}

    def __call__(
        self,
        samples: Sequence[Sample],
        items: Sequence[int],
        step: int = 0,
        mode: Mode = "train",
        objective: str = "",
        used: frozenset[str] | None = None,
        others: Others | None = None,
    ) -> Batch:
        """A batch; every draw depends on the seed, the step, and the number of its sample in the data set alone.

        Args:
            samples: at least one.
            items: their numbers in the data set.
            step: of the run.
            mode: which views apply.
            objective: the only one in use, for mode loss; empty: all are.
            used: those in use, for mode train; None: all are.
            others: the whole batch, if this may be a part of it.
        """
        labels = {
            name: np.array([sample.values.get(name, -100) for sample in samples], np.int64)
            for name in self.label_fields
        }
        labels["concept"] = np.array([sample.concept for sample in samples], np.int64)
        numbers = np.asarray(items, np.int64)
        if mode != "train":
            used = frozenset({objective}) if objective else None
        streams = {
            name: self._packed(name, samples, numbers, step, mode, used, labels, others) for name in self.streams
        }
        concepts = torch.from_numpy(labels.pop("concept"))
        labels.pop(SWAPPED_BY, None)
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
        found: np.ndarray = self.stream_lengths(source, range(len(source))).sum(1)
        return found

    def stream_lengths(self, source: Source, items: Sequence[int] | np.ndarray) -> np.ndarray:
        """int64 [n, streams]: at most how many tokens some samples of a data set have in each stream."""
        found = np.zeros((len(items), len(self.streams)), np.int64)
        for row, item in zip(found, items, strict=True):
            values = source.peek(int(item))
            for i, (name, stream) in enumerate(self.streams.items()):
                if name in self.without:
                    continue
                row[i] = stream.encoder.length(values.get(stream.field or name), self.tokenizer)
                for view in self.views[name]:
                    row[i] = view.length(int(row[i]))
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
        others: Others | None = None,
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

        def changed(view: Any, what: list[Any], of: np.ndarray, known: dict[str, np.ndarray], *more: Any) -> list[Any]:
            purpose = f"{field}/{type(view).__name__}/{view.salt}"
            return list(view(what, Draws(self.seed, step if mode == "train" else 0, purpose, of), known, *more))

        before: list[Any] = []
        swapped = False
        for view in (view for view in views if not view.of_tokens):
            more = []
            if view.swaps:

                def alone(sample: Sample, number: int, before: Sequence[Any] = tuple(before)) -> Any:
                    """A sample's own value, as the view finds it."""
                    one, of = [sample.values.get(field)], np.array([number], np.int64)
                    its = {label: np.array([sample.values.get(label, -100)], np.int64) for label in labels}
                    its["concept"] = np.array([sample.concept], np.int64)
                    for each in before if one[0] is not None else ():
                        one = changed(each, one, of, its)
                    return one[0]

                own = {} if swapped else dict(zip(numbers.tolist(), values, strict=True))
                more, swapped = [self._candidates(name, samples, numbers, others, own, alone)], True
            values = changed(view, values, numbers, labels, *more)
            before += [] if view.swaps else [view]
        pieces: list[Piece] = stream.encoder.prepare(values, self.tokenizer)
        for view in (view for view in views if view.of_tokens):
            pieces = changed(view, pieces, numbers, labels)
        labelled = any(piece.labels is not None for piece in pieces)
        empty = torch.zeros(0, dtype=torch.int64)
        return PackedBatch.from_samples(
            [piece.tokens for piece in pieces],
            labels=[empty if p.labels is None else p.labels for p in pieces] if labelled else None,
            mrope=any(isinstance(piece.tokens, list) for piece in pieces),
        )

    def _candidates(
        self,
        name: str,
        samples: Sequence[Sample],
        numbers: np.ndarray,
        others: Others | None,
        own: Mapping[int, Any],
        alone: Callable[[Sample, int], Any],
    ) -> Candidates:
        """The own values of a stream that a view may give to other samples.

        Args:
            name: of the stream.
            samples, numbers: that are collated.
            others: the whole batch; None: these are.
            own: values as the view finds them, by number, of those whose value is at hand.
            alone: (a sample, its number) -> that of another.
        """
        items = numbers if others is None else others.items
        here = {int(number): sample for number, sample in zip(numbers, samples, strict=True)}

        def value(place: int) -> Any:
            number = int(items[place])
            if number in own:
                return own[number]
            sample = here.get(number)
            if sample is None and others is not None:
                sample = others.sample(name, place)
            return None if sample is None or name in self.without else alone(sample, number)

        concepts = np.array([sample.concept for sample in samples], np.int64) if others is None else others.concepts
        return Candidates(concepts, value)
