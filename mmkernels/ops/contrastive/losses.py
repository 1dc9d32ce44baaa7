"""The losses from the statistics of rows and columns: all that is O(N + M), in float64 and plain PyTorch.

A row's loss is cross entropy, lse - scale · (mean similarity of its target distribution), and the target distribution
enters only through sums that the statistics have: of positives, of all keys seen, and under a teacher's softmax.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.reference import BEST, LSE, MEAN, POSITIVE, TEACHER, TOP, TOTAL, statistics_dtype

__all__ = [
    "ContrastiveStats",
    "Pairs",
    "Targets",
    "infonce_loss",
    "occurrences",
    "siglip_loss",
    "siglip_stats",
    "stats_of",
    "stats_sums",
    "weights_of_columns",
]


class ContrastiveStats(NamedTuple):
    """What a loss saw, detached; in float32 (float64 for float64 features).

    lse_q: [N], lse_k: [M]: log sum exp of each row's and each column's logits (SigLIP's: with the bias).
    accuracy_q, accuracy_k: []: how often no negative's logit is larger than that of the best positive (a tie counts).
    positive, negative: []: mean similarity of the positive pairs and of all other pairs seen (NaN where there is none).
    entropy: []: mean entropy of the softmax of rows (and columns, when the loss is symmetric), in nats.
    """

    lse_q: Tensor
    lse_k: Tensor
    accuracy_q: Tensor
    accuracy_k: Tensor
    positive: Tensor
    negative: Tensor
    entropy: Tensor


torch.serialization.add_safe_globals([ContrastiveStats])


def occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each id occurs among others."""
    ordered = among.sort().values
    last, first = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (True, False))
    return last - first


@dataclass(frozen=True)
class Pairs:
    """Which pairs are positive and which are seen; see op.py."""

    targets: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    same_id: str
    sizes: tuple[int, int]

    def rule(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, str]:
        """As the ops want it."""
        return self.targets, self.query_ids, self.key_ids, self.same_id

    def positives(self) -> tuple[Tensor | int, Tensor | int]:
        """How many each row and each column has."""
        if self.query_ids is None or self.key_ids is None or self.same_id == "ignore":
            return 1, 1
        return occurrences(self.query_ids, self.key_ids), occurrences(self.key_ids, self.query_ids)

    def seen(self) -> tuple[Tensor | int, Tensor | int]:
        """How many keys each row sees, and how many queries each column."""
        n, m = self.sizes
        if self.query_ids is None or self.key_ids is None or self.same_id != "ignore":
            return m, n
        assert self.targets is not None
        # A target counts among those of its id if it has that id.
        alike = (self.key_ids[self.targets] == self.query_ids).long()
        alike_k = torch.zeros_like(self.key_ids).index_add(0, self.targets, alike)
        return (
            m - occurrences(self.query_ids, self.key_ids) + alike,
            n - occurrences(self.key_ids, self.query_ids) + alike_k,
        )


@dataclass(frozen=True)
class Targets:
    """What else makes the target distribution."""

    label_smoothing: float
    teacher: tuple[Tensor, Tensor, float] | None

    def loss(self, line: Tensor, lse: Tensor, scale: Tensor, positives: Tensor | int, seen: Tensor | int) -> Tensor:
        """Of each row or column, from its statistics; lse counts the negatives too."""
        similarity = line[POSITIVE] / positives
        if self.label_smoothing > 0:
            uniform = line[TOTAL] / seen
            similarity = similarity.lerp(uniform, self.label_smoothing)
        if self.teacher is not None:
            similarity = similarity.lerp(line[TEACHER], self.teacher[2])
        return lse - scale * similarity


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    if losses.shape[0] == 0:
        return losses.sum()
    if weights is None:
        return losses.mean()
    return (weights * losses).sum() / weights.sum()


def weights_of_columns(weights: Tensor, pairs: Pairs) -> Tensor:
    """A key has the weight of the query whose target it is, else of that at its place."""
    return weights if pairs.targets is None else torch.zeros_like(weights).index_copy(0, pairs.targets, weights)


