"""The filter of false negatives: thresholds and seen pairs under a guide's features, from `FalseNegatives`.

A row's threshold comes from the guide's similarity to its target, computed as the tiles compute theirs: a key whose
features equal the target's, bit for bit, is as similar as the target, and stays.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.types import FalseNegatives, Guide, Pairs

__all__ = ["Guides", "guides_of", "thresholds_of", "turned"]


class Guides(NamedTuple):
    """Filters of a loss's passes.

    rows: queries against keys. columns: keys against queries, each key with its own threshold; None in one direction.
    negatives: of queries against negatives [K, E], or which of its own [N, K] each query sees; None without them.
    """

    rows: Guide
    columns: Guide | None
    negatives: Guide | Tensor | None


@torch.no_grad()
def guides_of(filtered: FalseNegatives, targets: Tensor, symmetric: bool, backend: str) -> Guides:
    """The filters, from the index of each query's key; if symmetric, each key is the target of one query."""
    queries, keys = filtered.guide_queries.detach(), filtered.guide_keys.detach()
    rows = Guide(queries, keys, _thresholds(filtered, queries, keys, targets, backend))
    columns = None
    if symmetric:
        columns = Guide(keys, queries, _thresholds(filtered, keys, queries, _inverse(targets), backend))
    negatives: Guide | Tensor | None = filtered.guide_negatives
    if isinstance(negatives, Tensor):
        negatives = negatives.detach()
        if negatives.ndim == 2:
            negatives = Guide(queries, negatives, rows.thresholds)
        else:
            negatives = ~(_similarities(queries, negatives, backend) > rows.thresholds[:, None])
    return Guides(rows, columns, negatives)


def turned(pairs: Pairs) -> Pairs:
    """The pairs of the transpose."""
    targets = None if pairs.targets is None else _inverse(pairs.targets)
    return Pairs(targets, pairs.key_ids, pairs.query_ids, pairs.same_id)


def _inverse(targets: Tensor) -> Tensor:
    return torch.zeros_like(targets).index_copy(0, targets, torch.arange(len(targets), device=targets.device))


@torch.no_grad()
def thresholds_of(filtered: FalseNegatives, targets: Tensor, backend: str) -> Tensor:
    """[N]: of the queries, from their similarity to their targets among the keys."""
    return _thresholds(filtered, filtered.guide_queries.detach(), filtered.guide_keys.detach(), targets, backend)


def _thresholds(filtered: FalseNegatives, queries: Tensor, keys: Tensor, targets: Tensor, backend: str) -> Tensor:
    similarity = op.of_targets(queries, keys, targets, backend)
    unit = similarity.abs() if filtered.kind == "relative" else 1.0
    return similarity - unit * filtered.margin


def _similarities(queries: Tensor, negatives: Tensor, backend: str) -> Tensor:
    """[N, K]: each query and its own negatives, with the arithmetic of the thresholds."""
    (n, k), flat = negatives.shape[:2], negatives.flatten(0, 1)
    first = k * torch.arange(n, device=queries.device)
    parts = [op.of_targets(queries, flat, first + i, backend) for i in range(k)]
    return torch.stack(parts, 1) if parts else queries.new_zeros(n, 0)
