"""The model of a recipe: streams, fusion and objectives, and the one loss that gradient caching runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.recipe import Facts, Recipe
from mmkernels.pretrain.seen import Chunk, Seen
from mmkernels.pretrain.stream import StreamEncoder, encoded, named_by, stream_encoders

__all__ = ["Model"]


class Model(nn.Module):
    """Everything of a recipe that learns.

    Attributes:
        streams: an encoder per stream that is not tied to another.
        encoded, taught: names of the streams that the model itself reads, and of those that its twins read.
        objectives: by name.
        fusion: how streams meet, or None.
    """

    def __init__(self, recipe: Recipe, facts: Facts) -> None:
        super().__init__()
        self.objectives: Any = nn.ModuleDict({name: part.build(facts) for name, part in recipe.objectives.items()})
        self.fusion = None if recipe.fusion is None else recipe.fusion.build(facts)
        self.by_token = {name for name, objective in self.objectives.items() if hasattr(objective, "over_tokens")}
        self.owner = {name: stream.tied or name for name, stream in recipe.streams.items()}
        compared = named_by(recipe.objectives, "compares", of=recipe.objectives.keys() - self.by_token)
        self.taught = named_by(recipe.objectives, "taught")
        pooled = self.fusion is None and not self.by_token
        self.encoded = encoded(recipe, compared) if pooled else tuple(recipe.streams)
        self.streams = stream_encoders(recipe.streams, facts, pooled, compared | self.taught)

    def encoder(self, stream: str) -> StreamEncoder:
        return self.streams[self.owner[stream]]  # type: ignore[return-value]

    def encoders(self) -> list[StreamEncoder]:
        """One per stream in `encoded`; tied streams share theirs."""
        return [self.encoder(name) for name in self.encoded]

    def loss(
        self, batch: Batch, weights: Mapping[str, float], chunk: int, teacher: Mapping[str, Tensor] | None = None
    ) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
        """The loss as a function of the streams' rows, for `GradCache`.

        Args:
            batch: of S samples.
            weights: of the objectives in use.
            chunk: samples whose fused features are in memory at a time; the result does not depend on it.
            teacher: embeddings of the streams' momentum twins, [S, E] each.

        Returns:
            a function: what `encoders` return for the batch -> (loss, that of each objective which it tells anything).
        """

        def of_rows(*rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            seen = self.seen(batch, rows, teacher)
            whole = {name: self.objectives[name] for name in weights if name not in self.by_token}
            parts = {name: (objective.over_batch(seen), objective.told(seen)) for name, objective in whole.items()}
            parts |= self._over_tokens(seen, [name for name in weights if name in self.by_token], chunk)
            total = torch.stack([weights[name] * part for name, (part, _) in parts.items()]).sum()
            return total, {name: part for name, (part, told) in parts.items() if told}

        return of_rows

    def seen(self, batch: Batch, rows: tuple[Tensor, ...], teacher: Mapping[str, Tensor] | None = None) -> Seen:
        return Seen(batch, {name: (self.encoder(name), x) for name, x in zip(self.encoded, rows, strict=True)}, teacher)

    def whole(self, batch: Batch, objective: str) -> Chunk:
        """A whole batch after fusion, ready for one token objective; for evaluation."""
        seen = self.seen(batch, tuple(self.encoder(name)(batch[name]) for name in self.encoded))
        self.objectives[objective].begin(seen)
        (chunk,) = seen.chunks(max(batch.samples, 1))
        chunk.fuse(self.fusion)
        return chunk

    def _over_tokens(self, seen: Seen, names: list[str], chunk: int) -> dict[str, tuple[Tensor, bool]]:
        """Each token objective: (its sum over all chunks, divided by its count over all chunks; if it counts any)."""
        totals: dict[str, tuple[Any, float]] = dict.fromkeys(names, (0.0, 0))
        for name in names:
            self.objectives[name].begin(seen)
        chunks = seen.chunks(chunk) if names else []
        again = len(chunks) > 1 and torch.is_grad_enabled()  # one chunk's activations at a time
        for part in chunks:
            found = checkpoint(self._sums, part, names, use_reentrant=False) if again else self._sums(part, names)
            for name, (total, count) in found.items():
                totals[name] = totals[name][0] + total.float(), totals[name][1] + count
        return seen.roster.means(totals)

    def _sums(self, part: Chunk, names: list[str]) -> dict[str, tuple[Tensor, float]]:
        part.fuse(self.fusion)
        return {name: self.objectives[name].over_tokens(part) for name in names}
