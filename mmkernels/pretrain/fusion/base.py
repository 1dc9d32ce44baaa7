"""What every fusion has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.pretrain.tokens import Layout, Tokens

__all__ = ["Fusion", "Pairing", "attention_of"]

# stream -> int64 [n]: the sample of each of n pairs (or triples, ...)
Pairing = Mapping[str, Tensor]


class Fusion(nn.Module):
    """Streams meet.

    Attributes:
        depth: layers in use; None: all. Stages set it.
        joins: a stream that it changes or makes -> the streams that its tokens tell of.
    """

    depth: int | None = None
    joins: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def forward(self, tokens: Mapping[str, Tokens], pairing: Pairing | None = None) -> dict[str, Tokens]:
        """Tokens after fusion, of the streams that it changes or makes.

        Args:
            tokens: of S samples, by stream.
            pairing: which samples meet: those at the same place. None: each sample meets itself.
        """
        raise NotImplementedError

    def told_by(self, stream: str) -> tuple[str, ...]:
        """The streams that a stream's tokens tell of after as many layers as are in use."""
        found = self.joins.get(stream, (stream,))
        return (stream,) if self.depth == 0 and stream in found else found

    def attention(self, tokens: Mapping[str, Tokens]) -> dict[tuple[str, str], Tensor]:
        """Which tokens look at which, in the last layer in use: (a stream, one that it reads) -> float32 [T, Tk], the
        mean over the heads. Dense: of a few samples. Empty for a fusion whose streams do not attend to each other."""
        return {}


@contextmanager
def attention_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """The probabilities [T, Tk], mean over the heads, of every call of an attention module while this is open."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(module.probabilities(*args, **kwargs).mean(0))

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.compiler.set_stance("force_eager"):  # for one look a compiled block is not compiled again
            yield found
    finally:
        handle.remove()


def paired(tokens: Tokens, stream: str, pairing: Pairing | None) -> Tokens:
    """The tokens of a stream, sample by sample of the pairing."""
    return tokens if pairing is None else tokens.take(pairing[stream])


def one_each(x: Tensor, have: Tensor) -> Tokens:
    """Tokens of the vectors that there are: x [S, K, C], bool [S, K] -> at most K tokens a sample."""
    counts = have.sum(1)
    ends = (0, *counts.cumsum(0).tolist())
    return Tokens(x[have], Layout(torch.tensor(ends, dtype=torch.int32, device=x.device), ends))
