"""One part of a report, and what parts are made from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.metrics import HeldOut
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.report.shown import picture_of, spread, text_of
from mmkernels.pretrain.tokenizer import BOS, EOS

Kind = type[Any] | tuple[type[Any], ...]
Found = TypeVar("Found")

__all__ = [
    "Guess",
    "Run",
    "Section",
    "first_found",
    "guesses",
    "objectives_of",
    "picture_beside",
    "some",
    "spread_over",
    "texts_beside",
    "titled",
    "told_by",
]


@dataclass(frozen=True)
class Section:
    """A headline, a sentence below it, and what its template shows."""

    template: str  # its name in templates/
    title: str
    about: str
    content: Any


class Run(Protocol):
    """What examples are made of; a `Trainer` is one."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def trained(self) -> Any:
        """The model."""
        ...

    @property
    def learned(self) -> Collection[str]:
        """Names of the objectives that have: what the others say is that of random weights, and is not shown."""
        ...

    @property
    def held_out(self) -> Mapping[str, HeldOut]: ...


@dataclass(frozen=True)
class Guess:
    """One of several classes or tokens that a model may choose."""

    name: str
    probability: float
    right: bool


def guesses(logits: Tensor, target: int, names: Any, k: int = 3) -> list[Guess]:
    """The k likeliest of the classes, [K] logits; names: class -> its name."""
    likely = logits.float().softmax(-1).topk(min(k, len(logits)))
    pairs = zip(likely.indices.tolist(), likely.values.tolist(), strict=True)
    return [Guess(names(i), p, i == target) for i, p in pairs]


def objectives_of(run: Run, kind: Kind) -> Iterator[tuple[str, Any]]:
    """(name, module) of every objective of a kind that has learned."""
    for name, module in run.trained.objectives.items():
        if isinstance(module, kind) and name in run.learned:
            yield name, module


def titled(words: str, name: str, run: Run, kind: Kind) -> str:
    """The title of an objective's section; its name is said where there are several of the kind."""
    several = sum(1 for _ in objectives_of(run, kind)) > 1
    return f"{words}: {name}" if several else words


def first_found(run: Run, make: Callable[[HeldOut], Found | None]) -> tuple[HeldOut, Found] | None:
    """The first held-out set of which there is something to show, and what."""
    for held_out in run.held_out.values():
        if len(held_out.source) and (found := make(held_out)):
            return held_out, found
    return None


def some(held_out: HeldOut, count: int, mode: Any = "plain", objective: str = "") -> Batch | None:
    """A batch of evenly spaced samples; None if none of them can be read."""
    items = held_out.items()
    chosen = [items[i] for i in spread(len(items), count)]
    return next(replace(held_out, samples=count).batches(mode, items=chosen, objective=objective), None)


def spread_over(found: Sequence[Found], wanted: int) -> list[Found]:
    """At most `wanted` of some things, evenly spaced."""
    return [found[i] for i in spread(len(found), wanted)]


def told_by(run: Run, held_out: HeldOut, stream: str) -> list[str]:
    """The streams that a stream's tokens tell of after the fusion, without those that the run withholds."""
    fusion = run.trained.fusion
    names = (stream,) if fusion is None else fusion.told_by(stream)
    return [name for name in names if name not in held_out.collator.without]


def picture_beside(run: Run, held_out: HeldOut, batch: Batch, row: int, stream: str) -> str | None:
    """A picture of what a stream's tokens tell of in a sample; none if a view has swapped some of it for another's."""
    if _swapped(batch, row):
        return None
    fields = [run.recipe.streams[name].field or name for name in told_by(run, held_out, stream)]
    return picture_of(held_out.source[batch.numbers[row]], fields)


def texts_beside(run: Run, held_out: HeldOut, batch: Batch, row: int, streams: Sequence[str]) -> list[str]:
    """The texts of some streams as the model has them; of those whose tokens are no words, as the sample has them."""
    texts, tokenizer = [], held_out.collator.tokenizer
    for name in streams:
        stream = run.recipe.streams[name]
        if stream.encoder.reads_text:
            begin, end = batch[name].cu_seqlens_host[row : row + 2]
            ids = [i for i in batch[name].tokens[begin:end].tolist() if i not in (BOS, EOS)]
            texts.append("".join(tokenizer.pieces(ids)).strip())
        elif not _swapped(batch, row):
            texts.append(text_of(held_out.source[batch.numbers[row]], stream.field or name))
    return [text for text in dict.fromkeys(texts) if text]


def _swapped(batch: Batch, row: int) -> bool:
    return "matched" in batch.labels and int(batch.labels["matched"][row]) == 0
