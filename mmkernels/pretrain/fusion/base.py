"""What every fusion has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmkernels.pretrain.tokens import Layout, Tokens

__all__ = ["Fusion", "Pairing"]

# stream -> int64 [n]: the sample of each of n pairs (or triples, ...)
Pairing = Mapping[str, Tensor]


class Fusion(nn.Module):
    """Streams meet.

    Attributes:
        depth: layers in use; None: all. Stages set it.
    """

    depth: int | None = None

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        """Tokens after fusion, of the streams that it changes or makes.

        Args:
            tokens: of S samples, by stream.
            pairing: which samples meet: those at the same place. None: each sample meets itself.
        """
        raise NotImplementedError


def paired(tokens: Tokens, stream: str, pairing: Pairing | None) -> Tokens:
    """The tokens of a stream, sample by sample of the pairing."""
    return tokens if pairing is None else tokens.take(pairing[stream])


def one_each(x: Tensor, have: Tensor) -> Tokens:
    """Tokens of the vectors that there are: x [S, K, C], bool [S, K] -> at most K tokens a sample."""
    counts = have.sum(1)
    ends = (0, *counts.cumsum(0).tolist())
    return Tokens(x[have], Layout(torch.tensor(ends, dtype=torch.int32, device=x.device), ends))
