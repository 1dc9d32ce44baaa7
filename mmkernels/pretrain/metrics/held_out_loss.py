"""What an objective predicts on held-out data, beside the best guess that ignores the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmkernels.pretrain.metrics.base import Each, HeldOut
from mmkernels.pretrain.metrics.figure import Figure
from mmkernels.pretrain.metrics.judged import concepts_of, judged

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

    def each(self, model: Any, held_out: HeldOut) -> Each | None:
        """Whether each prediction is right."""
        found = judged(model, held_out, self.objective)
        if found is None:
            return None
        return Each(f"{self.objective}: accuracy", found.right, found.items, found.concepts, found.targets)

    def _classes(self, model: Any, held_out: HeldOut) -> list[Figure]:
        found, right = judged(model, held_out, self.objective), self.each(model, held_out)
        if found is None or right is None:
            return []
        shares = np.unique(found.targets, return_counts=True)[1] / len(found.targets)
        entropy = float(-(shares * np.log(shares)).sum())
        more: dict[str, Any] = {"percent": False, "higher_is_better": False, "clusters": found.concepts}
        return [
            right.figure(headline=True),
            Figure.of_each(f"{self.objective}: loss", found.losses, entropy, **more),
        ]

    def _vectors(self, model: Any, held_out: HeldOut) -> list[Figure]:
        objective = model.objectives[self.objective]
        errors: list[np.ndarray] = []
        concepts: list[np.ndarray] = []
        total: Any = 0.0
        squares: Any = 0.0
        for batch in held_out.batches("loss", objective=self.objective):
            chunk = model.whole(batch, self.objective)
            vectors, targets = (t.double() for t in objective.vectors(chunk))
            errors.append((vectors - targets).square().mean(1).cpu().numpy())
            concepts.append(concepts_of(batch, objective.owners(chunk)))
            total, squares = total + targets.sum(0), squares + targets.square().sum(0)  # [F]
        count = sum(map(len, errors))
        if not count:
            return []
        spread = (squares / count - (total / count).square()).mean().item()
        name = f"{self.objective}: mean square error"
        more: dict[str, Any] = {"percent": False, "higher_is_better": False, "headline": True}
        return [Figure.of_each(name, np.concatenate(errors), spread, clusters=np.concatenate(concepts), **more)]
