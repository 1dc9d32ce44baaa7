"""The data of a report: opened as training opens them, but whole, however much of them is broken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmkernels.pretrain import recipes
from mmkernels.pretrain.data import Mixed, Source, open_data
from mmkernels.pretrain.data.filter_list import TRAIN
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.data_report.settings import DataReport
from mmkernels.pretrain.journal import data_warnings
from mmkernels.pretrain.recipe import Recipe
from mmkernels.pretrain.setup import expect_fields, expect_some_left, may_lack, read_by

__all__ = ["Opened", "opened"]

_EVERY = 1 << 62  # held-out samples


@dataclass(frozen=True)
class Opened:
    """Opened data.

    Attributes:
        splits: the training set, called `train`, and the held-out sets.
        read: of each split, the samples that are read: int64, ascending.
        twins: of a training sample, the others that are the same sample: those of a set that is mixed with itself.
        recipe: that which says what is read, if any.
        warnings: what was logged.
    """

    splits: dict[str, Source]
    read: dict[str, np.ndarray]
    twins: dict[int, list[int]]
    recipe: Recipe | None
    warnings: list[str]

    @property
    def train(self) -> Source:
        return self.splits[TRAIN]

    @property
    def fields(self) -> list[str]:
        """Of all splits."""
        return list(dict.fromkeys(field for source in self.splits.values() for field in source.fields))

    @property
    def partial(self) -> bool:
        """Whether only some samples are read."""
        return any(len(self.read[name]) + self._unread(name) < len(each) for name, each in self.splits.items())

    def _unread(self, split: str) -> int:
        return sum(map(len, self.twins.values())) if split == TRAIN else 0


def opened(options: DataReport) -> Opened:
    """Open the data. Raise ValueError where training would, but not for broken samples."""
    recipe = None if options.recipe is None else recipes.load(options.recipe)
    fields, labels = (None, []) if recipe is None else read_by(recipe)
    if recipe is not None:
        expect_some_left(recipe, options.without)
    with data_warnings() as warnings:
        data = open_data(
            options.source,
            fields=None if fields is None else [*fields, *labels],
            labels=tuple(dict.fromkeys([*labels, *options.labels])),
            partial=recipe is not None and (may_lack(recipe) or bool(options.without)),
            table=options.table,
            resolution=options.resolution,
            eval_fraction=options.eval_fraction,
            held_out_by=options.held_out_by,
            max_eval=_EVERY,
            max_broken=1.0,
            cache_bytes=0,
        )
    if recipe is not None:
        expect_fields(str(options.recipe), recipe, options.source, data.train, options.without)
    if TRAIN in data.held_out:
        raise ValueError(
            f"source: expected held-out sets of other names than {TRAIN!r}, got {', '.join(data.held_out)}"
        )
    splits = {TRAIN: data.train, **data.held_out}
    own, twins = _own(data.train)
    kept = {name: own if name == TRAIN else np.arange(len(source)) for name, source in splits.items()}
    return Opened(
        splits, {name: rows[spaced(len(rows), options.limit)] for name, rows in kept.items()}, twins, recipe, warnings
    )


def _own(train: Source) -> tuple[np.ndarray, dict[int, list[int]]]:
    """(the samples of each data set once, the others that are the same): a set may be mixed with itself."""
    if not isinstance(train, Mixed):
        return np.arange(len(train)), {}
    firsts: dict[int, int] = {}
    own: list[np.ndarray] = []
    twins: dict[int, list[int]] = {}
    start = 0
    for part in train.parts.values():
        first = firsts.setdefault(id(part.inner), start)
        if first == start:
            own.append(np.arange(start, start + len(part)))
        else:
            for i in range(len(part)):
                twins.setdefault(first + i, []).append(start + i)
        start += len(part)
    return np.concatenate(own), twins
