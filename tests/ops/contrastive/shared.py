"""Shared by several test files: rows, ids, inputs of a loss with options, a batch that ranks split."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.dtypes import compute_dtype

__all__ = ["EXCHANGES", "IDS", "E", "N", "batch", "inputs_of", "rows"]

EXCHANGES = ("all_gather", "ring")
N, E = 111, 40
IDS = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(3))


def rows(n, e=E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)


def inputs_of(m, dtype, seed=0):
    x = rows(N, E, 10 + seed)
    y = F.normalize(rows(m, E, 20 + seed) + (x if m == N else 0), dim=1)
    wide = compute_dtype(dtype)
    return x.to(dtype), y.to(dtype), torch.tensor(14.3, dtype=wide)


def batch(n: int, e: int = 16, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Queries and keys of all ranks together; a key resembles its query."""
    generator = torch.Generator().manual_seed(1)
    queries = F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    keys = F.normalize(queries + 0.5 * torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)
    return queries.to(dtype), keys.to(dtype)
