"""What every objective has."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.seen import Chunk, Seen

__all__ = ["BatchObjective", "Objective", "TokenObjective"]


class Objective(nn.Module):
    """A loss, possibly with parameters; built by a frozen dataclass in a recipe, which has its `weight`."""

    def after_step(self) -> None:
        """Called after every optimizer step."""

    def metrics(self) -> dict[str, float]:
        """Values of its own for the log, such as a learned scale."""
        return {}

    def chance_loss(self, batch: Batch) -> float | None:
        """The loss of a guess that ignores the input, or None if there is no such thing."""
        return None


class BatchObjective(Objective):
    """Compares embeddings of the whole batch."""

    def over_batch(self, seen: Seen) -> Tensor:
        """The loss, a scalar."""
        raise NotImplementedError


class TokenObjective(Objective):
    """A sum over tokens or samples, chunk by chunk; its loss is the sum over the batch divided by the count."""

    def begin(self, seen: Seen) -> None:
        """Called once per step, before the chunks: for draws over the whole batch."""

    def over_tokens(self, chunk: Chunk) -> tuple[Tensor, float]:
        """(sum, count) of one chunk; it must depend on the chunk's samples alone, not on how the batch is cut."""
        raise NotImplementedError
