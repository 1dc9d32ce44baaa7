"""What only one query sees: its own negatives, a batched product of O(N·K·E) rather than all pairs.

Plain PyTorch, differentiable in every order and mode. Rows are local, also over a process group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive.reference import no_autocast
from mmkernels.ops.contrastive.types import BEST, LSE, MEAN, STATISTICS, TOP
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["joined", "of_own_negatives"]


def similarities(queries: Tensor, negatives: Tensor) -> Tensor:
    """[N, K] float64: each query and its own negatives [N, K, E]; products accumulate in the statistics' dtype."""
    wide = compute_dtype(queries.dtype)
    with no_autocast(queries):
        return (negatives.to(wide) @ queries.to(wide)[:, :, None])[:, :, 0].double()


def of_own_negatives(queries: Tensor, negatives: Tensor, logit_scale: Tensor) -> Tensor:
    """Statistics [7, N] of each query over its own negatives [N, K, E], K > 0; only LSE is differentiable."""
    similarity = similarities(queries, negatives)
    logits = logit_scale.double() * similarity
    lines = [torch.zeros_like(logits[:, 0])] * STATISTICS
    lines[LSE] = logits.logsumexp(1)
    lines[MEAN] = (logits.softmax(1) * similarity).sum(1).detach()
    lines[TOP] = logits.amax(1).detach()
    lines[BEST] = torch.full_like(lines[TOP], -torch.inf)
    return torch.stack(lines)


def joined(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp of two lse whose derivatives are not NaN where one or both are -inf."""
    no_a, no_b = a == -torch.inf, b == -torch.inf
    both = torch.logaddexp(torch.where(no_a | no_b, 0.0, a), torch.where(no_a | no_b, 0.0, b))
    return torch.where(no_a, b, torch.where(no_b, a, both))
