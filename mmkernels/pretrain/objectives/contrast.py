"""Contrast: InfoNCE between two streams, with a learned temperature; a queue and a momentum teacher are optional.

Source: Radford et al. 2021 (arXiv:2103.00020); queue: He et al. 2020 (arXiv:1911.05722); distillation: Li et al. 2021
(arXiv:2107.07651).
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels.nn import InfoNCELoss
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.objectives.base import BatchObjective, paired
from mmkernels.pretrain.recipe import Facts, Ramp
from mmkernels.pretrain.schedule import at
from mmkernels.pretrain.seen import Seen
from mmkernels.pretrain.state import Queue

__all__ = ["Contrast"]


@dataclass(frozen=True)
class Contrast:
    """Which sample of one stream belongs to which of the other."""

    a: str = "image"
    """Stream of the queries."""
    b: str = "text"
    """Stream of the keys."""
    weight: float | Ramp = 1.0
    """Factor of the loss."""
    init_scale: float = 1 / 0.07
    """Learned factor of the similarities, at the start."""
    max_scale: float = 100.0
    """Its upper bound."""
    queue: int = 0
    """Keys of earlier batches, by the momentum twins, that serve as further negatives in both directions."""
    distil: float | Ramp = 0.0
    """Share of the twins' own similarities in the targets."""
    symmetric: bool = True
    """Both directions; otherwise a -> b alone."""
    positives: Literal["concept", "sample"] = "concept"
    """concept: samples of the same concept belong together, too. sample: each is alone; no label is used."""

    def __post_init__(self) -> None:
        if self.positives not in ("concept", "sample"):
            raise ValueError(f"positives: expected 'concept' or 'sample', got {self.positives!r}")
        if self.queue < 0:
            raise ValueError(f"queue: expected at least 0 keys, got {self.queue}")
        if not all(0 <= at(self.distil, step) <= 1 for step in (0, sys.maxsize)):
            raise ValueError(f"distil: expected a share between 0 and 1, got {self.distil}")

    @property
    def compares(self) -> tuple[str, ...]:
        return (self.a, self.b) if self.symmetric or not self.queue else (self.a,)  # a queue's keys are the twin's

    @property
    def keys(self) -> tuple[str, ...]:
        return () if self.queue else (self.b,)

    @property
    def taught(self) -> tuple[str, ...]:
        if self.distil != 0.0 or (self.queue and self.symmetric):
            return self.a, self.b
        return (self.b,) if self.queue else ()

    @property
    def by_concept(self) -> bool:
        return self.positives == "concept"

    def build(self, facts: Facts) -> ContrastLoss:
        owners = {name: facts.streams[name].tied or name for name in (self.a, self.b)}
        for name in self.taught:
            if facts.streams[owners[name]].teacher is None:
                raise ValueError(f"streams.{owners[name]}: expected a teacher, which queue and distil need, got None")
        if self.b not in self.compares and owners[self.a] != owners[self.b]:
            untrained = f"since without symmetric nothing else trains its encoder, got {owners[self.b]!r}"
            raise ValueError(f"streams.{self.b}.tied: expected {owners[self.a]!r}, {untrained}")
        return ContrastLoss(self, facts)


class ContrastLoss(BatchObjective):
    def __init__(self, part: Contrast, facts: Facts) -> None:
        super().__init__()
        self.part = part
        # Both directions with a queue are two one-way losses: a queue has keys for one direction.
        self.one_way = part.queue > 0 or not part.symmetric
        scale: Any = {"init_scale": part.init_scale, "max_scale": part.max_scale}
        self.loss = InfoNCELoss(**scale, normalize=False, symmetric=not self.one_way, backend=facts.backend)
        names = ([part.b, part.a] if part.symmetric else [part.b]) if part.queue else []
        self.queues: Any = torch.nn.ModuleDict({name: Queue(part.queue, facts.shape.embed_dim) for name in names})
        self._latest: dict[str, Tensor] = {}

    def over_batch(self, seen: Seen) -> Tensor:
        a, b = self.part.a, self.part.b
        rows, everywhere = torch.nonzero(seen.present(a, b)).flatten(), seen.roster.present(a, b)
        if not everywhere.any():
            return 0.0 * torch.stack([seen.embedding(name).sum() for name in self.part.compares]).sum()
        own = {name: seen.embedding(name)[rows] for name in self.part.compares}
        twins = {name: seen.teacher[name][rows] for name in (a, b) if name in seen.teacher}
        self._latest = {name: seen.roster.rows(seen.teacher[name].detach())[everywhere] for name in self.queues}
        ways = [(a, b), (b, a)] if self.one_way and self.part.symmetric else [(a, b)]
        options: dict[str, Any] = {"group": seen.roster.ranks.group}
        if self.part.by_concept and not seen.roster.distinct(a, b):
            options |= {"query_ids": seen.batch.concepts[rows], "key_ids": seen.batch.concepts[rows]}
        return torch.stack([self._one(own, twins, *way, seen, options) for way in ways]).mean()

    def _one(
        self, own: dict[str, Tensor], twins: dict[str, Tensor], x: str, y: str, seen: Seen, options: dict[str, Any]
    ) -> Tensor:
        queue = self.queues[y] if y in self.queues else None  # noqa: SIM401  a ModuleDict has no get
        keys = own[y] if queue is None else twins[y]  # keys and a queue must come from the same encoder: the twin
        more: dict[str, Any] = {"gathered": seen.roster.sent.get((y, x, y)) if queue is None else None}
        if (alpha := at(self.part.distil, seen.step)) > 0:
            more["teacher"] = (twins[x], twins[y], alpha)
        if queue is not None and len(queue):  # all ranks have the same queue: each brings its share
            more["negatives"] = queue.keys().to(keys.dtype).tensor_split(seen.roster.ranks.size)[seen.roster.ranks.rank]
        return self.loss(own[x], keys, **options, **more)

    def after_step(self) -> None:
        self.loss.clamp_()
        for name, keys in self._latest.items():
            self.queues[name].push(keys)

    def forget(self) -> None:
        self._latest = {}  # a step without this objective has none

    def metrics(self) -> dict[str, float]:
        return {"logit_scale": self.loss.scale.item()}

    def chance_loss(self, batch: Batch) -> float | None:
        """Of the keys of this step: a queue begins empty."""
        n = paired(batch, self.part.a, self.part.b) + max((len(queue) for queue in self.queues.values()), default=0)
        return math.log(n) if n else None
