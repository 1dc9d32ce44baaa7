"""Contrastive losses as one writes them in plain PyTorch: what ours are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["USUAL", "chunked_infonce", "chunked_siglip", "plain_statistics"]

Form = Callable[..., Tensor]

CHUNK_ELEMENTS = 2**26  # logits of a chunk under checkpointing: 256 MiB of float32


def infonce_chunk(queries: Tensor, keys: Tensor, logit_scale: Tensor, start: int) -> Tensor:
    labels = torch.arange(start, start + len(queries), device=queries.device)
    return F.cross_entropy(logit_scale * queries @ keys.T, labels, reduction="sum")


def siglip_chunk(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, start: int) -> Tensor:
    logits = logit_scale * queries @ keys.T + logit_bias
    signs = torch.full_like(logits, -1)
    signs.diagonal(start).fill_(1)
    return -F.logsigmoid(signs * logits).sum()


def chunked(chunk_loss: Callable[..., Tensor], queries: Tensor, keys: Tensor, *scalars: Tensor) -> Tensor:
    """Sum over rows in chunks, whose logits are discarded and recomputed in the backward."""
    total = torch.zeros((), dtype=torch.promote_types(queries.dtype, torch.float32), device=queries.device)
    size = max(1, CHUNK_ELEMENTS // len(keys))
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        total = total + checkpoint(chunk_loss, rows, keys, *scalars, start, use_reentrant=False)
    return total


def chunked_infonce(queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
    forth = chunked(infonce_chunk, queries, keys, logit_scale)
    return (forth + chunked(infonce_chunk, keys, queries, logit_scale)) / (2 * len(queries))


def chunked_siglip(queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return chunked(siglip_chunk, queries, keys, logit_scale, logit_bias) / len(queries)


# Options of infonce: (queries, keys, logit_scale, inputs) -> loss


def both_ways(logits: Tensor, target: Tensor | None = None, **options: Any) -> Tensor:
    """Cross entropy of rows and of columns; `target`: class numbers or, symmetric, probabilities."""
    target = torch.arange(len(logits), device=logits.device) if target is None else target
    return (F.cross_entropy(logits, target, **options) + F.cross_entropy(logits.T, target, **options)) / 2


def others(n: int, device: torch.device) -> Tensor:
    """bool [n, n], False on the diagonal."""
    return ~torch.eye(n, dtype=torch.bool, device=device)


def with_ids(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    same = (inputs["ids"][:, None] == inputs["ids"]).to(queries.dtype)
    return both_ways(scale * queries @ keys.T, same / same.sum(1, keepdim=True))


def with_ignored_ids(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    ignored = (inputs["ids"][:, None] == inputs["ids"]) & others(len(queries), queries.device)
    return both_ways((scale * queries @ keys.T).masked_fill(ignored, -torch.inf))


def with_negatives(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    logits, labels = scale * queries @ keys.T, torch.arange(len(queries), device=queries.device)
    every = torch.cat([logits, scale * queries @ inputs["queue"].T], 1)
    return (F.cross_entropy(every, labels) + F.cross_entropy(logits.T, labels)) / 2


def with_label_smoothing(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    return both_ways(scale * queries @ keys.T, label_smoothing=0.1)


def with_teacher(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Momentum distillation, as ALBEF's."""
    logits = scale * queries @ keys.T
    soft = scale.detach() * inputs["teacher_queries"] @ inputs["teacher_keys"].T
    learned = F.cross_entropy(logits, soft.softmax(1)) + F.cross_entropy(logits.T, soft.T.softmax(1))
    return 0.6 * both_ways(logits) + 0.4 * learned / 2


def with_decoupled(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    logits = scale * queries @ keys.T
    negatives = logits.masked_fill(~others(len(logits), logits.device), -torch.inf)
    return ((negatives.logsumexp(1) + negatives.logsumexp(0)) / 2 - logits.diagonal()).mean()


def with_hardness(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    similarities = queries @ keys.T
    return both_ways(scale * similarities + (9.0 * similarities.detach()).fill_diagonal_(0))


def _false(inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """The guide's similarities, those of pairs less the margin, and what is not on the diagonal."""
    similarities = inputs["guide_queries"] @ inputs["guide_keys"].T
    return (
        similarities,
        similarities.diagonal() - inputs["guide_keys"].shape[1] // 8,
        others(len(similarities), similarities.device),
    )


def without_false_negatives(queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """GISTEmbed's, from queries to keys."""
    guide, least, negative = _false(inputs)
    logits = (scale * queries @ keys.T).masked_fill((guide > least[:, None]) & negative, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def without_false_negatives_both_ways(
    queries: Tensor, keys: Tensor, scale: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    guide, least, negative = _false(inputs)
    logits, labels = scale * queries @ keys.T, torch.arange(len(queries), device=queries.device)
    forth = logits.masked_fill((guide > least[:, None]) & negative, -torch.inf)
    back = logits.masked_fill((guide > least) & negative, -torch.inf)
    return (F.cross_entropy(forth, labels) + F.cross_entropy(back.T, labels)) / 2


USUAL: dict[str, Form] = {
    "ids": with_ids,
    "ignored ids": with_ignored_ids,
    "negatives": with_negatives,
    "label smoothing": with_label_smoothing,
    "teacher": with_teacher,
    "decoupled": with_decoupled,
    "hardness": with_hardness,
    "false negatives": without_false_negatives,
    "false negatives, both ways": without_false_negatives_both_ways,
}


def plain_statistics(queries: Tensor, keys: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """The loss, its gradients, the share of queries whose key is the nearest, and the mean entropy, of one matrix."""
    logits = scale * queries @ keys.T
    loss = both_ways(logits)
    with torch.no_grad():
        right = logits.argmax(1) == torch.arange(len(logits), device=logits.device)
        accuracy = right.to(torch.promote_types(logits.dtype, torch.float32)).mean()
        entropies = [-(s.softmax(1) * s.log_softmax(1)).sum(1).mean() for s in (logits, logits.T)]
    return loss, *torch.autograd.grad(loss, [queries, keys, scale]), accuracy, (entropies[0] + entropies[1]) / 2
