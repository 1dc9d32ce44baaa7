"""What every objective has."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.seen import Chunk, Seen

__all__ = [
    "BatchObjective",
    "Classification",
    "Head",
    "Objective",
    "Regression",
    "TokenObjective",
    "matched_tokens",
    "paired",
]


class Objective(nn.Module):
    """A loss, possibly with parameters; built by a frozen dataclass in a recipe, which has its `weight`."""

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def forget(self) -> None:
        """Drop what a forward has left for `after_step`: called after each step, be it taken or skipped."""

    def metrics(self) -> dict[str, float]:
        """Values of its own for the log, such as a learned scale."""
        return {}

    def chance_loss(self, batch: Batch) -> float | None:
        """The loss of a guess that ignores the input, or None if there is no such thing. What depends on the samples
        adds up over `batch.roster.ranks`, all of which call this at the same time."""
        return None


class BatchObjective(Objective):
    """Compares embeddings of the whole batch, which may lie on several ranks: the mean of the ranks' losses is that of
    the batch, and the mean of their gradients its gradient. (All may compute the same from `seen.everyone`.)

    Its part names their streams, in a property `compares`; in `taught` those whose momentum twin's embeddings it reads.
    In `keys`, the streams whose rows of all ranks its loss takes as `gathered`: they are exchanged while others encode.
    With a true `by_concept` samples of the same concept are positives, and a batch has no two; it has `least` samples.
    """

    def over_batch(self, seen: Seen) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError

    def told(self, seen: Seen) -> bool:
        """Whether the batch has something to say to it; else its loss is a 0 that means nothing."""
        part = getattr(self, "part", None)  # of one that keeps it
        return part is None or bool(seen.roster.present(*part.compares).any())


class TokenObjective(Objective):
    """A sum over tokens or samples, chunk by chunk; its loss is the sum over the batch divided by the count."""

    def begin(self, seen: Seen) -> None:
        """Called once per step, before the chunks: for draws over the whole batch."""

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        """(sum, count) of one chunk; it must depend on the chunk's samples alone, not on how the batch is cut."""
        raise NotImplementedError

    def owners(self, chunk: Chunk) -> Tensor:
        """int64 [n]: the sample, by its place in the chunk, that each prediction is about."""
        raise NotImplementedError


class Classification(TokenObjective):
    """A token objective that chooses among classes: cross entropy.

    One that can say of any pairs how well their streams fit has a method `scores` (see `Matching`).
    """

    def logits(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(logits [n, K], targets int64 [n]) of the chunk's n predictions."""
        raise NotImplementedError

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        logits, targets = self.logits(chunk)
        return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


class Regression(TokenObjective):
    """A token objective that predicts vectors: the square of the distance. (Its mean over the F elements would be
    so small that other objectives' gradients drown it.)"""

    def vectors(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """(predictions [n, F], targets [n, F]) of the chunk."""
        raise NotImplementedError

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        predicted, targets = self.vectors(chunk)
        return (predicted.float() - targets.float()).square().sum(), len(targets)


def paired(batch: Batch, a: str, b: str) -> int:
    """How many samples of all ranks have both streams."""
    return int(batch.roster.present(a, b).sum())


class Head(nn.Module):
    """Features [n, C] -> logits [n, K]: a hidden layer and a projection.

    Args:
        facts: the sizes.
        classes: K.
        linear: without the hidden layer: a norm and a projection.
    """

    def __init__(self, facts: Facts, classes: int, linear: bool = False) -> None:
        super().__init__()
        width = facts.shape.width
        self.hidden = None if linear else nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, classes)
        nn.init.normal_(self.project.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if self.hidden is not None:
            x = F.gelu(self.hidden(x), approximate="tanh")
        return self.project(self.norm(x))


def matched_tokens(chunk: Chunk, stream: str) -> Tensor:
    """bool [T]: tokens of samples whose streams belong together; false where a view has swapped one."""
    tokens = chunk.tokens[stream]
    matched = chunk.batch.labels.get("matched")
    if matched is None:
        return torch.ones(len(tokens.x), dtype=torch.bool, device=tokens.x.device)
    return (matched != 0)[tokens.layout.owners()]
