"""The losses computed from row and column statistics: everything O(N + M), in float64 PyTorch.

A row's loss is the cross entropy, lse - scale · (mean similarity under its target distribution). The target
distribution enters only through sums that the statistics contain: over positives, over all keys seen, and under a
teacher's softmax. The code is the same for one process and for a process group; the differences are in over.py and
over_ranks.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive.guides import Guides, guides_of, turned
from mmkernels.ops.contrastive.hardness import as_unrounded
from mmkernels.ops.contrastive.over import Local
from mmkernels.ops.contrastive.over_ranks import OverRanks
from mmkernels.ops.contrastive.own import joined, lines_of_targets, of_own_negatives
from mmkernels.ops.contrastive.types import (
    BEST,
    LSE,
    MEAN,
    POSITIVE,
    TEACHER,
    TOP,
    TOTAL,
    ContrastiveStats,
    Denominator,
    Guide,
    Pairs,
    Targets,
    Teacher,
    beside,
)
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["Over", "infonce_loss", "siglip_loss"]

Over = Local | OverRanks


# Per row or column: the number of positive pairs and of pairs seen


class _Counts(NamedTuple):
    positives: Tensor | int
    seen: Tensor | int


def _counts_of_rows(pairs: Pairs, over: Over) -> _Counts:
    keys = sum(over.keys)
    if pairs.query_ids is None or pairs.key_ids is None:
        return _Counts(1, keys)
    same = _occurrences(pairs.query_ids, over.gathered(pairs.key_ids, over.keys))
    return _Counts(same, keys) if pairs.same_id == "positive" else _Counts(1, keys - same + _targets_alike(pairs))


def _counts_of_columns(pairs: Pairs, over: Over) -> _Counts:
    queries = sum(over.queries)
    if pairs.query_ids is None or pairs.key_ids is None:
        return _Counts(1, queries)
    same = _occurrences(pairs.key_ids, over.gathered(pairs.query_ids, over.queries))
    if pairs.same_id == "positive":
        return _Counts(same, queries)
    assert pairs.targets is not None
    alike = torch.zeros_like(pairs.key_ids).index_add(0, pairs.targets, _targets_alike(pairs))
    return _Counts(1, queries - same + alike)


def _occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each id occurs in `among`."""
    ordered = among.sort().values
    last, first = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (True, False))
    return last - first


def _targets_alike(pairs: Pairs) -> Tensor:
    """[N]: 1 if the target has its query's id, so it is counted among the keys of that id."""
    assert pairs.targets is not None and pairs.query_ids is not None and pairs.key_ids is not None
    return (pairs.key_ids[pairs.targets] == pairs.query_ids).long()


# InfoNCE


def _losses(
    line: Tensor, lse: Tensor, counts: _Counts, scale: Tensor, targets: Targets, denominator: Denominator
) -> Tensor:
    """The loss per row or column, from its statistics; lse includes `negatives`."""
    similarity = line[POSITIVE] / counts.positives
    if targets.label_smoothing > 0:
        similarity = similarity.lerp(line[TOTAL] / counts.seen, targets.label_smoothing)
    if targets.teacher is not None:
        similarity = similarity.lerp(line[TEACHER], targets.teacher[2])
    if not denominator.decoupled:
        return lse - scale * similarity
    # Without negatives there is nothing to learn: 0, but NaN where the features are not finite.
    nothing = lse == -torch.inf
    return torch.where(nothing, 0.0 * (scale * similarity).detach(), lse - scale * similarity)


def _teacher_of(
    targets: Targets, logit_scale: Tensor, pairs: Pairs, columns: bool, over: Over, backend: str
) -> Teacher | None:
    """The teacher with its lse, from a pass over the teacher's logits."""
    if targets.teacher is None:
        return None
    queries, keys = targets.teacher[0].detach(), targets.teacher[1].detach()
    with torch.no_grad():
        rules = pairs, None, None, 0.0, False, columns
        of_rows, of_columns = over.softmax(queries, keys, logit_scale.detach(), *rules, backend)
    return Teacher(queries, keys, of_rows[LSE], of_columns[LSE] if columns else None)


