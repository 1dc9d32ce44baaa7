"""Several data sets as one, by shares.

```python
data = open_data("emoji::scenes", weights=(2, 1))
data.train.fields             # those of both; a sample lacks the other set's
data.held_out["emoji: A"]     # each set keeps its held-out sets
```

Concepts of different sets are different, even if they are called the same; those of a set that is mixed with itself are
the same. Classes of a label are merged by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from types import MappingProxyType
from typing import Any

import numpy as np

from mmkernels.pretrain.data.base import BrokenLog, Data, Regions, Sample, Source
from mmkernels.pretrain.data.shares import Shares

__all__ = ["Mixed", "Part", "mix"]


class Part(Source):
    """A data set with the numbers that concepts and classes have in a mixture.

    Args:
        inner: the data set; its samples keep their names, and it records its broken ones.
        classes: those of the mixture. A class that is not among them becomes -100, no label.
        first_concept: of the mixture, for concept 0 of the data set.
    """

    def __init__(self, inner: Source, classes: Mapping[str, tuple[str, ...]], first_concept: int) -> None:
        self.inner, self.fields, self.broken = inner, inner.fields, inner.broken
        self.classes, self.concepts = classes, inner.concepts + first_concept
        self.first_concept = first_concept
        self._numbers = {
            field: numbers
            for field, names in inner.classes.items()
            if ((numbers := _renumbering(names, classes.get(field, ()))) != np.arange(len(names))).any()
        }

    def __getitem__(self, index: int) -> Sample:
        sample = self.inner[index]
        return Sample(self._merged(sample.values), sample.concept + self.first_concept, sample.name)

    def name(self, index: int) -> str:
        return self.inner.name(index)

    def peek(self, index: int) -> Mapping[str, Any]:
        return self._merged(self.inner.peek(index))

    def logged_as(self, index: int) -> str:
        return self.inner.logged_as(index)

    def contents(self, index: int) -> Mapping[str, str]:
        return self.inner.contents(index)

    def stored_size(self, index: int) -> tuple[int, int] | None:
        return self.inner.stored_size(index)

    def only(self, indices: np.ndarray) -> Part:
        return Part(self.inner.only(indices), self.classes, self.first_concept)

    def _merged(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return _Renumbered(values, self._numbers) if self._numbers else values


class _Renumbered(Mapping[str, Any]):
    """The values of a sample with the mixture's numbers of classes; each is computed when it is read."""

    def __init__(self, values: Mapping[str, Any], numbers: Mapping[str, np.ndarray]) -> None:
        self._values, self._numbers = values, numbers

    def __getitem__(self, field: str) -> Any:
        value = self._values[field]
        if isinstance(value, Regions):
            tags = self._numbers.get("tag")
            return value if tags is None else value._replace(tags=_lookup(tags, value.tags))
        if field in self._numbers and value is not None and value is not ...:
            return int(_lookup(self._numbers[field], np.array(value)))
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _renumbering(names: Sequence[str], merged: Sequence[str]) -> np.ndarray:
    """The number in `merged` of each name: int64 [n], -100 for one that is not there."""
    numbers = {name: i for i, name in enumerate(merged)}
    return np.array([numbers.get(name, -100) for name in names], np.int64)


