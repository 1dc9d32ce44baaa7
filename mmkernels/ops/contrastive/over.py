"""A loss over the rows of one process; over_ranks.py has the same methods over those of all ranks of a group."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.types import Pairs, Teacher

__all__ = ["Local"]


class Local:
    """How the statistics of the whole batch are computed and merged: here, by one process that has all of it.

    Attributes:
        queries, keys: how many each rank has.
    """

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        self.queries, self.keys = [queries.shape[0]], [keys.shape[0]]

    def softmax(
        self,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        pairs: Pairs,
        teacher: Teacher | None,
        totals: bool,
        columns: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        """`op.softmax_fwd` of the whole batch: the rows that are here over all keys, the columns over all queries."""
        return op.softmax_fwd(queries, keys, logit_scale, pairs, teacher, totals, columns, backend)

    def of_negatives(self, queries: Tensor, negatives: Tensor, logit_scale: Tensor, backend: str) -> Tensor | None:
        """Statistics [7, N] of the rows that are here over all negatives; None where there are none."""
        if negatives.shape[0] == 0:
            return None
        return op.softmax_fwd(queries, negatives, logit_scale, Pairs(), None, False, False, backend)[0]

    def sigmoid(
        self, queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, backend: str
    ) -> Tensor:
        """`op.sigmoid_fwd` of the rows that are here and all keys."""
        return op.sigmoid_fwd(queries, keys, logit_scale, logit_bias, pairs, backend)

    def shared(self, scalar: Tensor) -> Tensor:
        """A scalar that all ranks have, with its whole gradient."""
        return scalar

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Every rank's rows, of which each has so many."""
        return rows

    def each_has_one(self, name: str, positives: Tensor | int) -> None:
        """Raise where an id of this name is without its like; here that has been checked with the arguments."""

    def total(self, share: Tensor) -> Tensor:
        """The sum of every rank's share; differentiable."""
        return share

    def mean(self, losses: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
        """The mean loss of each direction's rows, and of the directions; differentiable."""
        means = [_mean(loss, None if weights is None else weights[i]) for i, loss in enumerate(losses)]
        return means[0] if len(means) == 1 else (means[0] + means[1]) / 2

    def summed(self, sums: Tensor) -> Tensor:
        """The sum of every rank's, without a gradient."""
        return sums


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    if losses.shape[0] == 0:
        return losses.sum()
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / weights.sum()
