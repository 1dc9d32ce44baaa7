"""A loss over the rows of one process; over_ranks.py implements the same methods for a process group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.types import Guide, Pairs, Teacher

__all__ = ["Local"]


class Local:
    """Computes and merges the statistics of the global batch, for one process that has all of it.

    Attributes:
        queries, keys: row counts per rank.
        first_key: the index of this rank's first key among all keys.
    """

    first_key = 0

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = [queries.shape[0]], [keys.shape[0]]

    def softmax(
        self,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        pairs: Pairs,
        teacher: Teacher | None,
        guide: Guide | None,
        hardness: float,
        totals: bool,
        columns: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """`op.softmax_fwd` of the global batch: local rows over all keys, local columns over all queries."""
        return op.softmax_fwd(queries, keys, logit_scale, pairs, teacher, guide, hardness, totals, columns, backend)

    def turned(
        self,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        pairs: Pairs,
        guide: Guide | None,
        hardness: float,
        backend: str,
    ) -> Tensor:
        """Statistics [7, M] of local keys as rows, over all queries; pairs and guide are those of the transpose."""
        return op.softmax_fwd(keys, queries, logit_scale, pairs, None, guide, hardness, False, False, backend)[0]

    def of_negatives(
        self,
        queries: Tensor,
        negatives: Tensor,
        logit_scale: Tensor,
        guide: Guide | None,
        hardness: float,
        backend: str,
    ) -> Tensor | None:
        """Statistics [7, N] of local rows over all negatives; None without negatives."""
        if negatives.shape[0] == 0:
            return None
        rules = Pairs(), None, guide, hardness, False, False
        return op.softmax_fwd(queries, negatives, logit_scale, *rules, backend)[0]

    def sigmoid(
        self, queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, backend: str
    ) -> Tensor:
        """`op.sigmoid_fwd` of local rows and all keys."""
        return op.sigmoid_fwd(queries, keys, logit_scale, logit_bias, pairs, backend)

    def shared(self, scalar: Tensor) -> Tensor:
        """A scalar shared by all ranks, with its full gradient."""
        return scalar

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows; counts: rows per rank."""
        return rows

    def each_has_one(self, name: str, positives: Tensor | int) -> None:
        """Raise if an id has no match; here the argument checks already did."""

    def total(self, share: Tensor) -> Tensor:
        """The sum of the ranks' shares; differentiable."""
        return share

    def mean(self, losses: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
        """The mean loss over rows, then over directions; differentiable."""
        means = [_mean(loss, None if weights is None else weights[i]) for i, loss in enumerate(losses)]
        return means[0] if len(means) == 1 else (means[0] + means[1]) / 2

    def summed(self, sums: Tensor) -> Tensor:
        """The sum over the ranks, without a gradient."""
        return sums


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    if losses.shape[0] == 0:
        return losses.sum()
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / weights.sum()