def _lookup(numbers: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """New numbers of classes; negative ones, for none, stay."""
    return np.where(classes < 0, classes, np.append(numbers, -100)[np.maximum(classes, 0)])


class _Logs(BrokenLog):
    """The records of a mixture's parts as one. Names are `part: name`; each part keeps its own, and its own limit."""

    def __init__(self, logs: Mapping[str, BrokenLog]) -> None:
        self._logs = dict(logs)

    def add(self, name: str, reason: str) -> None:
        log, own = self._of(name)
        log.add(own, reason)

    def cut(self, name: str, what: str) -> None:
        log, own = self._of(name)
        log.cut(own, what)

    def leave_out(self, where: str, files: Mapping[str, str]) -> None:
        log, own = self._of(where)
        log.leave_out(own, files)

    def limit(self, max_broken: float) -> None:
        for log in self._different:
            log.limit(max_broken)

    def excuse(self, names: Iterable[str]) -> None:
        for log, own in map(self._of, names):
            log.excuse([own])

    def _of(self, name: str) -> tuple[BrokenLog, str]:
        """(the record of the part that a name begins with, the name there)."""
        part = next(part for part in sorted(self._logs, key=len, reverse=True) if name.startswith(f"{part}: "))
        return self._logs[part], name[len(part) + 2 :]

    def __len__(self) -> int:
        return sum(len(log) for log in self._different)

    @property
    def total(self) -> int:  # type: ignore[override]
        return sum(log.total for log in self._different)

    @property
    def reasons(self) -> dict[str, str]:  # type: ignore[override]
        return {f"{part}: {name}": why for part, log in self._logs.items() for name, why in log.reasons.items()}

    @property
    def left_out(self) -> dict[str, str]:  # type: ignore[override]
        return {f"{part}: {name}": why for part, log in self._logs.items() for name, why in log.left_out.items()}

    @property
    def _different(self) -> list[BrokenLog]:
        """Parts may share a record."""
        return list({id(log): log for log in self._logs.values()}.values())


class Mixed(Source):
    """The samples of several data sets, one set after the other.

    Args:
        sources: by name, at least one; the same source may be there twice.
        weights: the share of each in an epoch, see `Shares`; None: by size.
        beside: further sources of a part, such as its held-out sets: its concepts are numbered with theirs.

    Attributes:
        parts: the sources as `Part`s, by name.
        shares: which of them an epoch deals.

    Raises:
        ValueError: a source without samples; weights that do not fit.
    """

    shares: Shares

    def __init__(
        self,
        sources: Mapping[str, Source],
        weights: Sequence[float] | None = None,
        *,
        beside: Mapping[str, Iterable[Source]] = MappingProxyType({}),
    ) -> None:
        for name, source in sources.items():
            if not len(source):
                raise ValueError(f"data: expected samples in every set, got none in {name}")
        self.fields = tuple(dict.fromkeys(field for source in sources.values() for field in source.fields))
        self.classes = _merged_classes(sources.values())
        self.shares = Shares(list(sources), [len(source) for source in sources.values()], weights)
        firsts: dict[int, int] = {}  # by source
        free = 0
        for name, source in sources.items():
            if id(source) not in firsts:
                firsts[id(source)] = free
                concepts = [each.concepts for each in (source, *beside.get(name, ())) if len(each)]
                free += 1 + max(int(each.max()) for each in concepts)
        self.parts = {name: Part(each, self.classes, firsts[id(each)]) for name, each in sources.items()}
        self.broken = _Logs({name: source.broken for name, source in sources.items()})
        self._number()

    def _number(self) -> None:
        """Number the samples, one part after the other."""
        self.concepts = np.concatenate([part.concepts for part in self.parts.values()])
        self._members = list(self.parts.items())
        self._starts = np.cumsum([0, *(len(part) for part in self.parts.values())])

    def place(self, index: int) -> tuple[str, Part, int]:
        """(name of the part, the part, number in it) of a sample."""
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        member = int(np.searchsorted(self._starts, index, side="right")) - 1
        return *self._members[member], index - int(self._starts[member])

    def __getitem__(self, index: int) -> Sample:
        _, part, number = self.place(index)
        return part[number]

    def name(self, index: int) -> str:
        _, part, number = self.place(index)
        return part.name(number)

    def peek(self, index: int) -> Mapping[str, Any]:
        _, part, number = self.place(index)
        return part.peek(number)

    def logged_as(self, index: int) -> str:
        name, part, number = self.place(index)
        return f"{name}: {part.logged_as(number)}"

    def contents(self, index: int) -> Mapping[str, str]:
        _, part, number = self.place(index)
        return part.contents(number)

    def stored_size(self, index: int) -> tuple[int, int] | None:
        _, part, number = self.place(index)
        return part.stored_size(number)

    def only(self, indices: np.ndarray) -> Mixed:
        """Some of the samples, int64 [n] ascending: a mixture of the same parts, with the same numbers of concepts.
        Raise ValueError if a part would be empty."""
        few = copy(self)
        cuts = np.searchsorted(indices, self._starts)
        few.parts = {
            name: part.only(indices[first:last] - start)
            for (name, part), first, last, start in zip(self._members, cuts, cuts[1:], self._starts, strict=False)
        }
        for name, part in few.parts.items():
            if not len(part):
                raise ValueError(f"data: expected samples in every set, got none in {name}")
        few.shares = Shares(list(few.parts), [len(part) for part in few.parts.values()], self.shares.weights)
        few._number()
        return few

    def like(self, name: str, source: Source) -> Part:
        """Another source of a part, such as a held-out set, with the same numbers of concepts and classes."""
        return Part(source, self.classes, self.parts[name].first_concept)


def _merged_classes(sources: Iterable[Source]) -> dict[str, tuple[str, ...]]:
    """The classes of every label, in the order in which the sources name them."""
    found: dict[str, dict[str, None]] = {}
    for source in sources:
        for field, names in source.classes.items():
            found.setdefault(field, {}).update(dict.fromkeys(names))
    return {field: tuple(names) for field, names in found.items()}


def mix(data: Mapping[str, Data], weights: Sequence[float] | None = None) -> Data:
    """The training sets of several data sets mixed, and all of their held-out sets, called `data set: split`.

    Raises as `Mixed` does.
    """
    beside = {name: tuple(each.held_out.values()) for name, each in data.items()}
    train = Mixed({name: each.train for name, each in data.items()}, weights, beside=beside)
    held_out: dict[str, Source] = {}
    seen: set[int] = set()
    for name, each in data.items():
        if id(each) not in seen:  # a set that is there twice is evaluated once
            held_out |= {f"{name}: {split}": train.like(name, source) for split, source in each.held_out.items()}
        seen.add(id(each))
    return Data(train, held_out)
