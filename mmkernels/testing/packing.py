"""Inputs for packing: rows and indices for the ops; the lengths of items are in `mmkernels.testing.lengths`."""

from __future__ import annotations

import numpy as np
import torch

from mmkernels.testing.lengths import LENGTHS, lengths_like

__all__ = ["LENGTHS", "cu_seqlens_of", "lengths_like", "random_index"]


def cu_seqlens_of(lengths: list[int], device: str = "cpu") -> torch.Tensor:
    """[S+1] int32 from segment lengths."""
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32, device=device)


def random_index(rows: int, tokens: int, *, device: str = "cpu") -> torch.Tensor:
    """[tokens] int64 in [-1, rows): repeats, rows that nobody names, and some -1."""
    index = torch.randint(0, max(rows, 1), (tokens,), device=device)
    nobody = torch.rand(tokens, device=device) < 0.15
    return torch.where(nobody | torch.full_like(nobody, rows == 0), -1, index)
