"""How well hidden patches are painted, beside the mean patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["Reconstruction"]


@dataclass(frozen=True)
class Reconstruction:
    """Mean square error of the hidden patches of the held-out set. Chance is that of their own mean patch, which no
    constant guess can beat."""

    objective: str = "patches"
    """Name of the objective, a `MaskedPatches`."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        if self.objective not in model.objectives:
            expected = f"expected one of the objectives {', '.join(model.objectives)}"
            raise ValueError(f"metrics.reconstruction.objective: {expected}, got {self.objective!r}")
        objective = model.objectives[self.objective]
        error, squares, total, count = 0.0, 0.0, torch.zeros((), dtype=torch.float64), 0
        for batch in held_out.batches("loss"):
            painted, targets = (each.double().cpu() for each in objective.painted(model.whole(batch, self.objective)))
            error += (painted - targets).square().mean(1).sum().item()
            squares += targets.square().mean(1).sum().item()
            total = total + targets.sum(0)
            count += len(targets)
        if not count:
            return []
        chance = squares / count - (total / count).square().mean().item()
        name = f"{self.objective}: error"
        return [Figure(name, error / count, chance, percent=False, higher_is_better=False, headline=True)]
