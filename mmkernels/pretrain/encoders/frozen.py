"""Precomputed vectors as they are: a field of the data that another model has filled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer

__all__ = ["Frozen"]


@dataclass(frozen=True)
class Frozen:
    """One token per vector, which no gradient reaches; only where the sizes differ, a linear layer learns to fit it to
    the width. With project="none" and no such layer the stream stays as it came."""

    size: int = 128
    """Numbers of a vector."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: expected at least 1, got {self.size}")

    @property
    def reads_text(self) -> bool:
        return False

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """float32 [size] or [k, size] -> tokens float32 [1 or k, size]."""
        pieces = []
        for value in values:
            rows = np.zeros((0, self.size), np.float32) if value is None else np.asarray(value, np.float32)
            if rows.ndim not in (1, 2) or rows.shape[-1] != self.size or not np.isfinite(rows).all():
                expected = f"expected finite numbers [{self.size}] or [k, {self.size}]"
                raise ValueError(f"value: {expected}, got {list(rows.shape)} {getattr(value, 'dtype', type(value))}")
            pieces.append(Piece(torch.from_numpy(np.array(np.atleast_2d(rows)))))
        return pieces

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else len(np.atleast_2d(value))

    def build(self, facts: Facts) -> EncoderModule:
        return FrozenEncoder(self, facts)


class FrozenEncoder(EncoderModule):
    def __init__(self, part: Frozen, facts: Facts) -> None:
        super().__init__()
        width = facts.shape.width
        self.resize = nn.Identity() if part.size == width else nn.Linear(part.size, width)

    def forward(self, batch: PackedBatch) -> Tensor:
        return self.resize(batch.tokens)
