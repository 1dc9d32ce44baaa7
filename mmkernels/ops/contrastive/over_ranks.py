"""infonce and siglip over the ranks of a process group: from the statistics of `distributed.py` to the loss.

The loss is that of one process with all ranks' rows, and is the same number on every rank. Its gradient is made for a
mean over the ranks, as DistributedDataParallel takes it: features get W times the exact gradient of the loss, so that
the mean of what the ranks' encoders make of it is exact; scale and bias get the exact gradient on every rank, whether
they belong to a wrapper or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._checks import wrong_value

from .distributed import mean_over_ranks, same_on_all_ranks, sigmoid_fwd, softmax_fwd
from .exchange import Ranks, agree, check_group, refused
from .losses import Pairs
from .reference import LSE, POSITIVE, TOTAL, statistics_dtype

__all__ = ["infonce", "refusing", "siglip"]


@contextmanager
def refusing(group: Any, exchange: Any, features: Any) -> Iterator[None]:
    """Check arguments inside: an error is raised here, and said to the ranks that wait for this one."""
    if group is None:
        if exchange != "auto":
            wrong_value("exchange", "'auto' without a group: there is nobody to exchange keys with", exchange)
        yield
        return
    check_group(group, exchange)
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
    label_smoothing: float,
    weights: Tensor | None,
    symmetric: bool,
    group: Any,
    exchange: str,
    backend: str,
) -> Tensor:
    """The loss of all ranks' rows. Arguments are checked; targets count this rank's keys, ids meet everywhere.

    Raises:
        ValueError: on every rank, if ranks differ in what must be the same, or an id is without its like.
    """
    same = {
        "logit_scale: gradient": _needs(logit_scale),
        "label_smoothing": label_smoothing,
        "symmetric": symmetric,
        "same_id": pairs.same_id,
        "query_ids": "given" if pairs.query_ids is not None else "None",
        "weights": "given" if weights is not None else "None",
    }
    ranks = agree(group, queries, keys, exchange, {**same, **_gradients(queries, keys)})
    scale = same_on_all_ranks(ranks, logit_scale)
    of_rows, of_columns = softmax_fwd(
        ranks, queries, keys, scale, *pairs.rule(), label_smoothing > 0, symmetric, backend
    )
    counts = _Counts(ranks, pairs)
    rows, columns = counts.of_rows(), counts.of_columns() if symmetric else None
    if pairs.targets is None:
        _ids_meet(ranks, "query_ids", rows[0])
        if columns is not None:
            _ids_meet(ranks, "key_ids", columns[0])
    wide = None if weights is None else weights.double()
    losses = [_losses(of_rows, scale, *rows, label_smoothing)]
    shares = [torch.ones_like(losses[0]) if wide is None else wide]
    sizes = [float(sum(ranks.queries))]
    if columns is not None:
        losses.append(_losses(of_columns, scale, *columns, label_smoothing))
        shares.append(torch.ones_like(losses[1]) if wide is None else _of_columns(wide, pairs))
        sizes.append(float(sum(ranks.keys)))
    share = torch.tensor(sizes, device=queries.device, dtype=torch.float64)
    if wide is not None:
        share = ranks.summed(wide.sum()).expand(len(sizes))
    total = mean_over_ranks(ranks, torch.stack([(w * x).sum() for w, x in zip(shares, losses, strict=True)]))
    return (total / torch.where(share == 0, 1.0, share)).mean().to(statistics_dtype(queries.dtype))


def siglip(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    group: Any,
    exchange: str,
    backend: str,
) -> Tensor:
    """The loss of all ranks' rows. Arguments are checked; ids meet everywhere.

    Raises:
        ValueError: on every rank, if ranks differ in what must be the same.
    """
    same = {
        "logit_scale: gradient": _needs(logit_scale),
        "logit_bias: gradient": _needs(logit_bias),
        "query_ids": "given" if pairs.query_ids is not None else "None",
    }
    ranks = agree(group, queries, keys, exchange, {**same, **_gradients(queries, keys)})
    scale, bias = same_on_all_ranks(ranks, logit_scale), same_on_all_ranks(ranks, logit_bias)
    sums = sigmoid_fwd(ranks, queries, keys, scale, bias, *pairs.rule()[:3], backend)
    loss = mean_over_ranks(ranks, sums[0]) / max(sum(ranks.queries), 1)
    return loss.to(statistics_dtype(queries.dtype))


def _of_columns(weights: Tensor, pairs: Pairs) -> Tensor:
    """A key has the weight of the query whose target it is, else of that at its place."""
    return weights if pairs.targets is None else torch.zeros_like(weights).index_copy(0, pairs.targets, weights)


def _ids_meet(ranks: Ranks, name: str, positives: Tensor) -> None:
    missing = ranks.summed((positives == 0).sum())
    if int(missing):
        other = "key_ids" if name == "query_ids" else "query_ids"
        raise ValueError(f"{name}: expected each to occur among the {other} of some rank, {int(missing)} do not")


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
        same = _occurrences(query_ids, self._ranks.gathered(key_ids, self._ranks.keys))
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
            same = _occurrences(key_ids, self._ranks.gathered(query_ids, self._ranks.queries))
            own = key_ids[self._targets] == query_ids
            return positive, seen - same + torch.zeros_like(same).index_add(0, self._targets, own.double())
        same = _occurrences(key_ids, self._ranks.gathered(query_ids, self._ranks.queries))
        return same, torch.full_like(same, seen)


def _occurrences(ids: Tensor, among: Tensor) -> Tensor:
    """How often each id occurs among others."""
    ordered = among.sort().values
    last, first = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (True, False))
    return (last - first).double()


def _losses(statistics: Tensor, scale: Tensor, positive: Tensor, seen: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each row against its targets, [rows] float64; 0 for a row that sees nothing."""
    s = scale.double()
    some = positive > 0
    target = (1 - smoothing) * some.double() + (smoothing if smoothing else 0.0)
    chosen = (1 - smoothing) * statistics[POSITIVE] / positive.clamp(min=1)
    if smoothing:
        chosen = chosen + smoothing * statistics[TOTAL] / seen.clamp(min=1)
    lse = statistics[LSE]
    return torch.where(lse == -torch.inf, 0.0, target * lse - s * chosen)
