"""Losses of sentence-transformers whose score matrices are streamed."""

from __future__ import annotations

from typing import Any

import sentence_transformers.sentence_transformer.losses as theirs
import torch
import torch.nn.functional as F
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor

from mmkernels.integrations.sentence_transformers.ranking import Columns, Hardness, gist, multiple_negatives

__all__ = [
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "MultipleNegativesRankingLoss",
]


class MultipleNegativesRankingLoss(theirs.MultipleNegativesRankingLoss):
    """InfoNCE with the other samples of the batch, and with columns of hard negatives, as negatives.

    Arguments as in sentence-transformers; `similarity_fct` is `cos_sim` or `dot_score`.

    Raises:
        ValueError: another `similarity_fct`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _is_cosine(self.similarity_fct)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None) -> Tensor:
        if len(embeddings) < 2:
            raise ValueError(f"embeddings: expected those of at least two columns, got {len(embeddings)}")
        return _ranked(self, embeddings)


class CachedMultipleNegativesRankingLoss(theirs.CachedMultipleNegativesRankingLoss):
    """`MultipleNegativesRankingLoss` of large batches: embeddings in mini-batches, their gradients cached.

    Arguments as in sentence-transformers; `similarity_fct` is `cos_sim` or `dot_score`. The loss is computed at once,
    whatever the size of mini-batches, in O(rows) memory.

    Raises:
        ValueError: another `similarity_fct`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _is_cosine(self.similarity_fct)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        return _finished(_ranked(self, [torch.cat(parts) for parts in reps]), with_backward)


class CachedGISTEmbedLoss(theirs.CachedGISTEmbedLoss):
    """`CachedMultipleNegativesRankingLoss` without the negatives that a guide model finds too similar.

    Arguments as in sentence-transformers. The loss is computed at once, whatever the size of mini-batches, in O(rows)
    memory; sentence-transformers holds [mini-batch, rows, width].
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], reps_guided: list[list[Tensor]], *, with_backward: bool = False
    ) -> Tensor:
        if len(reps) != len(reps_guided):
            raise ValueError(f"reps_guided: expected {len(reps)} columns like reps, got {len(reps_guided)}")
        own, guide = ([torch.cat(parts) for parts in columns] for columns in (reps, reps_guided))
        return _finished(_guided(self, own, guide), with_backward)


def _is_cosine(similarity: Any) -> bool:
    if similarity not in (cos_sim, dot_score):
        raise ValueError(
            f"similarity_fct: expected cos_sim or dot_score of sentence_transformers.util, got {similarity}"
        )
    return similarity is cos_sim


def _finished(loss: Tensor, with_backward: bool) -> Tensor:
    if not with_backward:
        return loss
    loss.backward()
    return loss.detach()


def _ranked(loss: Any, embeddings: list[Tensor]) -> Tensor:
    if _is_cosine(loss.similarity_fct):
        embeddings = [F.normalize(each, dim=-1) for each in embeddings]
    mode = loss.hardness_mode
    hardness = Hardness(
        0.0 if mode is None else loss.hardness_strength,
        in_batch=mode in ("in_batch_negatives", "all_negatives"),
        own=mode in ("hard_negatives", "all_negatives"),
    )
    columns = _columns(embeddings, loss.gather_across_devices)
    if loss.gather_across_devices:
        columns = columns._replace(everyone=all_gather_with_grad(columns.queries))
    return multiple_negatives(columns, loss.scale, loss.directions, loss.partition_mode == "joint", hardness)


def _guided(loss: Any, embeddings: list[Tensor], of_guide: list[Tensor]) -> Tensor:
    """Anchors are contrasted with anchors of their own rank, as in sentence-transformers."""
    dtype = torch.promote_types(embeddings[0].dtype, of_guide[0].dtype)  # thresholds are compared in the guide's
    own, guide = (
        _columns([F.normalize(each.to(dtype), dim=-1, eps=1e-8) for each in columns], loss.gather_across_devices)
        for columns in (embeddings, of_guide)
    )
    kinds = loss.contrast_anchors, loss.contrast_positives
    return gist(own, guide, 1.0 / loss.temperature, loss.margin, loss.margin_strategy, *kinds)


def _columns(embeddings: list[Tensor], gathered: bool) -> Columns:
    """Documents of all ranks, queries of this one."""
    queries, documents = embeddings[0], embeddings[1:]
    if not gathered:
        return Columns(queries, documents, 0, queries)
    everyone = [all_gather_with_grad(column) for column in documents]
    return Columns(queries, everyone, get_rank() * len(queries), queries)
