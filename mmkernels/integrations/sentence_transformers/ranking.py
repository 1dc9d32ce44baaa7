"""The losses as functions of embeddings, in O(rows) memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels import FalseNegatives, infonce, similarity_logsumexp

__all__ = ["Columns", "Hardness", "gist", "multiple_negatives"]


class Columns(NamedTuple):
    """A batch, its rows normalised if similarities are cosines.

    queries: [N, E], this rank's.
    documents: of all ranks, [M, E] each column; the first are the positives, the others hard negatives.
    first: the row of the documents that belongs to the first query.
    everyone: queries of all ranks, [M, E], or of this one alone.
    """

    queries: Tensor
    documents: Sequence[Tensor]
    first: int
    everyone: Tensor

    def own(self, column: int = 0) -> Tensor:
        """[N, E]: a column's documents of the rank's queries."""
        return self.documents[column][self.first : self.first + len(self.queries)]

    @property
    def row(self) -> Tensor:
        """[N]: the row of each query among those of all ranks."""
        return torch.arange(self.first, self.first + len(self.queries), device=self.queries.device)

    @property
    def rows(self) -> Tensor:
        """[M]: of all."""
        return torch.arange(len(self.documents[0]), device=self.queries.device)


class Hardness(NamedTuple):
    """strength · stop_grad(similarity) is added to these logits of queries with documents.

    in_batch: those of other queries; own: the query's own negatives.
    """

    strength: float = 0.0
    in_batch: bool = False
    own: bool = False


def multiple_negatives(
    columns: Columns, scale: float, directions: Sequence[str], joint: bool, hardness: Hardness
) -> Tensor:
    """The mean over the rank's rows of log Z - scale · similarity of the pair, a scalar.

    Args:
        columns: the embeddings.
        scale: factor of the similarities.
        directions: parts of the denominator Z: "query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc".
        joint: one softmax over all of them, instead of the mean of one for each.
        hardness: what else is added to logits of "query_to_doc".
    """
    queries, positives, documents = columns.queries, columns.own(), torch.cat(list(columns.documents))
    if tuple(directions) == ("query_to_doc",) and not hardness.strength:
        return infonce(queries, documents, scale, targets=columns.row, symmetric=False)
    but_own: dict[str, Any] = {"query_ids": columns.row, "key_ids": columns.rows.repeat(len(columns.documents))}
    parts = []
    for direction in directions:
        if direction == "query_to_doc":
            parts.append(_to_documents(columns, documents, scale, hardness, but_own))
        elif direction == "query_to_query":
            ids: dict[str, Any] = {"query_ids": columns.row, "key_ids": columns.rows}
            parts.append(similarity_logsumexp(queries, columns.everyone, scale, **ids))
        elif direction == "doc_to_query":
            parts.append(similarity_logsumexp(positives, columns.everyone, scale))
        else:
            parts.append(similarity_logsumexp(positives, documents, scale, **but_own))
    lse = torch.stack(parts)
    denominator = lse.logsumexp(0) if joint else lse.mean(0)
    return _mean(denominator - scale * _similarity(queries, positives), queries)


def _to_documents(
    columns: Columns, documents: Tensor, scale: float, hardness: Hardness, but_own: dict[str, Any]
) -> Tensor:
    """log sum exp over all documents of each of the rank's queries."""
    if not hardness.strength:
        return similarity_logsumexp(columns.queries, documents, scale)
    strength = hardness.strength if hardness.in_batch else 0.0
    logits = [similarity_logsumexp(columns.queries, documents, scale, **but_own, hardness=strength)]
    for i in range(len(columns.documents)):
        similarity = _similarity(columns.queries, columns.own(i))
        penalty = hardness.strength * similarity.detach() if i and hardness.own else 0.0
        logits.append(scale * similarity + penalty)
    return torch.stack(logits).logsumexp(0)


def gist(
    columns: Columns, guide: Columns, scale: float, margin: float, kind: str, anchors: bool, positives: bool
) -> Tensor:
    """The mean over the rank's rows of log Z - scale · similarity of the pair; in Z are the pairs that the guide does
    not find more similar than the row's own pair, less a margin.

    Args:
        columns: the embeddings; guide: those of the guide.
        scale: factor of the similarities.
        margin, kind: as in `mmkernels.FalseNegatives`.
        anchors, positives: whether other queries, and documents that are others' positives, seen from the row's own
            positive, are in Z.
    """
    queries, documents, own = columns.queries, columns.documents, columns.own()
    rule = FalseNegatives(guide.queries, guide.own(), margin, kind)
    # The row's own positive is in Z whatever the guide says, so it joins apart.
    parts = [scale * _similarity(queries, own)]
    ids: dict[str, Any] = {"query_ids": columns.row, "key_ids": columns.rows}
    of_guide = guide.queries, guide.documents[0]
    parts.append(similarity_logsumexp(queries, documents[0], scale, **ids, guide=of_guide, thresholds=rule))
    if anchors:
        of_guide = guide.queries, guide.everyone
        parts.append(similarity_logsumexp(queries, columns.everyone, scale, guide=of_guide, thresholds=rule))
    if positives:
        of_guide = guide.own(), guide.documents[0]
        parts.append(similarity_logsumexp(own, documents[0], scale, guide=of_guide, thresholds=rule))
    if len(documents) > 1:
        of_guide = guide.queries, torch.cat(list(guide.documents[1:]))
        negatives = torch.cat(list(documents[1:]))
        parts.append(similarity_logsumexp(queries, negatives, scale, guide=of_guide, thresholds=rule))
    return _mean(torch.stack(parts).logsumexp(0) - parts[0], queries)


def _similarity(queries: Tensor, documents: Tensor) -> Tensor:
    """[N] float64, of each pair."""
    return (queries.double() * documents.double()).sum(1)


def _mean(losses: Tensor, like: Tensor) -> Tensor:
    return losses.mean().to(torch.promote_types(like.dtype, torch.float32))
