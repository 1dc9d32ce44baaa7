"""How much an objective gains from a stream: its loss with the right one, with another sample's, and without any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from mmkernels.pretrain.metrics.base import Figure, HeldOut

__all__ = ["Ablation"]


@dataclass(frozen=True)
class Ablation:
    """Three losses of an objective that chooses among classes. Chance is the loss with the stream of another sample,
    the next one of the held-out batch: what the model knows without looking."""

    objective: str = ""
    """Name of the objective."""
    stream: str = "image"
    """The stream that its fusion reads."""

    def measure(self, model: Any, held_out: HeldOut) -> list[Figure]:
        if model.fusion is None:
            raise ValueError("metrics: Ablation: expected a recipe with a fusion, got none")
        objective = model.objectives[self.objective]
        losses, count = dict.fromkeys(("right", "other", "none"), 0.0), 0
        for batch in held_out.batches("loss", objective=self.objective):
            chunk = model.whole(batch, self.objective)
            rows = torch.arange(batch.samples, device=batch.concepts.device)
            others = dict.fromkeys(chunk.tokens, rows) | {self.stream: rows.roll(-1)}
            emptied = {**chunk.tokens, self.stream: chunk.tokens[self.stream].emptied()}
            kept = dict(chunk.fused)
            for what in losses:
                if what == "other":
                    chunk.fused = {**kept, **model.fusion(chunk.tokens, others)}
                elif what == "none":
                    chunk.fused = {**kept, **model.fusion(emptied)}
                logits, targets = objective.logits(chunk)
                losses[what] += F.cross_entropy(logits.double(), targets, reduction="sum").item()
            count += len(targets)
        if not count:
            return []
        right, other, none = (each / count for each in losses.values())
        more: dict[str, Any] = {"percent": False, "higher_is_better": False}
        return [
            Figure(f"{self.objective}: loss with {self.stream}", right, other, **more),
            Figure(f"{self.objective}: loss without {self.stream}", none, other, **more),
        ]
