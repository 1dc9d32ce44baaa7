"""Contrastive reference semantics: PyTorch with the N x M logits in memory, float64-capable.

Features are first converted to the statistics' dtype: float64 for float64, otherwise float32.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels.ops.contrastive.types import (
    LSE,
    POSITIVE,
    STATISTICS,
    TEACHER,
    TOTAL,
    Guide,
    Need,
    Pairs,
    Teacher,
)
from mmkernels.ops.dtypes import compute_dtype

__all__ = [
    "infonce_bwd",
    "infonce_fwd",
    "no_autocast",
    "of_targets",
    "own_pairs",
    "positive_and_seen",
    "sample_negatives",
    "siglip_bwd",
    "siglip_fwd",
    "sigmoid_bwd",
    "sigmoid_fwd",
    "softmax_bwd",
    "softmax_fwd",
    "softmax_of_seen",
    "topk_similar",
]


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _similarity(queries: Tensor, keys: Tensor) -> Tensor:
    dtype = compute_dtype(queries.dtype)
    with no_autocast(queries):
        return queries.to(dtype) @ keys.to(dtype).T  # [N, M]


def _feature_gradients(grad_similarity: Tensor, queries: Tensor, keys: Tensor, need: Need) -> tuple[Tensor, Tensor]:
    dtype = grad_similarity.dtype
    with no_autocast(queries):
        dqueries = grad_similarity @ keys.to(dtype) if need.need_queries else queries.new_empty(0, queries.shape[1])
        dkeys = grad_similarity.T @ queries.to(dtype) if need.need_keys else keys.new_empty(0, keys.shape[1])
    return dqueries.to(queries.dtype), dkeys.to(keys.dtype)


def positive_and_seen(similarity: Tensor, pairs: Pairs, guide: Guide | None = None) -> tuple[Tensor, Tensor]:
    """Which pairs are positive, and which are seen: bool [N, M] each."""
    positive, seen = _by_pairs(similarity, pairs)
    if guide is None:
        return positive, seen
    above = _similarity(guide.guide_queries, guide.guide_keys) > guide.thresholds[:, None]
    return positive, seen & ~(above & ~positive)


def _by_pairs(similarity: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    targets, query_ids, key_ids, same_id = pairs
    n, m = similarity.shape
    positive = torch.zeros(n, m, dtype=torch.bool, device=similarity.device)
    if targets is not None:
        positive = targets[:, None] == torch.arange(m, device=similarity.device)
    if query_ids is None or key_ids is None:
        return positive, torch.ones_like(positive)
    same = query_ids[:, None] == key_ids
    return (same, torch.ones_like(same)) if same_id == "positive" else (positive, ~same | positive)


# Softmax statistics


def softmax_of_seen(logits: Tensor, lse: Tensor, seen: Tensor) -> Tensor:
    """exp(logits - lse) of pairs seen; 0 in a row that sees nothing."""
    return torch.where(seen & (lse != -torch.inf), (logits - lse).exp(), 0.0).to(logits.dtype)


def _softmax_of_teacher(
    teacher: Teacher | None, logit_scale: Tensor, seen: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The teacher's softmax over rows and over columns: [N, M] each."""
    if teacher is None:
        return None, None
    queries, keys, lse_q, lse_k = teacher
    logits = logit_scale * _similarity(queries, keys)
    of_rows = softmax_of_seen(logits, lse_q[:, None], seen)
    return of_rows, None if lse_k is None else softmax_of_seen(logits, lse_k[None], seen)


def _highest(logits: Tensor, among: Tensor) -> Tensor:
    padded = F.pad(logits.masked_fill(~among, -torch.inf), (0, 1), value=-torch.inf)
    return padded.amax(1)


def _statistics(
    similarity: Tensor, logits: Tensor, positive: Tensor, seen: Tensor, totals: bool, teacher: Tensor | None
) -> Tensor:
    """Statistics of each row: [7, N] float64."""
    lse = logits.double().masked_fill(~seen, -torch.inf).logsumexp(1)
    a = similarity.double()
    mean = (softmax_of_seen(logits, lse[:, None], seen).double() * a).sum(1)
    zero = torch.zeros_like(lse)
    return torch.stack(
        [
            lse,
            torch.where(positive, a, 0.0).sum(1),
            torch.where(seen, a, 0.0).sum(1) if totals else zero,
            (teacher.double() * a).sum(1) if teacher is not None else zero,
            mean,
            _highest(logits.double(), seen),
            _highest(logits.double(), positive),
        ]
    )


