"""Inputs for the packing ops: rows and indices; late interaction as users write it. For item lengths see
`mmkernels.testing.lengths`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["cu_seqlens_of", "plain_maxsim", "random_index", "splice_inputs"]


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Boundaries of segments of these lengths: [S+1] int32."""
    return torch.tensor([0, *np.cumsum(lengths, dtype=np.int64).tolist()], dtype=torch.int32, device=device)


def random_index(rows: int, tokens: int, *, device: str = "cpu") -> Tensor:
    """[tokens] int64 in [-1, rows), with repeats, unreferenced rows, and some -1."""
    index = torch.randint(0, max(rows, 1), (tokens,), device=device)
    nobody = torch.rand(tokens, device=device) < 0.15
    return torch.where(nobody | torch.full_like(nobody, rows == 0), -1, index)


def splice_inputs(
    vocabulary: int,
    tokens: int,
    features: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    some_left_out: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token_ids [T], table [V, E], features [F, E], dst_index [F]) for `embed_splice`, features in random order."""
    token_ids = torch.randint(0, vocabulary, (tokens,), device=device)
    table, rows = (torch.randn(n, width, device=device).to(dtype) for n in (vocabulary, features))
    dst_index = torch.randperm(tokens, device=device)[:features]
    if some_left_out:
        dst_index = torch.where(torch.rand(features, device=device) < 0.1, -1, dst_index)
    return token_ids, table, rows, dst_index


def plain_maxsim(
    queries: Tensor, documents: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, reduction: str = "sum"
) -> Tensor:
    """What users have: everything padded, one einsum to [Nq, Nd, Lq, Ld], a mask. 0 for empty documents."""
    q, keep_q = _padded(queries, cu_seqlens_q)
    d, keep_d = _padded(documents, cu_seqlens_k)
    products = torch.einsum("aih,bjh->abij", q, d).masked_fill(~keep_d[:, None], -torch.inf)
    scored = keep_q[:, None] & keep_d.any(1)[:, None]  # [Nq, Nd, Lq]
    scores = products.max(3).values.masked_fill(~scored, 0).sum(2)
    return scores / keep_q.sum(1).clamp(min=1)[:, None] if reduction == "mean" else scores


def _padded(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, E] -> [S, L, E] and which of them are rows, [S, L]; L is at least 1."""
    lengths = cu_seqlens.diff()
    at = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1, device=x.device)
    keep = at < lengths[:, None]
    index = torch.where(keep, cu_seqlens[:-1, None] + at, len(x))
    return torch.cat([x, x.new_zeros(1, x.shape[1])])[index], keep
