"""Types shared by the contrastive ops and backends: pairs, teacher, softmax statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "BEST",
    "COEFFICIENTS",
    "LSE",
    "MEAN",
    "POSITIVE",
    "STATISTICS",
    "TEACHER",
    "TOP",
    "TOTAL",
    "ContrastiveStats",
    "Denominator",
    "FalseNegatives",
    "Guide",
    "Means",
    "Need",
    "Pairs",
    "Slopes",
    "Targets",
    "Teacher",
    "beside",
    "merged",
    "merged_parts",
    "nothing_seen",
]

# Lines of the statistics, float64 [7, N] of rows and [7, M] of columns; csrc/contrastive/contrastive.h has the same.
# LSE       log sum exp of the logits seen; -inf if none
#   POSITIVE  sum of positive similarities
# TOTAL     sum of the similarities seen if `totals`, else 0
#   TEACHER   mean similarity under the teacher's softmax; 0 without a teacher
# MEAN      mean similarity under the softmax; 0 if nothing is seen
#   TOP       largest logit seen
#   BEST      largest positive logit
# The first COEFFICIENTS are differentiable; a backward takes one coefficient for each.
LSE, POSITIVE, TOTAL, TEACHER, MEAN, TOP, BEST = range(7)
STATISTICS, COEFFICIENTS = 7, 4


class Pairs(NamedTuple):
    """Which pairs are positive and which are seen.

    same_id "positive" with ids: pairs with equal ids are positive. Otherwise key targets[i] is the positive of query i,
    -1 for none among these keys. same_id "ignore": pairs with equal ids that are not positive are not seen.

    targets: [N] int64. query_ids: [N], key_ids: [M] int64; both or neither.
    """

    targets: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    same_id: str = "positive"


class Teacher(NamedTuple):
    """Soft targets: features [N, F] and [M, F] of a momentum teacher, and its logits' lse, float64 [N] and [M]."""

    teacher_queries: Tensor
    teacher_keys: Tensor
    teacher_lse_q: Tensor
    teacher_lse_k: Tensor | None  # None without column statistics


class FalseNegatives(NamedTuple):
    """Which keys `infonce` takes for false negatives: those that a guide, a model that is already good, finds more
    similar to a query than the query's own key, less a margin.

    With g the inner products of the guide's features, query i does not see key j, unless it is its target, if:

        g_ij > g_i,target - margin                            kind "absolute"
        g_ij > g_i,target - margin · |g_i,target|             kind "relative"

    Keys see queries by the same rule with the roles exchanged. A key that ties is seen. The features are used as they
    are: normalise them if the guide's similarity is a cosine. They get no gradient.

    guide_queries: [N, F], guide_keys: [M, F], in the dtype of the queries.
    margin: a number; negative keeps more keys.
    kind: "absolute" or "relative".
    guide_negatives: [K, F] or [N, K, F], as `negatives`; required with them.

    Source: Solatorio 2024 (arXiv:2402.16829, GISTEmbed); Moreira et al. 2024 (arXiv:2407.15831, margins).
    """

    guide_queries: Tensor
    guide_keys: Tensor
    margin: float = 0.0
    kind: str = "absolute"
    guide_negatives: Tensor | None = None


class Denominator(NamedTuple):
    """How a row's denominator differs from the sum over all keys that it sees.

    decoupled: the row's positives are left out.
    hardness: times the similarity, without a gradient, is added to each negative's logit.
    false_negatives: what else is left out.
    """

    decoupled: bool = False
    hardness: float = 0.0
    false_negatives: FalseNegatives | None = None

    def apart(self) -> bool:  # torch 2.6 compiles no property of a NamedTuple
        """Whether positives are not summed with the other keys."""
        return self.decoupled or self.hardness > 0


class Guide(NamedTuple):
    """A filter of what a row sees: keys whose similarity under other features, [N, F] and [M, F], is above the row's
    threshold [N] (in the statistics' dtype) are left out, except its target."""

    guide_queries: Tensor
    guide_keys: Tensor
    thresholds: Tensor


class Targets(NamedTuple):
    """What defines the target distribution besides the pairs: smoothing, and (queries_m, keys_m, alpha)."""

    label_smoothing: float
    teacher: tuple[Tensor, Tensor, float] | None


class Need(NamedTuple):
    """Which feature gradients a backward computes; the others are [0, E]."""

    need_queries: bool
    need_keys: bool


class Means(NamedTuple):
    """MEAN of rows [N] and of columns [M], float64, for the gradient of the scale."""

    mean_q: Tensor
    mean_k: Tensor


class Slopes(NamedTuple):
    """Derivatives [] of a loss by scale and bias."""

    grad_scale: Tensor
    grad_bias: Tensor


class ContrastiveStats(NamedTuple):
    """Statistics of a loss's logits, detached; float32 (float64 for float64 features).

    lse_q: [N], lse_k: [M]: log sum exp of each row's and each column's logits (SigLIP's: with the bias).
    accuracy_q, accuracy_k: []: how often no negative's logit exceeds the best positive's (ties count as correct).
    positive, negative: []: mean similarity of the positive pairs and of all other pairs seen (NaN if there are none).
    entropy: []: mean entropy of the softmax over rows (and columns, if the loss is symmetric), in nats.
    """

    lse_q: Tensor
    lse_k: Tensor
    accuracy_q: Tensor
    accuracy_k: Tensor
    positive: Tensor
    negative: Tensor
    entropy: Tensor


torch.serialization.add_safe_globals([ContrastiveStats, FalseNegatives])


def beside(pairs: Pairs, targets: Targets, return_stats: bool) -> bool:
    """Whether a loss whose positives are apart needs statistics over all keys besides the lse over the others; if not,
    the similarity of each row's one target will do."""
    return pairs.targets is None or targets.label_smoothing > 0 or targets.teacher is not None or return_stats


def nothing_seen(features: Tensor) -> Tensor:
    """The statistics [7, count] of rows that see nothing."""
    statistics = features.new_zeros(STATISTICS, features.shape[0], dtype=torch.float64)
    for line in (LSE, TOP, BEST):
        statistics[line] = -torch.inf
    return statistics


def merged(a: Tensor, b: Tensor) -> Tensor:
    """The statistics [7, count] of the union of two parts."""
    both = a + b
    both[LSE] = torch.logaddexp(a[LSE], b[LSE])
    # If neither has seen anything, the means are 0.
    of_a, of_b = (torch.where(both[LSE] == -torch.inf, 0.0, (of[LSE] - both[LSE]).exp()) for of in (a, b))
    both[MEAN] = of_a * a[MEAN] + of_b * b[MEAN]
    for line in (TOP, BEST):
        both[line] = torch.maximum(a[line], b[line])
    return both


def merged_parts(parts: Tensor) -> Tensor:
    """The statistics [7, count] of the union of W parts [W, 7, count], in as many ops for any W."""
    union, lse = parts.sum(0), parts[:, LSE].logsumexp(0)
    union[LSE] = lse
    shares = torch.where(lse == -torch.inf, 0.0, (parts[:, LSE] - lse).exp())
    union[MEAN] = (shares * parts[:, MEAN]).sum(0)
    for line in (TOP, BEST):
        union[line] = parts[:, line].amax(0)
    return union