def infonce_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    targets: Targets,
    negatives: Tensor | None,
    weights: Tensor | None,
    symmetric: bool,
    return_stats: bool,
    backend: str,
) -> tuple[Tensor, ContrastiveStats | None]:
    """The loss, [] in the type of the statistics, and what it saw."""
    totals, columns = targets.label_smoothing > 0 or return_stats, symmetric or return_stats
    taught: tuple[Tensor | None, ...] = (None,) * 4
    if targets.teacher is not None:
        features = targets.teacher[0].detach(), targets.teacher[1].detach()
        no_teacher = (None,) * 4
        with torch.no_grad():
            of_rows, of_columns = op.softmax_fwd(
                *features, logit_scale.detach(), *pairs.rule(), *no_teacher, False, columns, backend
            )
        taught = *features, of_rows[LSE], of_columns[LSE] if columns else None
    of_rows, of_columns = op.softmax_fwd(queries, keys, logit_scale, *pairs.rule(), *taught, totals, columns, backend)
    extra = None
    lse_q = of_rows[LSE]
    if negatives is not None and negatives.shape[0] > 0:
        nothing: tuple[None, ...] = (None,) * 3
        extra, _ = op.softmax_fwd(
            queries, negatives, logit_scale, *nothing, "positive", *(None,) * 4, False, False, backend
        )
        lse_q = torch.logaddexp(lse_q, extra[LSE])
    scale = logit_scale.double()
    (positives_q, positives_k), (seen_q, seen_k) = pairs.positives(), pairs.seen()
    wide = None if weights is None else weights.double()
    loss = _mean(targets.loss(of_rows, lse_q, scale, positives_q, seen_q), wide)
    if symmetric:
        losses = targets.loss(of_columns, of_columns[LSE], scale, positives_k, seen_k)
        loss = (loss + _mean(losses, None if wide is None else weights_of_columns(wide, pairs))) / 2
    dtype = statistics_dtype(queries.dtype)
    stats = None
    if return_stats:
        lines = of_rows.detach(), of_columns.detach(), None if extra is None else extra.detach()
        sums = stats_sums(*lines, scale.detach(), positives_q, seen_q)
        stats = stats_of(lse_q.detach(), lines[1][LSE], sums, symmetric, dtype)
    return loss.to(dtype), stats


def stats_sums(
    of_rows: Tensor,
    of_columns: Tensor,
    extra: Tensor | None,
    scale: Tensor,
    positives: Tensor | int,
    seen: Tensor | int,
) -> Tensor:
    """[5, 2] float64: what the means of `ContrastiveStats` are made of, summed over rows and columns.

    Of rows and columns: their number, entropies, and how often the best positive is on top; then sums over the pairs
    of rows: positive similarities and all, and their numbers.
    """
    lse_q, mean, top = of_rows[LSE], of_rows[MEAN], of_rows[TOP]
    if extra is not None:
        lse_q = torch.logaddexp(lse_q, extra[LSE])
        mean = (of_rows[LSE] - lse_q).exp() * mean + (extra[LSE] - lse_q).exp() * extra[MEAN]
        top = torch.maximum(top, extra[TOP])
    count, everyone = (torch.as_tensor(x, device=lse_q.device).expand(lse_q.shape).sum() for x in (positives, seen))
    both = (
        (lse_q.new_tensor(lse_q.shape[0]), lse_q.new_tensor(of_columns.shape[1])),
        ((lse_q - scale * mean).sum(), (of_columns[LSE] - scale * of_columns[MEAN]).sum()),
        ((of_rows[BEST] >= top).sum(), (of_columns[BEST] >= of_columns[TOP]).sum()),
        (of_rows[POSITIVE].sum(), of_rows[TOTAL].sum()),
        (count, everyone),
    )
    return torch.stack([torch.stack([x.double() for x in two]) for two in both])


def stats_of(lse_q: Tensor, lse_k: Tensor, sums: Tensor, symmetric: bool, dtype: torch.dtype) -> ContrastiveStats:
    """From the lse of rows and columns and `stats_sums`."""
    size, entropies, hits, (positive, total), (count, seen) = sums.unbind()
    entropy, accuracy = entropies / size, hits / size
    stats = (
        lse_q,
        lse_k,
        *accuracy.unbind(),
        positive / count,
        (total - positive) / (seen - count),
        entropy.mean() if symmetric else entropy[0],
    )
    return ContrastiveStats(*(x.to(dtype) for x in stats))


def siglip_loss(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, backend: str
) -> Tensor:
    """The mean over rows, [] in the type of the statistics."""
    sums = op.sigmoid_fwd(queries, keys, logit_scale, logit_bias, *pairs.rule()[:3], backend)
    return (sums[0] / max(queries.shape[0], 1)).to(statistics_dtype(queries.dtype))


@torch.no_grad()
def siglip_stats(
    queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, backend: str
) -> ContrastiveStats:
    """Statistics of the softmax of the same logits, from a pass of their own."""
    features = queries.detach(), keys.detach(), logit_scale.detach()
    of_rows, of_columns = op.softmax_fwd(*features, *pairs.rule(), *(None,) * 4, True, True, backend)
    scale = logit_scale.detach().double()
    sums = stats_sums(of_rows, of_columns, None, scale, pairs.positives()[0], pairs.seen()[0])
    stats = stats_of(of_rows[LSE], of_columns[LSE], sums, True, statistics_dtype(queries.dtype))
    return ContrastiveStats(stats.lse_q + logit_bias.detach(), stats.lse_k + logit_bias.detach(), *stats[2:])