def softmax_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    totals: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Statistics of rows [7, N] and columns [7, M] (or [7, 0]) in float64."""
    similarity = _similarity(queries, keys)
    logits = logit_scale * similarity
    positive, seen = positive_and_seen(similarity, pairs, guide)
    of_q, of_k = _softmax_of_teacher(teacher, logit_scale, seen)
    of_rows = _statistics(similarity, logits, positive, seen, totals, of_q)
    if not columns:
        return of_rows, of_rows.new_empty(STATISTICS, 0)
    return of_rows, _statistics(similarity.T, logits.T, positive.T, seen.T, totals, None if of_k is None else of_k.T)


def softmax_bwd(
    coefficients_q: Tensor,
    coefficients_k: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    similarity = _similarity(queries, keys)
    logits = logit_scale * similarity
    positive, seen = positive_and_seen(similarity, pairs, guide)
    columns = coefficients_k.shape[1] > 0
    scale = logit_scale.double()
    of_q, of_k = coefficients_q.double()[:, :, None], coefficients_k.double()[:, None, :]
    grad = (
        scale * of_q[LSE] * softmax_of_seen(logits, lse_q[:, None], seen)
        + of_q[POSITIVE] * positive
        + of_q[TOTAL] * seen
    )
    if columns:
        grad += (
            scale * of_k[LSE] * softmax_of_seen(logits, lse_k[None], seen)
            + of_k[POSITIVE] * positive
            + of_k[TOTAL] * seen
        )
    teacher_q, teacher_k = _softmax_of_teacher(teacher, logit_scale, seen)
    if teacher_q is not None:
        grad += of_q[TEACHER] * teacher_q
    if columns and teacher_k is not None:
        grad += of_k[TEACHER] * teacher_k
    return _feature_gradients(grad.to(similarity.dtype), queries, keys, need)


def of_targets(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """[N]: the similarity of each query and its target, from the product that `softmax_fwd` computes."""
    return _similarity(queries, keys).gather(1, targets[:, None])[:, 0]


# Sigmoid


def _signs(similarity: Tensor, pairs: Pairs) -> Tensor:
    positive, _ = positive_and_seen(similarity, pairs)
    return torch.where(positive, 1.0, -1.0).to(similarity.dtype)


def sigmoid_fwd(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[3] float64: the sum of the losses of all pairs, and its derivatives by scale and bias."""
    similarity = _similarity(queries, keys)
    signs = _signs(similarity, pairs)
    z = signs * (logit_scale * similarity + logit_bias)
    grad = -signs * torch.sigmoid(-z)
    return torch.stack([-F.logsigmoid(z).double().sum(), (grad * similarity).double().sum(), grad.double().sum()])


def sigmoid_bwd(
    grad_sum: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    similarity = _similarity(queries, keys)
    signs = _signs(similarity, pairs)
    grad = -signs * torch.sigmoid(-signs * (logit_scale * similarity + logit_bias))
    factor = (grad_sum * logit_scale.double()).to(grad.dtype)
    return _feature_gradients(grad * factor, queries, keys, need)


# The plain losses: N queries and N keys; the positive of query i is key i


def own_pairs(queries: Tensor) -> Pairs:
    return Pairs(torch.arange(queries.shape[0], device=queries.device))


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
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [N, E]; [0, E] where not needed."""
    logits = logit_scale * _similarity(queries, keys)
    n = max(logits.shape[0], 1)
    grad = ((logits - lse_q[:, None]).exp() + (logits - lse_k[None, :]).exp()).to(logits.dtype)
    grad.diagonal().sub_(2)
    return _feature_gradients(grad * (grad_loss * logit_scale / (2 * n)), queries, keys, need)


def siglip_fwd(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss [], d loss / d logit_scale [], d loss / d logit_bias []."""
    sums = sigmoid_fwd(queries, keys, logit_scale, logit_bias, own_pairs(queries))
    loss, by_scale, by_bias = (sums / max(queries.shape[0], 1)).to(compute_dtype(queries.dtype)).unbind()
    return loss.clone(), by_scale.clone(), by_bias.clone()


def siglip_bwd(
    grad_loss: Tensor,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    need: Need,
) -> tuple[Tensor, Tensor]:
    """dqueries [N, E], dkeys [M, E]; [0, E] where not needed."""
    grad_sum, own = grad_loss.double() / max(queries.shape[0], 1), own_pairs(queries)
    return sigmoid_bwd(grad_sum, queries, keys, logit_scale, logit_bias, own, need)


# Retrieval


def _mixed(x: Tensor) -> Tensor:
    """A 32-bit integer hash (in int64); every output bit depends on every input bit."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _exponential(seed: Tensor, n: int, m: int) -> Tensor:
    """Noise [N, M] float64: counter-based exponential variates, one per pair; the kernels draw the same."""
    rows = _mixed(torch.arange(n, device=seed.device) ^ seed[0])
    columns = torch.arange(m, device=seed.device)
    bits = _mixed(_mixed(columns[None] ^ rows[:, None]) ^ seed[1])
    u = (bits.double() + 0.5) * 2.0**-32
    return -torch.log1p(-u)


def sample_negatives(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    seed: Tensor,
    pairs: Pairs,
) -> Tensor:
    """[N] int64: a negative drawn with its softmax probability among the negatives; -1 if there is none."""
    similarity = _similarity(queries, keys)
    positive, _ = positive_and_seen(similarity, pairs)
    if pairs.query_ids is not None and pairs.targets is not None:
        positive = positive | (pairs.targets[:, None] == torch.arange(keys.shape[0], device=keys.device))
    score = logit_scale.double() * similarity.double() - _exponential(seed, *similarity.shape).log()
    score = F.pad(score.masked_fill(positive, -torch.inf), (0, 1), value=-torch.inf)
    top, index = score.max(1)
    return torch.where(top == -torch.inf, -1, index)


def topk_similar(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """values [N, k], indices [N, k] int64: the most similar keys first, ties by lower index."""
    similarity = _similarity(queries, keys)
    similarity = similarity.masked_fill(similarity.isnan(), -torch.inf)
    values, indices = similarity.sort(dim=1, descending=True, stable=True)
    return values[:, :k].clone(), indices[:, :k].clone()
