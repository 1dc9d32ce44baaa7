"""Losses over the ranks of a process group: what ranks must agree on and how they merge results.

Every rank gets the loss that one process would compute on all ranks' rows. Gradients assume a mean over the ranks, as
in DistributedDataParallel: features get W times the exact gradient of the loss, so that the mean of the encoders'
gradients is exact. Scale and bias get the exact gradient on every rank, whether DDP wraps them or not.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops.contrastive import distributed
from mmkernels.ops.contrastive.exchange import Ranks, agree, check_device, check_group, refused
from mmkernels.ops.contrastive.gathering import GatheredKeys
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.ops.contrastive.types import Denominator, Guide, Pairs, Targets, Teacher, beside
from mmkernels.runtime.machine import Machine

__all__ = ["OverRanks", "infonce_over_ranks", "refusing", "siglip_over_ranks"]


@contextmanager
def refusing(group: Any, exchange: Any, features: Any) -> Iterator[None]:
    """Context for argument checks: re-raises an error after telling the ranks that wait for this one."""
    check_group(group, exchange)
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError(
            "group: expected None under torch.func and forward mode, which collectives do not support"
        )
    try:
        if isinstance(features, Tensor):
            check_device(group, features)
        yield
    except Exception:
        refused(group)
        raise


class OverRanks:
    """A batch distributed over the ranks of a group; over.Local documents the methods."""

    def __init__(self, ranks: Ranks, keys: Tensor) -> None:
        self._ranks, self._keys = ranks, keys
        self.queries, self.keys = ranks.queries, ranks.keys
        self.first_key = ranks.first_key

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
        rules, ranks = (pairs, teacher, guide, hardness, totals, columns), self._ranks
        ranks = ranks if keys is self._keys else ranks.with_others()
        return distributed.softmax_fwd(ranks, queries, keys, logit_scale, *rules, backend)

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
        rules = pairs, None, guide, hardness, False, False
        return distributed.softmax_fwd(self._ranks.turned(), keys, queries, logit_scale, *rules, backend)[0]

    def of_negatives(
        self,
        queries: Tensor,
        negatives: Tensor,
        logit_scale: Tensor,
        guide: Guide | None,
        hardness: float,
        backend: str,
    ) -> Tensor | None:
        if sum(self._ranks.negatives) == 0:
            return None
        others, rules = self._ranks.with_negatives(), (Pairs(), None, guide, hardness, False, False)
        return distributed.softmax_fwd(others, queries, negatives, logit_scale, *rules, backend)[0]

    def sigmoid(
        self, queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor, pairs: Pairs, backend: str
    ) -> Tensor:
        return distributed.sigmoid_fwd(self._ranks, queries, keys, logit_scale, logit_bias, pairs, backend)

    def shared(self, scalar: Tensor) -> Tensor:
        return distributed.same_on_all_ranks(self._ranks, scalar)

    def gathered(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return self._ranks.gathered(rows, counts)

    def each_has_one(self, name: str, positives: Tensor | int) -> None:
        if isinstance(positives, int):
            return
        missing = int(self._ranks.summed((positives == 0).sum()))
        if missing:
            other = "key_ids" if name == "query_ids" else "query_ids"
            raise ValueError(f"{name}: expected each to occur among the {other} of some rank, but {missing} do not")

    def total(self, share: Tensor) -> Tensor:
        return distributed.total_over_ranks(self._ranks, share)

    def mean(self, losses: Sequence[Tensor], weights: Sequence[Tensor] | None) -> Tensor:
        if weights is None:
            sums, sizes = [loss.sum() for loss in losses], [max(sum(of), 1) for of in (self.queries, self.keys)]
            return (self.total(torch.stack(sums)) / losses[0].new_tensor(sizes[: len(sums)])).mean()
        sums = [(of * loss).sum() for of, loss in zip(weights, losses, strict=True)]
        return (self.total(torch.stack(sums)) / self._weight_of_all(weights[0])).mean()

    def _weight_of_all(self, weights: Tensor) -> Tensor:
        """The sum over the ranks; 1 if no rank has rows."""
        total = self.summed(weights.sum())
        if sum(self.queries) == 0:
            return torch.ones_like(total)
        if float(total) == 0:
            raise ValueError("weights: expected a nonzero weight on some rank, got zeros on all")
        return total

    def summed(self, sums: Tensor) -> Tensor:
        return self._ranks.summed(sums)


def infonce_over_ranks(
    group: Any,
    exchange: str,
    machine: Machine,
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
    gathered: GatheredKeys | None = None,
) -> OverRanks:
    """Agree on an infonce call with the other ranks; arguments are already checked, `machine` is this rank's.

    Raises:
        ValueError: on every rank, if ranks differ in a value that must be the same.
    """
    filtered = denominator.false_negatives
    guide = 0 if filtered is None else filtered.guide_queries.shape[1]
    width, alpha = (None, None) if targets.teacher is None else (targets.teacher[0].shape[1], targets.teacher[2])
    same = {
        "logit_scale: gradient": _gradient(logit_scale),
        "label_smoothing": targets.label_smoothing,
        "symmetric": symmetric,
        "same_id": pairs.same_id,
        "query_ids": _given(pairs.query_ids),
        "negatives": "None" if negatives is None else f"given, {negatives.ndim} dimensions, {_gradient(negatives)}",
        "decoupled": denominator.decoupled,
        "hardness": denominator.hardness,
        "false_negatives": None if filtered is None else (filtered.kind, filtered.margin, guide),
        "weights": _given(weights),
        "teacher: width": width,
        "teacher[2]": alpha,
        "return_stats": return_stats,
        "queries: gradient": _gradient(queries),
        "keys: gradient": _gradient(keys),
    }
    exchanged = negatives if negatives is not None and negatives.ndim == 2 else None  # a row's own stay where it is
    call = functools.partial(
        Call,
        width=queries.shape[1],
        dtype=queries.dtype,
        symmetric=symmetric,
        ids=pairs.query_ids is not None,
        same_id=pairs.same_id,
        weights=weights is not None,
        return_stats=return_stats,
        teacher=width or 0,
        guide=guide,
        others=denominator.apart(),
        alone=denominator.apart() and not beside(pairs, targets, return_stats),
        gradients=(_needs(queries), _needs(keys), exchanged is not None and _needs(exchanged)),
        scalars=_scalars(logit_scale),
    )
    return OverRanks(agree(group, queries, keys, exchanged, exchange, machine, same, call, gathered), keys)


def siglip_over_ranks(
    group: Any,
    exchange: str,
    machine: Machine,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    return_stats: bool,
    gathered: GatheredKeys | None = None,
) -> OverRanks:
    """The same for siglip."""
    same = {
        "logit_scale: gradient": _gradient(logit_scale),
        "logit_bias: gradient": _gradient(logit_bias),
        "query_ids": _given(pairs.query_ids),
        "return_stats": return_stats,
        "queries: gradient": _gradient(queries),
        "keys: gradient": _gradient(keys),
    }
    call = functools.partial(
        Call,
        width=queries.shape[1],
        dtype=queries.dtype,
        sigmoid=True,
        ids=pairs.query_ids is not None,
        return_stats=return_stats,
        gradients=(_needs(queries), _needs(keys), False),
        scalars=_scalars(logit_scale, logit_bias),
    )
    return OverRanks(agree(group, queries, keys, None, exchange, machine, same, call, gathered), keys)


def _given(x: Tensor | None) -> str:
    return "None" if x is None else "given"


def _needs(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _gradient(x: Tensor) -> str:
    return "requires a gradient" if _needs(x) else "requires no gradient"


def _scalars(*scalars: Tensor) -> tuple[int, ...]:
    """The bytes of those that need a gradient."""
    return tuple(x.dtype.itemsize for x in scalars if _needs(x))
