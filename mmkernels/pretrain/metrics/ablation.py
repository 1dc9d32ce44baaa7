"""How much an objective gains from a stream: its loss with the right one, with another sample's, and without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmkernels.pretrain.metrics.base import Figure, HeldOut
from mmkernels.pretrain.metrics.guessing import of_others
from mmkernels.pretrain.metrics.judged import concepts_of

__all__ = ["Ablation"]


@dataclass(frozen=True)
class Ablation:
    """Three losses of an objective that chooses among classes. Chance is the loss with the stream of another sample,
    the next one of another concept in the held-out batch: what the model knows without looking. A batch of one concept
    takes no part in it."""

    objective: str = ""
    """Name of the objective."""
    stream: str = "image"
    """The stream that its fusion reads."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        if model.fusion is None:
            raise ValueError("metrics: Ablation: expected a recipe with a fusion, got none")
        objective = model.objectives[self.objective]
        losses: dict[str, list[np.ndarray]] = {"right": [], "other": [], "none": []}
        concepts: dict[str, list[np.ndarray]] = {name: [] for name in losses}
        for batch in held_out.batches("loss", objective=self.objective):
            chunk = model.whole(batch, self.objective)
            kept, others = dict(chunk.fused), of_others(batch.concepts)
            for what in losses:
                if what == "other" and others is not None:
                    rows = torch.arange(batch.samples, device=others.device)
                    pairing = dict.fromkeys(chunk.tokens, rows) | {self.stream: others}
                    chunk.fused = {**kept, **model.fusion(chunk.tokens, pairing)}
                elif what == "other":
                    continue
                elif what == "none":
                    emptied = {**chunk.tokens, self.stream: chunk.tokens[self.stream].emptied()}
                    chunk.fused = {**kept, **model.fusion(emptied)}
                logits, targets = objective.logits(chunk)
                losses[what].append(F.cross_entropy(logits.double(), targets, reduction="none").cpu().numpy())
                concepts[what].append(concepts_of(batch, objective.owners(chunk)))
        chance = float(np.concatenate(losses["other"]).mean()) if sum(map(len, losses["other"])) else None
        figures = []
        for what, name in (("right", "with"), ("none", "without")):
            if sum(map(len, losses[what])):
                values, clusters = np.concatenate(losses[what]), np.concatenate(concepts[what])
                more: dict[str, Any] = {"percent": False, "higher_is_better": False, "clusters": clusters}
                figures.append(Figure.of_each(f"{self.objective}: loss {name} {self.stream}", values, chance, **more))
        return figures
