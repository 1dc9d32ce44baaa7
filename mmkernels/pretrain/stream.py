"""One stream of a model: an encoder, and from its tokens to one embedding per sample."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import PackedBatch, segment_pool
from mmkernels.pretrain.recipe import Facts, Recipe, Stream
from mmkernels.pretrain.tokens import Tokens

__all__ = ["StreamEncoder", "encoded", "named_by", "stream_encoders"]


class StreamEncoder(nn.Module):
    """An encoder, and from its tokens [T, C] to one embedding [S, E] per sample.

    Args:
        stream: of the recipe.
        facts: what its parts are told.
        pooled: return embeddings; otherwise tokens, which fusions and token objectives need.
        compared: an objective compares its embeddings, so that they are projected to the shared space.

    Attributes:
        embed_dim: E.
    """

    def __init__(self, stream: Stream, facts: Facts, pooled: bool, compared: bool) -> None:
        super().__init__()
        width, out = facts.shape.width, facts.shape.embed_dim
        self.pool, self.pooled, self.backend = stream.pool, pooled, facts.backend
        self.encoder = stream.encoder.build(facts)
        projected = compared and stream.project != "none"
        self.embed_dim = out if projected else width
        self.norm = nn.LayerNorm(width) if projected else nn.Identity()
        hidden = [nn.Linear(width, width), nn.GELU()] if projected and stream.project == "mlp" else []
        last = [nn.Linear(width, out, bias=False)] if projected else []
        self.project = nn.Sequential(*hidden, *last)

    def forward(self, batch: PackedBatch) -> Tensor:
        """Tokens [T, C], or embeddings [S, E] if `pooled`."""
        return self.embeddings(batch) if self.pooled else self.encoder(batch)

    def embeddings(self, batch: PackedBatch) -> Tensor:
        """Unit vectors [S, E]."""
        return self.embed(Tokens(self.encoder(batch), self.encoder.layout(batch)))

    def embed(self, tokens: Tokens) -> Tensor:
        """Unit vectors [S, E]; zeros for a sample without tokens."""
        return F.normalize(self.projected(tokens), dim=-1)

    def projected(self, tokens: Tokens) -> Tensor:
        """[S, E], as long as they come."""
        pooled = segment_pool(self.norm(tokens.x), tokens.cu_seqlens, mode=self.pool, backend=self.backend)  # [S, C]
        vectors: Tensor = self.project(pooled)
        return vectors


def named_by(objectives: Mapping[str, Any], what: str, of: Collection[str] = ()) -> set[str]:
    """The streams that objectives' parts name in a property, which those in `of` must have."""
    for name in of:
        if not getattr(objectives[name], what, ()):
            raise ValueError(f"objectives.{name}: expected a part with a property {what}, got {objectives[name]}")
    return {name for part in objectives.values() for name in getattr(part, what, ())}


def encoded(recipe: Recipe, compared: Collection[str]) -> tuple[str, ...]:
    """The streams that objectives compare, in the order in which they are encoded: those first that go to other ranks
    meanwhile."""
    first = named_by(recipe.objectives, "keys")
    return tuple(sorted((name for name in recipe.streams if name in compared), key=lambda name: name not in first))


def stream_encoders(
    streams: Mapping[str, Stream], facts: Facts, pooled: bool, compared: Collection[str]
) -> nn.ModuleDict:
    """An encoder for each stream that is not tied to another.

    Args:
        streams: of the recipe.
        facts: what parts are told.
        pooled: encoders return embeddings, not tokens.
        compared: streams whose embeddings an objective compares.

    Raises:
        ValueError: a stream is tied to none, or has what its encoder's owner decides; or something has no effect.
    """
    owners = {name: stream.tied or name for name, stream in streams.items()}
    for name, stream in streams.items():
        owner = streams.get(owners[name])
        if owner is None or owner.tied:
            have = ", ".join(key for key, each in streams.items() if not each.tied)
            raise ValueError(
                f"streams.{name}.tied: expected a stream with an encoder of its own ({have}), got {stream.tied}"
            )
        for what in ("encoder", "pool", "project"):
            mine, theirs = getattr(stream, what), getattr(owner, what)
            if mine != theirs:
                raise ValueError(f"streams.{name}.{what}: expected {theirs}, as streams.{stream.tied} has, got {mine}")
    projected = {owners[name] for name in compared}
    for name, stream in streams.items():
        if stream.teacher is not None and stream.tied:
            raise ValueError(
                f"streams.{name}.teacher: expected None, streams.{stream.tied} may have one, got {stream.teacher}"
            )
        if stream.project == "mlp" and owners[name] not in projected:
            nothing = "since no objective compares its embeddings"
            raise ValueError(f"streams.{name}.project: expected 'linear' or 'none', {nothing}, got {stream.project!r}")
    own = {name: stream for name, stream in streams.items() if not stream.tied}
    return nn.ModuleDict({name: StreamEncoder(s, facts, pooled, name in projected) for name, s in own.items()})
