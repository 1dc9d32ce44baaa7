"""A classification objective on held-out data: loss and accuracy, beside the best guess that ignores the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Cross entropy and accuracy of an objective. Chance is the entropy and the largest share of the held-out classes
    themselves, which no input-blind guess can beat."""

    objective: str = ""
    """Name of the objective, which chooses among classes (masked or next tokens, matching, answers)."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective = model.objectives[self.objective]
        losses, right, count = 0.0, 0, 0
        seen: dict[int, int] = {}
        for batch in held_out.batches("loss"):
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
