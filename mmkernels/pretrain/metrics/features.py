"""What probes read: the pooled tokens of a stream before its projection, and the classes of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmkernels import segment_pool
from mmkernels.pretrain.data.base import Source
from mmkernels.pretrain.metrics.base import Each, HeldOut

__all__ = ["Probed", "probed"]


class Probed(NamedTuple):
    """Features and classes to fit on, and to score on; classes count from 0."""

    fit: Tensor  # float32 [N, C]
    fit_classes: Tensor  # int64 [N]
    score: Tensor  # float32 [M, C]
    score_classes: Tensor  # int64 [M], each among fit_classes
    items: np.ndarray  # int64 [M], the numbers of the samples to score
    concepts: np.ndarray  # int64 [M], theirs

    @property
    def classes(self) -> int:
        return int(self.fit_classes.max()) + 1

    def judged(self, name: str, guesses: Tensor) -> Each:
        """Whether classes int64 [M] are right. Chance is the most frequent class, which no blind guess can beat."""
        right, targets = (guesses == self.score_classes).cpu().numpy(), self.score_classes.cpu().numpy()
        return Each(name, right, self.items, self.concepts, targets)


def probed(model: Any, held_out: HeldOut, stream: str, label: str, limit: int) -> Probed | None:
    """Training and held-out features of a stream.

    Args:
        model: in evaluation mode, without gradients.
        held_out: the samples to score, those whose class occurs in the training data.
        stream: of the model; samples that lack it are left out.
        label: field of the data with the class; empty: the concept.
        limit: most training samples, evenly spaced.

    Returns:
        None if no held-out sample has a class of the training data.

    Raises:
        ValueError: the model has no such stream, or the data no such label.
    """
    if stream not in model.owner:
        raise ValueError(f"stream: expected one of {', '.join(model.owner)}, got {stream!r}")
    if label and label not in held_out.train.classes:
        has = ", ".join(held_out.train.classes) or "none"
        raise ValueError(f"label: expected a label of the data ({has}), got {label!r}")
    if not label and not np.isin(held_out.source.concepts, held_out.train.concepts).any():
        return None  # known before anything is encoded
    n = len(held_out.train)
    items = np.unique(np.linspace(0, n - 1, min(n, limit)).astype(np.int64)).tolist()
    x, ids, _ = held_out.once(
        ("train", stream, label, str(limit)), lambda: _features(model, held_out, stream, label, held_out.train, items)
    )
    y, wanted, numbers = held_out.once(
        ("held out", held_out.name, stream, label),
        lambda: _features(model, held_out, stream, label, held_out.source, held_out.items()),
    )
    known, classes = torch.unique(ids, return_inverse=True)
    seen = torch.isin(wanted, known)
    if not bool(seen.any()):
        return None
    scored = numbers[seen.cpu()].numpy()
    targets = torch.searchsorted(known, wanted[seen])
    return Probed(x, classes, y[seen], targets, scored, held_out.source.concepts[scored])


def _features(
    model: Any, held_out: HeldOut, stream: str, label: str, source: Source, items: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """(float32 [n, C], class ids, numbers int64 [n]) of the samples that have the stream and a class."""
    encoder = model.encoder(stream)
    rows, ids, numbers = [], [], []
    for batch in held_out.batches(of=source, items=items):
        packed, classes = batch[stream], batch.labels[label] if label else batch.concepts
        x, cu_seqlens = encoder.encoder(packed), encoder.encoder.layout(packed).cu_seqlens
        have = (cu_seqlens.diff() > 0) & (classes >= 0)
        rows.append(segment_pool(x, cu_seqlens, mode=encoder.pool)[have].float())
        ids.append(classes[have])
        numbers.append(torch.tensor(batch.numbers, dtype=torch.int64)[have.cpu()])
    if not rows:
        none = torch.zeros(0, dtype=torch.int64)
        return torch.zeros((0, 1), device=held_out.device), none.to(held_out.device), none
    return torch.cat(rows), torch.cat(ids), torch.cat(numbers)
