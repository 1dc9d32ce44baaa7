"""What an objective predicts on held-out data, beside the best guess that ignores the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Of an objective that chooses among classes: cross entropy and accuracy. Chance is the entropy and the largest
    share of the held-out classes themselves, which no input-blind guess can beat. Of one that predicts vectors: mean
    square error; chance is that of the held-out targets' mean."""

    objective: str = ""
    """Name of the objective (masked or next tokens, masked regions, matching, answers)."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        classifies = hasattr(model.objectives[self.objective], "logits")
        return self._classes(model, held_out) if classifies else self._vectors(model, held_out)

    def _classes(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective = model.objectives[self.objective]
        losses, right, count = 0.0, 0, 0
        seen: dict[int, int] = {}
        for batch in held_out.batches("loss", objective=self.objective):
            logits, targets = objective.logits(model.whole(batch, self.objective))
            losses += F.cross_entropy(logits.double(), targets, reduction="sum").item()
            right += int((logits.argmax(1) == targets).sum())
            count += len(targets)
            for value, times in zip(*(t.tolist() for t in torch.unique(targets, return_counts=True)), strict=True):
                seen[value] = seen.get(value, 0) + times
        if not count:
            return []
        shares = torch.tensor(list(seen.values()), dtype=torch.float64) / count
        entropy = -(shares * shares.log()).sum().item()
        return [
            Figure(f"{self.objective}: accuracy", right / count, shares.max().item(), headline=True),
            Figure(f"{self.objective}: loss", losses / count, entropy, percent=False, higher_is_better=False),
        ]

    def _vectors(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective = model.objectives[self.objective]
        errors: Any = 0.0
        total: Any = 0.0
        squares: Any = 0.0
        count = 0
        for batch in held_out.batches("loss", objective=self.objective):
            predicted, targets = (t.double() for t in objective.vectors(model.whole(batch, self.objective)))
            errors += (predicted - targets).square().mean(1).sum()
            total, squares = total + targets.sum(0), squares + targets.square().sum(0)  # [F]
            count += len(targets)
        if not count:
            return []
        spread = (squares / count - (total / count).square()).mean().item()
        name = f"{self.objective}: mean square error"
        return [Figure(name, errors.item() / count, spread, percent=False, higher_is_better=False, headline=True)]