def infonce_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    targets: Targets,
    negatives: Tensor | None,
    denominator: Denominator,
    weights: Tensor | None,
    symmetric: bool,
    return_stats: bool,
    over: Over,
    backend: str,
) -> tuple[Tensor, ContrastiveStats | None]:
    """The loss of all rows, [] in the statistics' dtype, and its statistics. Arguments are already checked.

    Targets index local keys; ids match across all ranks; negatives [K, E] are all ranks', [N, K, E] a row's own.
    """
    totals, columns = targets.label_smoothing > 0 or return_stats, symmetric or return_stats
    directions = [_counts_of_rows(pairs, over)]
    if symmetric:
        directions.append(_counts_of_columns(pairs, over))
    for name, counts in zip(("query_ids", "key_ids"), directions, strict=False):
        over.each_has_one(name, counts.positives)
    # Its gradient has a term from each pass and one from the similarities of targets. They cancel to a few percent, so
    # they meet in float64; rounded to float32 first, they would leave up to twice the error of plain PyTorch.
    logit_scale = over.shared(logit_scale).double()
    filtered = denominator.false_negatives
    guides = None
    if filtered is not None:
        assert pairs.targets is not None
        guides = guides_of(filtered, pairs.targets, symmetric, backend)
    lines: Sequence[Tensor]
    if denominator.apart() and not beside(pairs, targets, return_stats):
        assert pairs.targets is not None
        lines = lines_of_targets(queries, keys, pairs.targets, symmetric)
    else:
        teacher = _teacher_of(targets, logit_scale, pairs, columns, over, backend)
        lines = _lines(queries, keys, logit_scale, pairs, teacher, guides, 0.0, totals, columns, over, backend)
    extra = None
    if return_stats or not denominator.hardness:
        extra = _of_negatives(queries, negatives, logit_scale, guides, 0.0, over, backend)
    lse = [line[LSE] for line in lines]
    if extra is not None:
        join = torch.logaddexp if guides is None else joined
        lse[0] = join(lse[0], extra[LSE])
    dtype, summed = compute_dtype(queries.dtype), lse
    if denominator.apart():
        harder = extra
        if denominator.hardness:
            harder = _of_negatives(queries, negatives, logit_scale, guides, denominator.hardness, over, backend)
        rules = pairs, guides, denominator.hardness, harder
        summed = _lse_of_others(queries, keys, logit_scale, *rules, symmetric, over, backend)
        if not denominator.decoupled:
            summed = [joined(of, logit_scale * line[POSITIVE]) for of, line in zip(summed, lines, strict=False)]
    losses = [_losses(*of, logit_scale, targets, denominator) for of in zip(lines, summed, directions, strict=False)]
    loss = over.mean(losses, None if weights is None else _weights_of_directions(weights.double(), pairs, symmetric))
    if not return_stats:
        return loss.to(dtype), None
    seen = lines[0].detach(), lines[1].detach(), None if extra is None else extra.detach()
    sums = over.summed(_stats_sums(*seen, logit_scale.detach(), directions[0]))
    return loss.to(dtype), _stats_of(lse[0].detach(), lse[1].detach(), sums, symmetric, dtype)


def _lines(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guides: Guides | None,
    hardness: float,
    totals: bool,
    columns: bool,
    over: Over,
    backend: str,
) -> Sequence[Tensor]:
    """Statistics [7, N] of rows, and [7, M] of columns if asked: of one pass or, where guides filter rows and columns
    differently, of one for each direction."""
    if guides is None:
        return over.softmax(queries, keys, logit_scale, pairs, teacher, None, hardness, totals, columns, backend)
    lines = [over.softmax(queries, keys, logit_scale, pairs, None, guides.rows, hardness, False, False, backend)[0]]
    if columns:
        lines.append(over.turned(queries, keys, logit_scale, turned(pairs), guides.columns, hardness, backend))
    return lines


def _lse_of_others(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    guides: Guides | None,
    hardness: float,
    extra: Tensor | None,
    symmetric: bool,
    over: Over,
    backend: str,
) -> list[Tensor]:
    """The lse of rows, and of columns if symmetric, over what is not positive, negatives included.

    The kernels leave out pairs of equal ids: those of the call or, without any, the index of each row's target.
    """
    ids = pairs.query_ids, pairs.key_ids
    if pairs.query_ids is None:
        assert pairs.targets is not None
        ids = pairs.targets + over.first_key, over.first_key + torch.arange(len(keys), device=keys.device)
    others = Pairs(None, *ids, "ignore")
    lines = _lines(queries, keys, logit_scale, others, None, guides, hardness, False, symmetric, over, backend)
    lse = [as_unrounded(line, logit_scale, hardness, queries) for line in lines[: 1 + symmetric]]
    if extra is not None:
        lse[0] = joined(lse[0], extra[LSE])
    return lse


