"""The contrastive oracle: plain PyTorch with the N x M logits in memory; float64-capable, no cleverness.

Features are converted up to the type of the statistics first: float32, or float64 when they are float64.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["infonce_bwd", "infonce_fwd", "siglip_bwd", "siglip_fwd", "statistics_dtype"]


def statistics_dtype(features: torch.dtype) -> torch.dtype:
    """The type of loss, lse and scalar gradients for features of a type."""
    return torch.float64 if features == torch.float64 else torch.float32


def _no_autocast(x: Tensor) -> AbstractContextManager[None]:
    return torch.autocast(x.device.type, enabled=False)


def _similarity(queries: Tensor, keys: Tensor) -> Tensor:
    dtype = statistics_dtype(queries.dtype)
    with _no_autocast(queries):
        return queries.to(dtype) @ keys.to(dtype).T  # [N, M]


def _feature_gradients(
    grad_similarity: Tensor, queries: Tensor, keys: Tensor, need_queries: bool, need_keys: bool
) -> tuple[Tensor, Tensor]:
    dtype = grad_similarity.dtype
    with _no_autocast(queries):
        dqueries = grad_similarity @ keys.to(dtype) if need_queries else queries.new_empty(0, queries.shape[1])
        dkeys = grad_similarity.T @ queries.to(dtype) if need_keys else keys.new_empty(0, keys.shape[1])
    return dqueries.to(queries.dtype), dkeys.to(keys.dtype)


def infonce_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [], lse_q [N] and lse_k [N] in float64, d loss / d logit_scale []."""
    similarity = _similarity(queries, keys)
    n = max(similarity.shape[0], 1)
    logits = logit_scale * similarity
    lse_q, lse_k = logits.double().logsumexp(1), logits.double().logsumexp(0)
    loss = (lse_q + lse_k - 2 * logits.diagonal()).sum() / (2 * n)
    positive = similarity.diagonal()
    grad_scale = (
        logits.softmax(1) * (similarity - positive[:, None]) + logits.softmax(0) * (similarity - positive)
    ).sum()
    return loss.to(logits.dtype), lse_q, lse_k, grad_scale / (2 * n)


def infonce_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    logits = logit_scale * _similarity(queries, keys)
    n = max(logits.shape[0], 1)
    grad = ((logits - lse_q[:, None]).exp() + (logits - lse_k[None, :]).exp()).to(logits.dtype)
    grad.diagonal().sub_(2)
    return _feature_gradients(grad * (grad_loss * logit_scale / (2 * n)), queries, keys, need_queries, need_keys)


def _signs(similarity: Tensor) -> Tensor:
    return 2 * torch.eye(*similarity.shape, dtype=similarity.dtype, device=similarity.device) - 1


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    similarity = _similarity(queries, keys)
    n = max(similarity.shape[0], 1)
    signs = _signs(similarity)
    z = signs * (logit_scale * similarity + logit_bias)
    loss = -F.logsigmoid(z).sum() / n
    grad = -signs * torch.sigmoid(-z)
    return loss, (grad * similarity).sum() / n, grad.sum() / n


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need_queries: bool,
    need_keys: bool,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    similarity = _similarity(queries, keys)
    n = max(similarity.shape[0], 1)
    signs = _signs(similarity)
    grad = -signs * torch.sigmoid(-signs * (logit_scale * similarity + logit_bias))
    return _feature_gradients(grad * (grad_loss * logit_scale / n), queries, keys, need_queries, need_keys)
