"""Precision, recall, F1 and calibration of an objective that chooses among classes.

Source of the calibration error: Guo et al. 2017 (arXiv:1706.04599).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.judged import Judged, judged

__all__ = ["Classified"]


@dataclass(frozen=True)
class Classified:
    """Means over the classes that occur or are guessed (macro), beside those of the most frequent class alone; and the
    expected calibration error: how far the stated probability of a guess is from how often it is right."""

    objective: str = ""
    """Name of the objective (masked or next tokens, masked regions, matching, answers)."""
    bins: int = 15
    """Of the stated probability, equally wide."""

    def __post_init__(self) -> None:
        if self.bins < 1:
            raise ValueError(f"bins: expected at least 1, got {self.bins}")

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found = judged(model, held_out, self.objective)
        if found is None:
            return []
        table = _counts(found.concepts, found.targets, found.guesses)
        constant = _counts(found.concepts, found.targets, _constant(found.targets)).sum(0, keepdims=True)
        figures = [
            Figure.of_sums(f"{self.objective}: macro {name}", table, of, float(of(constant)[0]))
            for name, of in (("precision", _precision), ("recall", _recall), ("F1", _f1))
        ]
        return [*figures, self._calibration(found)]

    def _calibration(self, found: Judged) -> Figure:
        """Chance: of someone who always is as sure as all K classes are equally likely."""
        bins = np.minimum((found.confidence * self.bins).astype(np.int64), self.bins - 1)
        own = bins[:, None] == np.arange(self.bins)
        sums = np.concatenate([own, own * (found.right - found.confidence)[:, None]], 1)  # [n, 2 bins]
        chance = abs(float(found.right.mean()) - 1 / found.classes)
        name = f"{self.objective}: expected calibration error"
        return Figure.of_sums(name, sums, _error, chance, clusters=found.concepts, higher_is_better=False)


def _constant(targets: np.ndarray) -> np.ndarray:
    """Always the most frequent class."""
    classes, counts = np.unique(targets, return_counts=True)
    return np.full_like(targets, classes[counts.argmax()])


def _counts(concepts: np.ndarray, targets: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """float64 [concepts, 3 K]: hits, guesses and occurrences of each class that occurs or is guessed; -1 is none."""
    any_guess = guesses >= 0
    classes = np.unique(np.concatenate([targets, guesses[any_guess]]))
    occurs, guessed = np.searchsorted(classes, targets), np.searchsorted(classes, guesses[any_guess])
    several, places = np.unique(concepts, return_inverse=True)
    rows, table = places.reshape(-1), np.zeros((3, len(several), len(classes)))
    np.add.at(table[0], (rows, occurs), targets == guesses)
    np.add.at(table[1], (rows[any_guess], guessed), 1)
    np.add.at(table[2], (rows, occurs), 1)
    return np.concatenate([*table], 1)


def _precision(sums: np.ndarray) -> np.ndarray:
    hits, guessed, occurs = np.split(sums, 3, axis=1)
    return _mean(hits / np.maximum(guessed, 1), guessed + occurs)


def _recall(sums: np.ndarray) -> np.ndarray:
    hits, guessed, occurs = np.split(sums, 3, axis=1)
    return _mean(hits / np.maximum(occurs, 1), guessed + occurs)


def _f1(sums: np.ndarray) -> np.ndarray:
    hits, guessed, occurs = np.split(sums, 3, axis=1)
    return _mean(2 * hits / np.maximum(guessed + occurs, 1), guessed + occurs)


def _mean(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Of the classes that occur or are guessed: [B, K] -> [B]."""
    mean: np.ndarray = (values * (there > 0)).sum(1) / (there > 0).sum(1)
    return mean


def _error(sums: np.ndarray) -> np.ndarray:
    counts, differences = np.split(sums, 2, axis=1)
    error: np.ndarray = np.abs(differences).sum(1) / counts.sum(1)
    return error
