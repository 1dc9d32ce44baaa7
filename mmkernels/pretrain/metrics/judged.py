"""Every prediction of an objective on a held-out set, judged once for all metrics of an evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.pretrain.metrics.base import HeldOut
from mmkernels.pretrain.metrics.guessing import best_column

__all__ = ["Judged", "concepts_of", "judged"]


class Judged(NamedTuple):
    """n predictions among K classes."""

    items: np.ndarray  # int64 [n]: the number of the sample that each is about
    concepts: np.ndarray  # int64 [n]: that sample's
    targets: np.ndarray  # int64 [n]
    guesses: np.ndarray  # int64 [n]: the most likely class; -1, which is wrong, for a tie, and beside a NaN
    confidence: np.ndarray  # float64 [n]: its probability; 1 beside a NaN
    losses: np.ndarray  # float64 [n]: cross entropy
    classes: int  # K

    @property
    def right(self) -> np.ndarray:
        """bool [n]"""
        right: np.ndarray = self.guesses == self.targets
        return right


def judged(model: Any, held_out: HeldOut, objective: str) -> Judged | None:
    """The predictions of an objective that chooses among classes; None if there is none to make.

    Raises:
        ValueError: the model has no such objective, or it does not choose among classes.
    """
    if objective not in model.objectives or not hasattr(model.objectives[objective], "logits"):
        can = ", ".join(name for name, each in model.objectives.items() if hasattr(each, "logits")) or "none"
        raise ValueError(f"objective: expected one that chooses among classes ({can}), got {objective!r}")
    return held_out.once(("judged", held_out.name, objective), lambda: _judge(model, held_out, objective))


def _judge(model: Any, held_out: HeldOut, name: str) -> Judged | None:
    objective, rows, classes = model.objectives[name], [], 0
    for batch in held_out.batches("loss", objective=name):
        chunk = model.whole(batch, name)
        logits, targets = objective.logits(chunk)
        classes = logits.shape[1]
        log_p = logits.double().log_softmax(1)
        losses = F.cross_entropy(logits.double(), targets, reduction="none")
        found = (targets, best_column(log_p), log_p.amax(1).exp().nan_to_num(nan=1.0), losses)
        owners = objective.owners(chunk).cpu()
        items = torch.tensor(batch.numbers, dtype=torch.int64)[owners].numpy()
        rows.append((items, concepts_of(batch, owners), *(each.cpu().numpy() for each in found)))
    if not sum(len(row[0]) for row in rows):
        return None
    return Judged(*(np.concatenate(each) for each in zip(*rows, strict=True)), classes)  # type: ignore[call-arg, arg-type]


def concepts_of(batch: Any, samples: Tensor) -> np.ndarray:
    """int64 [n]: the concepts of samples int64 [n] of a batch, by which values are drawn together for an interval."""
    concepts: np.ndarray = batch.concepts.cpu()[samples.cpu()].numpy()
    return concepts
