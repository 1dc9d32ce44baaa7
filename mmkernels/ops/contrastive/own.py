"""What only one query sees: its own negatives and its target, in batched products rather than all pairs.

Plain PyTorch, differentiable in every order and mode. Rows are local, also over a process group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive.reference import no_autocast
from mmkernels.ops.contrastive.types import BEST, LSE, MEAN, POSITIVE, STATISTICS, TOP
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["joined", "lines_of_targets", "of_own_negatives"]


def similarities(queries: Tensor, negatives: Tensor) -> Tensor:
    """[N, K] float64: each query and its own negatives [N, K, E]; products accumulate in the statistics' dtype."""
    wide = compute_dtype(queries.dtype)
    with no_autocast(queries):
        return (negatives.to(wide) @ queries.to(wide)[:, :, None])[:, :, 0].double()


def of_own_negatives(
    queries: Tensor, negatives: Tensor, logit_scale: Tensor, seen: Tensor | None = None, hardness: float = 0.0
) -> Tensor:
    """Statistics [7, N] of each query over its own negatives [N, K, E], K > 0, or those seen; only LSE is
    differentiable."""
    similarity = similarities(queries, negatives)
    logits = logit_scale.double() * similarity
    if hardness:
        logits = logits + hardness * similarity.detach()
    lines = [torch.zeros_like(logits[:, 0])] * STATISTICS
    if seen is not None:
        some = seen.any(1)
        lines[LSE] = torch.where(seen | ~some[:, None], torch.where(seen, logits, 0.0), -torch.inf).logsumexp(1)
        lines[LSE] = torch.where(some, lines[LSE], -torch.inf)
        return torch.stack(lines)
    lines[LSE] = logits.logsumexp(1)
    lines[MEAN] = (logits.softmax(1) * similarity).sum(1).detach()
    lines[TOP] = logits.amax(1).detach()
    lines[BEST] = torch.full_like(lines[TOP], -torch.inf)
    return torch.stack(lines)


def lines_of_targets(queries: Tensor, keys: Tensor, targets: Tensor, columns: bool) -> list[Tensor]:
    """Statistics [7, N] of rows and, if asked, [7, M] of columns, with POSITIVE alone: the similarity of the row's
    target, which each column is once."""
    positive = similarities(queries, keys[targets][:, None])[:, 0]
    lines = [positive]
    if columns:
        lines.append(torch.zeros_like(positive).index_copy(0, targets, positive))
    return [torch.stack([x if i == POSITIVE else torch.zeros_like(x) for i in range(STATISTICS)]) for x in lines]


def joined(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp of two lse whose derivatives are not NaN where one or both are -inf."""
    no_a, no_b = a == -torch.inf, b == -torch.inf
    both = torch.logaddexp(torch.where(no_a | no_b, 0.0, a), torch.where(no_a | no_b, 0.0, b))
    return torch.where(no_a, b, torch.where(no_b, a, both))
