"""The tables of a report: coverage, sizes, languages, classes, concepts. Values are what JSON can hold."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from mmkernels.pretrain.data import Text
from mmkernels.pretrain.data.spaced import spaced
from mmkernels.pretrain.data_report.languages import language_of
from mmkernels.pretrain.data_report.reading import Opened
from mmkernels.pretrain.data_report.scan import Scan, captions_of

__all__ = ["classes", "concepts", "coverage", "languages", "sizes"]

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}
_TEXTS = 2_000  # whose language is told, of each field and split


def coverage(data: Opened, found: Scan) -> dict[str, Any]:
    """split -> samples there are, could be read, and have each field."""
    table: dict[str, Any] = {}
    for split, source in data.splits.items():
        fields = {field: found.counts[split, field] for field in data.fields}
        table[split] = {"samples": len(source), "read": len(found.of(split)), "fields": fields}
    return table


def sizes(found: Scan) -> dict[str, dict[str, Any]]:
    """what -> split -> quantiles, and how many values there are."""
    table: dict[str, dict[str, Any]] = {}
    for (split, what), values in found.measures.items():
        numbers = np.frombuffer(values, np.float64)
        row = {name: round(float(np.quantile(numbers, q)), 4) for name, q in QUANTILES.items()}
        table.setdefault(what, {})[split] = {**row, "values": len(numbers)}
    return table


def languages(data: Opened) -> dict[str, dict[str, dict[str, int]]]:
    """field -> split -> texts by language, of evenly spaced samples; of each the first text."""
    table: dict[str, dict[str, dict[str, int]]] = {}
    for split, source in data.splits.items():
        rows = data.read[split]
        counts: dict[str, Counter[str]] = {}
        for index in rows[spaced(len(rows), _TEXTS)].tolist():
            for field, value in source.peek(index).items():
                if isinstance(value, str | Text):
                    counts.setdefault(field, Counter()).update([language_of(captions_of(value)[0])])
        for field, each in counts.items():
            table.setdefault(field, {})[split] = dict(sorted(each.items(), key=lambda item: (-item[1], item[0])))
    return table


def classes(data: Opened, found: Scan) -> dict[str, dict[str, Any]]:
    """label -> the samples of each class by split, and how even they are in training.

    `evenness` is the entropy of the shares as a fraction of its most, 1 if all classes have as many; `ratio` is the
    largest class over the smallest that occurs.
    """
    table: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(label for _, label in found.classes):
        names = data.train.classes.get(label, ())
        by_split = {split: found.classes.get((split, label), Counter()) for split in found.splits}
        rows = {
            name: {split: counts[i] for split, counts in by_split.items()} for i, name in enumerate(names)
        }  # in the order of the classes
        counts = np.array([by_split[found.splits[0]][i] for i in range(len(names))], np.float64)
        there = counts[counts > 0]
        shares = there / there.sum() if len(there) else there
        entropy = float(-(shares * np.log(shares)).sum())
        table[label] = {
            "classes": len(names),
            "without_samples": int((counts == 0).sum()),
            "unlabelled": {split: sum(n for i, n in each.items() if i < 0) for split, each in by_split.items()},
            "evenness": round(entropy / np.log(len(names)), 4) if len(names) > 1 else 1.0,
            "ratio": round(float(there.max() / there.min()), 2) if len(there) else 0.0,
            "counts": rows,
        }
    return table


def concepts(data: Opened) -> dict[str, dict[str, Any]]:
    """split -> how many concepts there are, of how many samples each, and how many are in training too."""
    table: dict[str, dict[str, Any]] = {}
    known = np.unique(data.train.concepts)
    for split, source in data.splits.items():
        numbers, counts = np.unique(source.concepts, return_counts=True)
        row = {name: float(np.quantile(counts, q)) if len(counts) else 0.0 for name, q in QUANTILES.items()}
        shared = int(np.isin(numbers, known).sum())
        table[split] = {"samples": len(source), "concepts": len(numbers), "in_training": shared, **row}
    return table
