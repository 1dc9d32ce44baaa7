"""How well hidden patches are painted, beside the mean patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.judged import concepts_of

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
        errors: list[np.ndarray] = []
        concepts: list[np.ndarray] = []
        squares, total = 0.0, torch.zeros((), dtype=torch.float64)
        for batch in held_out.batches("loss"):
            chunk = model.whole(batch, self.objective)
            painted, targets = (each.double().cpu() for each in objective.painted(chunk))
            errors.append((painted - targets).square().mean(1).numpy())
            concepts.append(concepts_of(batch, objective.owners(chunk)))
            squares += targets.square().mean(1).sum().item()
            total = total + targets.sum(0)
        count = sum(map(len, errors))
        if not count:
            return []
        chance = squares / count - (total / count).square().mean().item()
        more: dict[str, Any] = {"percent": False, "higher_is_better": False, "headline": True}
        name, clusters = f"{self.objective}: error", np.concatenate(concepts)
        return [Figure.of_each(name, np.concatenate(errors), chance, clusters=clusters, **more)]
