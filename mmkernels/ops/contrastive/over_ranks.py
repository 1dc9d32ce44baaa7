"""infonce and siglip over the ranks of a process group: from the statistics of `distributed.py` to the loss.

The loss is that of one process with all ranks' rows, and is the same number on every rank. Its gradient is made for a
mean over the ranks, as DistributedDataParallel takes it: features get W times the exact gradient of the loss, so that
the mean of what the ranks' encoders make of it is exact; scale and bias get the exact gradient on every rank, whether
they belong to a wrapper or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops.checks import wrong_value
from mmkernels.ops.contrastive.distributed import (
    NO_TEACHER,
    mean_over_ranks,
    same_on_all_ranks,
    sigmoid_fwd,
    softmax_fwd,
)
from mmkernels.ops.contrastive.exchange import Ranks, agree, check_group, refused
from mmkernels.ops.contrastive.losses import (
    ContrastiveStats,
    Pairs,
    Targets,
    occurrences,
    stats_of,
    stats_sums,
    weights_of_columns,
)
from mmkernels.ops.contrastive.reference import LSE, statistics_dtype

__all__ = ["infonce", "refusing", "siglip"]


def refusing(group: Any, exchange: Any, features: Any) -> AbstractContextManager[None]:
    """Check arguments inside: an error is raised here, and said to the ranks that wait for this one."""
    if group is None:
        if exchange != "auto":
            wrong_value("exchange", "'auto' without a group: there is nobody to exchange keys with", exchange)
        return nullcontext()  # which torch.compile sees through; in torch 2.6 it does not see through generators
    check_group(group, exchange)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "group: expected None under torch.func and forward mode; collectives have no rule there"
        )
    return _said_to_others(group, features)


@contextmanager
def _said_to_others(group: Any, features: Any) -> Iterator[None]:
    try:
        yield
    except Exception:
        refused(group, features.device if isinstance(features, Tensor) else None)
        raise


def infonce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    target: Targets,
    negatives: Tensor | None,
    weights: Tensor | None,
    symmetric: bool,
    return_stats: bool,
    group: Any,
    exchange: str,
    backend: str,
) -> tuple[Tensor, ContrastiveStats | None]:
    """The loss of all ranks' rows, and what it saw. Arguments are checked; targets count this rank's keys, ids meet
    everywhere, negatives are those of all ranks.

    Raises:
        ValueError: on every rank, if ranks differ in what must be the same, an id is without its like, or no row of
            any rank has a weight.
    """
    width, alpha = (None, None) if target.teacher is None else (target.teacher[0].shape[1], target.teacher[2])
    same = {
        "logit_scale: gradient": _needs(logit_scale),
        "label_smoothing": target.label_smoothing,
        "symmetric": symmetric,
        "same_id": pairs.same_id,
        "query_ids": _given(pairs.query_ids),
        "negatives": "None" if negatives is None else f"given, {_needs(negatives)}",
        "weights": _given(weights),
        "teacher: width": width,
        "teacher[2]": alpha,
        "return_stats": return_stats,
    }
    ranks = agree(group, queries, keys, negatives, exchange, {**same, **_gradients(queries, keys)})
    counts, both = _Counts(ranks, pairs), symmetric or return_stats
    rows, columns = counts.of_rows(), counts.of_columns() if symmetric else None
    if pairs.targets is None:
        _ids_meet(ranks, "query_ids", rows[0])
        if columns is not None:
            _ids_meet(ranks, "key_ids", columns[0])
    logit_scale = same_on_all_ranks(ranks, logit_scale)
    taught = NO_TEACHER
    if target.teacher is not None:
        features = target.teacher[0].detach(), target.teacher[1].detach(), logit_scale.detach()
        with torch.no_grad():
            lines = softmax_fwd(ranks, *features, pairs.rule(), NO_TEACHER, False, both, backend)
        taught = *features[:2], lines[0][LSE], lines[1][LSE] if both else None
    totals = target.label_smoothing > 0 or return_stats
    of_rows, of_columns = softmax_fwd(ranks, queries, keys, logit_scale, pairs.rule(), taught, totals, both, backend)
    extra, lse_q = None, of_rows[LSE]
    if negatives is not None and sum(ranks.negatives) > 0:
        rule = None, None, None, "positive"
        others = ranks.with_negatives()
        extra, _ = softmax_fwd(others, queries, negatives, logit_scale, rule, NO_TEACHER, False, False, backend)
        lse_q = torch.logaddexp(lse_q, extra[LSE])
    scale = logit_scale.double()
    wide = None if weights is None else weights.double()
    sums = [_sum(target.loss(of_rows, lse_q, scale, *rows), wide)]
    if columns is not None:
        losses = target.loss(of_columns, of_columns[LSE], scale, *columns)
        sums.append(_sum(losses, None if wide is None else weights_of_columns(wide, pairs)))
    sizes = [max(sum(of), 1) for of in (ranks.queries, ranks.keys)][: len(sums)]
    share = scale.new_tensor(sizes) if wide is None else _weight_of_all(ranks, wide)
    loss = (mean_over_ranks(ranks, torch.stack(sums)) / share).mean()
    dtype = statistics_dtype(queries.dtype)
    stats = None
    if return_stats:
        lines = of_rows.detach(), of_columns.detach()
        of_ranks = ranks.summed(stats_sums(*lines, None if extra is None else extra.detach(), scale.detach(), *rows))
        stats = stats_of(lse_q.detach(), lines[1][LSE], of_ranks, symmetric, dtype)
    return loss.to(dtype), stats


def siglip(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    return_stats: bool,
    group: Any,
    exchange: str,
    backend: str,
) -> tuple[Tensor, ContrastiveStats | None]:
    """The loss of all ranks' rows, and what it saw. Arguments are checked; ids meet everywhere.

    Raises:
        ValueError: on every rank, if ranks differ in what must be the same.
    """
    same = {
        "logit_scale: gradient": _needs(logit_scale),
        "logit_bias: gradient": _needs(logit_bias),
        "query_ids": _given(pairs.query_ids),
        "return_stats": return_stats,
    }
    ranks = agree(group, queries, keys, None, exchange, {**same, **_gradients(queries, keys)})
    scale, bias = same_on_all_ranks(ranks, logit_scale), same_on_all_ranks(ranks, logit_bias)
    sums = sigmoid_fwd(ranks, queries, keys, scale, bias, *pairs.rule()[:3], backend)
    loss = mean_over_ranks(ranks, sums[0]) / max(sum(ranks.queries), 1)
    dtype = statistics_dtype(queries.dtype)
    loss = loss.to(dtype)
    if not return_stats:
        return loss, None
    with torch.no_grad():
        features = queries.detach(), keys.detach(), scale.detach()
        of_rows, of_columns = softmax_fwd(ranks, *features, pairs.rule(), NO_TEACHER, True, True, backend)
        rows = _Counts(ranks, pairs).of_rows()
        of_ranks = ranks.summed(stats_sums(of_rows, of_columns, None, features[2].double(), *rows))
        lse_q, lse_k = (line[LSE] + bias.detach() for line in (of_rows, of_columns))
        return loss, stats_of(lse_q, lse_k, of_ranks, True, dtype)


def _sum(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.sum() if weights is None else (weights * losses).sum()


def _weight_of_all(ranks: Ranks, weights: Tensor) -> Tensor:
    """The sum over the ranks; 1 where no rank has rows."""
    total = ranks.summed(weights.sum())
    if sum(ranks.queries) == 0:
        return torch.ones_like(total)
    if float(total) == 0:
        raise ValueError("weights: expected one that is not zero on some rank, got zeros on all")
    return total


def _ids_meet(ranks: Ranks, name: str, positives: Tensor) -> None:
    missing = ranks.summed((positives == 0).sum())
    if int(missing):
        other = "key_ids" if name == "query_ids" else "query_ids"
        raise ValueError(f"{name}: expected each to occur among the {other} of some rank, {int(missing)} do not")


def _given(x: Tensor | None) -> str:
    return "None" if x is None else "given"


def _needs(x: Tensor) -> str:
    return "needs a gradient" if x.requires_grad and torch.is_grad_enabled() else "needs no gradient"


def _gradients(queries: Tensor, keys: Tensor) -> dict[str, str]:
    return {"queries: gradient": _needs(queries), "keys: gradient": _needs(keys)}


class _Counts:
    """How many keys are positive for each query and how many it sees, and the same of queries for each key."""

    def __init__(self, ranks: Ranks, pairs: Pairs) -> None:
        self._ranks, self._targets, self._ids = ranks, pairs.targets, (pairs.query_ids, pairs.key_ids)
        self._ignore = pairs.same_id == "ignore"

    def of_rows(self) -> tuple[Tensor, Tensor]:
        query_ids, key_ids = self._ids
        seen = float(sum(self._ranks.keys))
        if query_ids is None or key_ids is None:
            assert self._targets is not None
            return (self._targets >= 0).double(), torch.full_like(self._targets, seen, dtype=torch.float64)
        same = occurrences(query_ids, self._ranks.gathered(key_ids, self._ranks.keys)).double()
        if not self._ignore:
            return same, torch.full_like(same, seen)
        assert self._targets is not None
        own = (key_ids[self._targets] == query_ids).double() if len(key_ids) else same
        return torch.ones_like(same), seen - same + own

    def of_columns(self) -> tuple[Tensor, Tensor]:
        query_ids, key_ids = self._ids
        seen, mine = float(sum(self._ranks.queries)), self._ranks.keys[self._ranks.rank]
        if query_ids is None or key_ids is None or self._ignore:
            assert self._targets is not None
            positive = torch.bincount(self._targets, minlength=mine).double()
            if query_ids is None or key_ids is None:
                return positive, torch.full_like(positive, seen)
            same = occurrences(key_ids, self._ranks.gathered(query_ids, self._ranks.queries)).double()
            own = key_ids[self._targets] == query_ids
            return positive, seen - same + torch.zeros_like(same).index_add(0, self._targets, own.double())
        same = occurrences(key_ids, self._ranks.gathered(query_ids, self._ranks.queries)).double()
        return same, torch.full_like(same, seen)