def _of_negatives(
    queries: Tensor,
    negatives: Tensor | None,
    logit_scale: Tensor,
    guides: Guides | None,
    hardness: float,
    over: Over,
    backend: str,
) -> Tensor | None:
    """Statistics [7, N] of rows over the negatives; None without any."""
    if negatives is None:
        return None
    filtered = None if guides is None else guides.negatives
    if negatives.ndim == 2:
        assert not isinstance(filtered, Tensor)
        line = over.of_negatives(queries, negatives, logit_scale, filtered, hardness, backend)
        if line is None or not hardness:
            return line
        return torch.cat([as_unrounded(line, logit_scale, hardness, queries)[None], line[LSE + 1 :]])
    assert not isinstance(filtered, Guide)
    return of_own_negatives(queries, negatives, logit_scale, filtered, hardness) if negatives.shape[1] else None


def _weights_of_directions(weights: Tensor, pairs: Pairs, symmetric: bool) -> list[Tensor]:
    """A key has the weight of the query whose target it is; without targets, of the query at its index."""
    if not symmetric:
        return [weights]
    if pairs.targets is None:
        return [weights, weights]
    return [weights, torch.zeros_like(weights).index_copy(0, pairs.targets, weights)]


# SigLIP


def siglip_loss(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    return_stats: bool,
    over: Over,
    backend: str,
) -> tuple[Tensor, ContrastiveStats | None]:
    """The mean over all rows, [] in the statistics' dtype, and the softmax statistics of the same logits, from a
    separate pass. Arguments are already checked; ids match across all ranks."""
    scale, bias, dtype = over.shared(logit_scale), over.shared(logit_bias), compute_dtype(queries.dtype)
    sums = over.sigmoid(queries, keys, scale, bias, pairs, backend)
    loss = (over.total(sums[0]) / max(sum(over.queries), 1)).to(dtype)
    if not return_stats:
        return loss, None
    with torch.no_grad():
        features = queries.detach(), keys.detach(), scale.detach()
        of_rows, of_columns = over.softmax(*features, pairs, None, None, 0.0, True, True, backend)
        sums = over.summed(_stats_sums(of_rows, of_columns, None, features[2].double(), _counts_of_rows(pairs, over)))
        lse_q, lse_k = (line[LSE] + bias.detach() for line in (of_rows, of_columns))
        return loss, _stats_of(lse_q, lse_k, sums, True, dtype)


# Statistics


def _stats_sums(of_rows: Tensor, of_columns: Tensor, extra: Tensor | None, scale: Tensor, counts: _Counts) -> Tensor:
    """[5, 2] float64: the sums behind the means of `ContrastiveStats`, over rows and columns.

    Of rows and columns: count, entropies, and how often the best positive ranks first. Then over the pairs of rows:
    sums of positive and of all similarities, and their counts.
    """
    lse_q, mean, top = of_rows[LSE], of_rows[MEAN], of_rows[TOP]
    if extra is not None:
        lse_q = torch.logaddexp(lse_q, extra[LSE])
        mean = (of_rows[LSE] - lse_q).exp() * mean + (extra[LSE] - lse_q).exp() * extra[MEAN]
        top = torch.maximum(top, extra[TOP])
    count, everyone = (torch.as_tensor(x, device=lse_q.device).expand(lse_q.shape).sum() for x in counts)
    both = (
        (lse_q.new_tensor(lse_q.shape[0]), lse_q.new_tensor(of_columns.shape[1])),
        ((lse_q - scale * mean).sum(), (of_columns[LSE] - scale * of_columns[MEAN]).sum()),
        ((of_rows[BEST] >= top).sum(), (of_columns[BEST] >= of_columns[TOP]).sum()),
        (of_rows[POSITIVE].sum(), of_rows[TOTAL].sum()),
        (count, everyone),
    )
    return torch.stack([torch.stack([x.double() for x in two]) for two in both])


def _stats_of(lse_q: Tensor, lse_k: Tensor, sums: Tensor, symmetric: bool, dtype: torch.dtype) -> ContrastiveStats:
    """ContrastiveStats from the lse of rows and columns and `_stats_sums`."""
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
