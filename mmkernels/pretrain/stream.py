"""One stream of a model: an encoder, and from its tokens to one embedding per sample."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import PackedBatch, segment_pool
from mmkernels.pretrain.recipe import Facts, Stream
from mmkernels.pretrain.tokens import Tokens

__all__ = ["StreamEncoder"]


class StreamEncoder(nn.Module):
    """An encoder, and from its tokens [T, C] to one embedding [S, E] per sample.

    Args:
        stream: of the recipe.
        facts: what its parts are told.
        pooled: return embeddings; otherwise tokens, which fusions and token objectives need.
        compared: an objective compares its embeddings, so that they are projected to the shared space.
    """

    def __init__(self, stream: Stream, facts: Facts, pooled: bool, compared: bool) -> None:
        super().__init__()
        width, out = facts.shape.width, facts.shape.embed_dim
        self.pool, self.pooled, self.backend = stream.pool, pooled, facts.backend
        self.encoder = stream.encoder.build(facts)
        projected = compared and stream.project != "none"
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
        pooled = segment_pool(self.norm(tokens.x), tokens.cu_seqlens, mode=self.pool, backend=self.backend)  # [S, C]
        return F.normalize(self.project(pooled), dim=-1)
