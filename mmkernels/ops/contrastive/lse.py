"""The log-sum-exp of each query's logits: documentation, validation, routing."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.checks import (
    check_features,
    guide_of,
    hardness_of,
    limits_of,
    rule_of,
    scalar,
    unseen_of,
)
from mmkernels.ops.contrastive.guides import thresholds_of
from mmkernels.ops.contrastive.hardness import as_unrounded
from mmkernels.ops.contrastive.types import FalseNegatives
from mmkernels.runtime.backends import resolve

__all__ = ["similarity_logsumexp"]


def similarity_logsumexp(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    guide: tuple[Tensor, Tensor] | None = None,
    thresholds: Tensor | FalseNegatives | None = None,
    hardness: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The log-sum-exp of each query's logits over the keys that it sees, streaming: no N x M matrix is stored.

        lse_i = log sum_{j seen by i} exp(logit_scale · <x_i, y_j>)

    The part of which losses with other denominators than those of `infonce` are made: several sets of keys join by
    `torch.logsumexp(torch.stack([...]), 0)`. Features are not normalised and keep their dtype under autocast.

    Args:
        queries: [N, E] float32, bfloat16, float16 or float64.
        keys: [M, E], same dtype and device.
        logit_scale: multiplies the similarities: a number, or a tensor of one element of any floating dtype, which gets
            its exact gradient.
        query_ids, key_ids: [N], [M] int64 or int32: pairs with equal ids are not seen; key_ids default to query_ids.
            Without ids a query sees every key.
        guide, thresholds: ((guide_queries [N, F], guide_keys [M, F]), [N] floating point), both or neither, features in
            the dtype of the queries, without gradient: query i does not see keys with `<guide_queries_i, guide_keys_j>`
            above thresholds_i, such as false negatives. NaN is not above. Instead of numbers a `FalseNegatives` whose
            guide_keys [N, F] are of the queries' targets: its thresholds, computed so that a key whose features equal
            the target's, bit for bit, is seen.
        hardness: h >= 0: `h · <x_i, y_j>` without its gradient is added to every logit. The scale must not be negative.
        backend: None picks the fastest one that supports the call; or "native" (CPU), "triton", "reference".

    Returns:
        [N] float64, differentiable with respect to queries, keys and logit_scale, twice, and in forward mode. -inf for
        a query that sees no key, with zero gradients, whatever follows: also where two of them meet in a logsumexp,
        whose own gradient is NaN there.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        mmkernels.BackendError: `backend` does not support this call.

    Example:
        The loss of GTE for pairs: one softmax over queries and documents, of both sides:

        >>> own = torch.arange(len(queries))
        >>> lse = [
        ...     similarity_logsumexp(queries, documents, 20.0),
        ...     similarity_logsumexp(documents, queries, 20.0),
        ...     similarity_logsumexp(queries, queries, 20.0, query_ids=own),
        ...     similarity_logsumexp(documents, documents, 20.0, query_ids=own),
        ... ]
        >>> positive = 20.0 * (queries * documents).sum(1)
        >>> loss = (torch.stack(lse).logsumexp(0) - positive).mean()

    Source: Li et al. 2023 (arXiv:2308.03281, the loss of the example); Solatorio 2024 (arXiv:2402.16829, guide).
    """
    check_features(queries, keys)
    scale = scalar("logit_scale", logit_scale, queries)
    pairs, harder = unseen_of(queries, keys, query_ids, key_ids), hardness_of(hardness, scale)
    chosen = resolve("contrastive", queries, backend, limits_of({"similarity_logsumexp": True}, queries))
    rule = rule_of(thresholds, queries)
    if rule is not None:
        thresholds = thresholds_of(rule, torch.arange(len(queries), device=queries.device), chosen)
    filtered = guide_of(guide, thresholds, queries, keys)
    of_rows, _ = op.softmax_fwd(queries, keys, scale, pairs, None, filtered, harder, False, False, chosen)
    lse = as_unrounded(of_rows, scale, harder, queries)
    # A constant where nothing is seen, so that a NaN that comes back is not multiplied by a weight of 0.
    return torch.where(lse == -torch.inf, -torch.inf, lse)
