"""Which measures fit a trained model and a data set: the tasks of `mmkernels evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import combinations
from typing import Any

from mmkernels.pretrain.data import Source, Text
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.metrics import (
    Ablation,
    Alignment,
    Captioning,
    Classified,
    Groups,
    LinearProbe,
    Matched,
    NearestNeighbours,
    Perplexity,
    Predictions,
    Reconstruction,
    Reranked,
    Retrieval,
    Shots,
    ZeroShot,
)
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.recipe import Recipe

__all__ = ["TASKS", "Subject", "group_labels", "measures"]

_SMALL = 20  # most classes of a label that makes groups
_WRITTEN = 500  # most texts that are written for a figure
_LOOKED_AT = 1000  # samples among which one with a field is sought
# What a metric is of; its other settings say how it is measured.
_OF = ("of", "objective", "stream", "a", "b", "text", "regions", "through", "label")


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    recipe: Recipe
    model: Model
    train: Source
    labels: tuple[str, ...]  # label fields to classify by
    groups: tuple[str, ...]  # label fields to compare the classes of

    def pairs(self) -> Iterator[tuple[str, str, str]]:
        """(a, b, through) of different fields whose embeddings are in one space: also those that no objective pairs."""
        fields = {name: stream.field or name for name, stream in self.recipe.streams.items()}
        shared: list[set[str]] = []
        for name, objective in self.recipe.objectives.items():
            both = tuple(getattr(objective, "compares", ()))
            if len(both) != 2 or fields[both[0]] == fields[both[1]]:
                continue
            if hasattr(self.model.objectives[name], "shared"):
                yield (*both, name)
                continue
            touched = [space for space in shared if not space.isdisjoint(both)]
            shared = [space for space in shared if space not in touched] + [set(both).union(*touched)]
        order = list(self.recipe.streams)
        for space in shared:
            for a, b in combinations(sorted(space, key=order.index), 2):
                if fields[a] != fields[b]:
                    yield a, b, ""

    def reads_text(self, stream: str) -> bool:
        """Whether the first sample that has its field, of evenly spaced ones, has a text there."""
        field = self.recipe.streams[stream].field or stream
        values = (self.train.peek(int(i)).get(field) for i in spaced(len(self.train), _LOOKED_AT))
        return isinstance(next((value for value in values if value is not None), None), Text | str)

    def objectives(self, method: str) -> list[str]:
        """Those that have a method."""
        return [name for name, each in self.model.objectives.items() if hasattr(each, method)]

    def encoded(self) -> list[str]:
        """One stream of each encoder with layers of its own."""
        own = [name for name in self.model.encoded if name == self.model.owner[name]]
        return [name for name in own if getattr(self.recipe.streams[name].encoder, "layers", 1)]


def group_labels(source: Source) -> list[str]:
    """Label fields with few classes."""
    return [name for name, classes in source.classes.items() if 1 < len(classes) <= _SMALL]


def _retrieval(of: Subject) -> Iterator[Any]:
    yield from (Retrieval(*pair) for pair in of.pairs())
    for name in of.objectives("scores"):
        part = of.recipe.objectives[name]
        if hasattr(part, "negatives"):
            yield Reranked(name) if part.negatives == "sampled" else Matched(name, part.a, part.b)


def _zero_shot(of: Subject) -> Iterator[Any]:
    for a, b, through in of.pairs():
        for stream, text in ((a, b), (b, a)):
            if not through and of.reads_text(text) and not of.reads_text(stream):
                yield from (ZeroShot(stream, text, label) for label in ("", *of.labels))


def _probes(kind: Any) -> Callable[[Subject], Iterator[Any]]:
    return lambda of: (kind(stream, label) for stream in of.encoded() for label in ("", *of.labels))


def _groups(of: Subject) -> Iterator[Any]:
    """Of what is retrieved, and of what is guessed of a sample, unless that is the group itself."""
    for label in of.groups:
        yield from (Groups(Retrieval(*pair), label) for pair in of.pairs())
        guessed = {name: getattr(part, "label", "") for name, part in of.recipe.objectives.items()}
        yield from (
            Groups(Predictions(name), label) for name in of.objectives("logits") if guessed[name] not in ("", label)
        )


def _ablation(of: Subject) -> Iterator[Any]:
    if of.recipe.fusion is None:
        return
    context = getattr(of.recipe.fusion, "context", "")
    for name in of.objectives("logits"):
        part = of.recipe.objectives[name]
        if not hasattr(part, "negatives"):  # whether two streams belong together cannot be asked without one of them
            own = getattr(part, "read", getattr(part, "stream", ""))
            streams = (context,) if context else of.model.encoded
            yield from (Ablation(name, stream) for stream in streams if stream != own)


def _captions(of: Subject) -> Iterator[Any]:
    """Of an objective that writes a text which the data has, from what is no text."""
    for name in of.objectives("following"):
        own = of.recipe.objectives[name].stream
        others = [stream for stream in of.model.encoded if stream != own]
        if of.reads_text(own) and not any(map(of.reads_text, others)):
            yield from (Captioning(name, stream, limit=_WRITTEN) for stream in others)


def _shots(of: Subject) -> Iterator[Any]:
    if hasattr(of.model.fusion, "shut"):
        yield from (Shots(name, limit=_WRITTEN) for name in of.objectives("following"))


TASKS: dict[str, Callable[[Subject], Iterator[Any]]] = {
    "retrieval": _retrieval,
    "zero-shot": _zero_shot,
    "alignment": lambda of: (Alignment(*pair) for pair in of.pairs()),
    "probe": _probes(LinearProbe),
    "neighbours": _probes(NearestNeighbours),
    "predictions": lambda of: map(Predictions, [*of.objectives("logits"), *of.objectives("vectors")]),
    "classes": lambda of: map(Classified, of.objectives("logits")),
    "groups": _groups,
    "perplexity": lambda of: map(Perplexity, [*of.objectives("followed"), *of.objectives("masked")]),
    "reconstruction": lambda of: map(Reconstruction, of.objectives("painted")),
    "ablation": _ablation,
    "captions": _captions,
    "shots": _shots,
}
"""Name -> the metrics that fit. Each has chance, or a trivial predictor, beside it."""


def measures(of: Subject, tasks: Sequence[str] = (), limit: int | None = None) -> list[Any]:
    """The metrics of some tasks; without any: those of the recipe first, then all that fit and measure something else.

    Args:
        of: what is measured.
        tasks: names of `TASKS`.
        limit: most samples that a fusion judges pair by pair; None: as many as each metric says.

    Raises:
        ValueError: an unknown task, or one that does not fit.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"task: expected some of {', '.join(TASKS)}, got {', '.join(unknown)}")
    found = {task: list(TASKS[task](of)) for task in tasks or TASKS}
    if lacking := [task for task in tasks if not found[task]]:
        fits = [task for task, make in TASKS.items() if any(True for _ in make(of))]
        raise ValueError(f"task: expected some that fit the recipe and its data ({', '.join(fits)}), got {lacking[0]}")
    own = () if tasks else of.recipe.metrics
    known = {_measured(metric) for metric in own}
    others = (metric for each in found.values() for metric in each if _measured(metric) not in known)
    chosen = [*own, *others]
    if limit is not None:
        chosen = [
            replace(metric, limit=limit) if isinstance(metric, Reranked | Matched) else metric for metric in chosen
        ]
    return list(dict.fromkeys(chosen))


def _measured(metric: Any) -> tuple[Any, ...]:
    """The same for two metrics that differ in nothing but how they measure; a pair of streams has no order."""
    values = {name: getattr(metric, name) for name in _OF if hasattr(metric, name)}
    pair = frozenset(values.pop(name) for name in ("a", "b") if name in values)
    return type(metric), pair, *(_measured(value) if is_dataclass(value) else value for value in values.values())
