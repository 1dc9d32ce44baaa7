"""Statistics of logits whose queries and keys are distributed over the ranks of a process group.

A rank owns its queries (rows of the logits) and its keys (columns). It computes its rows against all keys, which arrive
at once ("all_gather") or block by block ("ring"). The resulting partial statistics of other ranks' columns go to their
owners and are merged exactly: lse by logsumexp, means by weighted mean, sums by addition. Backward does the same with
the gradient of the keys.

Gradients here are those of the sum of all ranks' results. `infonce` and `siglip` scale each rank's share by W, which
DDP's mean over the ranks undoes.

With N keys in total and b bytes per element, a rank receives

    all_gather   b·N·E for the keys, b·N·E for their gradient, one part from each rank, added in float32
    ring         2b·N·E for the keys, once in each direction, 4·N·E for their gradient, which travels in float32

times (W-1)/W, and O(N) statistics. Memory beyond the rank's own rows is O(N·E), with the ring O(N/W·E). A teacher's
keys travel with the keys and have no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops.contrastive import op
from mmkernels.ops.contrastive.exchange import Ranks
from mmkernels.ops.contrastive.types import (
    COEFFICIENTS,
    LSE,
    MEAN,
    STATISTICS,
    Guide,
    Need,
    Pairs,
    Teacher,
    merged,
    merged_parts,
    nothing_seen,
)
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.signature import with_tensors, without_tensors

__all__ = ["same_on_all_ranks", "sigmoid_fwd", "softmax_fwd", "total_over_ranks"]


def softmax_fwd(
    ranks: Ranks,
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
    """`op.softmax_fwd` of the global batch: statistics of this rank's rows [7, N] over all keys and of its columns [7,
    M] over all queries. Targets index this rank's keys; the teacher's lse are global."""
    return _Softmax.apply(ranks, queries, keys, logit_scale, pairs, teacher, guide, hardness, totals, columns, backend)


def sigmoid_fwd(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    backend: str,
) -> Tensor:
    """`op.sigmoid_fwd` of this rank's rows and all keys: [3] float64; the first is differentiable."""
    return _Sigmoid.apply(ranks, queries, keys, logit_scale, logit_bias, pairs, backend)


def total_over_ranks(ranks: Ranks, share: Tensor) -> Tensor:
    """Sum of the ranks' shares; backward multiplies by W, because gradients will be averaged over the ranks."""
    return _TotalOverRanks.apply(ranks, share)


def same_on_all_ranks(ranks: Ranks, scalar: Tensor) -> Tensor:
    """A scalar shared by all ranks; backward averages its gradient over them, so every rank has the full one."""
    return _SameOnAllRanks.apply(ranks, scalar) if scalar.requires_grad and ranks.world > 1 else scalar


def _differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Raise for create_graph=True in a backward without a derivative; otherwise the missing term would go unnoticed."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "infonce, siglip: double backward (create_graph=True) is not supported with a group"
            )
        return backward(ctx, *grads)

    return checked


class _TotalOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, share: Tensor) -> Tensor:
        ctx.world = ranks.world
        return ranks.summed(share)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, grad * ctx.world


class _SameOnAllRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, scalar: Tensor) -> Tensor:
        ctx.ranks = ranks
        return scalar.clone()

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, ctx.ranks.summed(grad) / ctx.ranks.world


# A visit: this rank's queries against the keys of one owner, or of all.


@dataclass(frozen=True)
class _Visit:
    """The local copy of some keys and their metadata.

    Attributes:
        keys: [m, E].
        pairs: targets and ids for these keys.
        teacher, guide: with the matching keys.
        columns: other data that travels with each key [m, C]; None in a forward.
    """

    keys: Tensor
    pairs: Pairs
    teacher: Teacher | None
    guide: Guide | None
    columns: Tensor | None


# What other ranks' queries receive: keys, their ids, the teacher's keys and their lse, the guide's keys.
_OfKeys = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Side:
    """One rank's part in a call, and its key exchange."""

    ranks: Ranks
    queries: Tensor
    keys: Tensor
    pairs: Pairs
    teacher: Teacher | None = None
    guide: Guide | None = None

    def _of_keys(self) -> _OfKeys:
        of_teacher = (None, None) if self.teacher is None else (self.teacher.teacher_keys, self.teacher.teacher_lse_k)
        return self.keys, self.pairs.key_ids, *of_teacher, None if self.guide is None else self.guide.guide_keys

    def _visit(self, targets: Tensor | None, of_keys: Sequence[Tensor | None], columns: Tensor | None) -> _Visit:
        keys, key_ids, teacher_keys, teacher_lse_k, guide_keys = of_keys
        assert keys is not None
        teacher, guide = self.teacher, self.guide
        if guide is not None:
            assert guide_keys is not None
            guide = guide._replace(guide_keys=guide_keys)
        if teacher is not None:
            assert teacher_keys is not None
            teacher = teacher._replace(teacher_keys=teacher_keys, teacher_lse_k=teacher_lse_k)
        return _Visit(keys, self.pairs._replace(targets=targets, key_ids=key_ids), teacher, guide, columns)

    def gathered(self) -> tuple[Tensor | None, ...]:
        """All ranks' keys with what travels with them."""
        keys, *others = self._of_keys()
        sent, counts = self.ranks.sent, self.ranks.keys
        assert keys is not None
        first = self.ranks.gathered(keys, counts) if sent is None else sent.wait()
        return (first, *(None if x is None else self.ranks.gathered(x, counts) for x in others))

    def all_at_once(self, of_all_keys: Sequence[Tensor | None], columns: Tensor | None = None) -> _Visit:
        targets = None if self.pairs.targets is None else self.pairs.targets + self.ranks.first_key
        return self._visit(targets, of_all_keys, columns)

    def around(
        self, compute: Callable[[_Visit], Tensor], combine: Callable[[Tensor, Tensor], Tensor], columns: Tensor | None
    ) -> Tensor:
        """Run `compute` on each rank's keys in turn; returns all ranks' results for this rank's keys, combined."""
        mine = self.pairs.targets
        elsewhere = None if mine is None else torch.full_like(mine, -1)
        travelling = [*self._of_keys(), columns]

        def visit(owner: int, block: list[Tensor]) -> Tensor:
            arrived = iter(block)
            *of_keys, more = (None if x is None else next(arrived) for x in travelling)
            return compute(self._visit(mine if owner == self.ranks.rank else elsewhere, of_keys, more))

        return self.ranks.around([x for x in travelling if x is not None], visit, combine)

    def gradients(
        self,
        compute: Callable[[_Visit], tuple[Tensor, Tensor]],
        everything: Sequence[Tensor | None],
        columns: Tensor | None,
        need: Need,
    ) -> tuple[Tensor | None, Tensor | None]:
        """This rank's dqueries and dkeys, summed over visits in the statistics' dtype."""
        if not any(need):
            return None, None
        wide = compute_dtype(self.queries.dtype)
        if not self.ranks.ring:
            travelled = None if columns is None else self.ranks.gathered(columns, self.ranks.keys)
            dqueries, dkeys = compute(self.all_at_once(everything, travelled))
            if need.need_keys:
                parts = self.ranks.scattered(dkeys)
                dkeys = parts[0] if len(parts) == 1 else sum(part.to(wide) for part in parts[1:]) + parts[0]
        else:
            dqueries = self.queries.new_zeros(self.queries.shape, dtype=wide)

            def visit(here: _Visit) -> Tensor:
                of_queries, of_keys = compute(here)
                if need.need_queries:
                    dqueries.add_(of_queries)
                return of_keys.to(wide) if need.need_keys else here.keys.new_empty(len(here.keys), 0)

            dkeys = self.around(visit, torch.add, columns)
        dqueries, dkeys = dqueries.to(self.queries.dtype), dkeys.to(self.keys.dtype)
        return dqueries if need.need_queries else None, dkeys if need.need_keys else None


def _save(ctx: Any, *values: Any) -> None:
    """Save nested tuples of tensors and other values for backward."""
    tensors: list[Tensor] = []
    ctx.values = without_tensors(values, tensors)
    ctx.save_for_backward(*tensors)


def _saved(ctx: Any) -> tuple[Any, ...]:
    return with_tensors(ctx.values, iter(ctx.saved_tensors))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
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
        side = _Side(ranks, queries, keys, pairs, teacher, guide)
        of_rows = nothing_seen(queries)

        def statistics(here: _Visit) -> Tensor:  # column statistics, one row per key for transport: [m, 7], or [m, 0]
            nonlocal of_rows
            of_columns = nothing_seen(here.keys)
            if len(queries) and len(here.keys):
                rules = here.pairs, here.teacher, here.guide, hardness, totals, columns
                of_part, of_columns = op.softmax_fwd(queries, here.keys, logit_scale, *rules, backend)
                of_rows = merged(of_rows, of_part)
            return of_columns.T.contiguous() if columns else here.keys.new_empty(len(here.keys), 0)

        everything: tuple[Tensor | None, ...] = ()
        if ranks.ring:
            of_keys = side.around(statistics, _merged_lines if columns else _first, None)
        else:
            everything = side.gathered()
            of_keys = statistics(side.all_at_once(everything))
            if columns:
                of_keys = merged_parts(torch.stack(ranks.scattered(of_keys)).mT).T
        of_columns = of_keys.T.contiguous() if columns else of_rows.new_empty(STATISTICS, 0)
        ctx.ranks, ctx.columns, ctx.hardness, ctx.backend = ranks, columns, hardness, backend
        _save(ctx, queries, keys, logit_scale, pairs, teacher, guide, of_rows, of_columns, everything)
        return of_rows, of_columns

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> Any:
        queries, keys, logit_scale, pairs, teacher, guide, of_rows, of_columns, everything = _saved(ctx)
        need, need_scale = Need(*ctx.needs_input_grad[1:3]), ctx.needs_input_grad[3]
        of_queries, lse_q = grad_rows[:COEFFICIENTS].contiguous(), of_rows[LSE]
        travelling = torch.cat([grad_columns[:COEFFICIENTS], of_columns[LSE : LSE + 1]]).T if ctx.columns else None

        def gradients(here: _Visit) -> tuple[Tensor, Tensor]:
            if not len(queries) or not len(here.keys):
                return torch.zeros_like(queries), torch.zeros_like(here.keys)
            of_keys = here.keys.new_empty(COEFFICIENTS + 1, 0, dtype=torch.float64)
            of_keys = of_keys if here.columns is None else here.columns.T.contiguous()
            arguments = of_queries, of_keys[:COEFFICIENTS], queries, here.keys, logit_scale, lse_q, of_keys[-1]
            rules = here.pairs, here.teacher, here.guide, ctx.hardness
            return op.softmax_bwd(*arguments, *rules, None, need, ctx.backend)[:2]

        side = _Side(ctx.ranks, queries, keys, pairs, teacher, guide)
        dqueries, dkeys = side.gradients(gradients, everything, travelling, need)
        dscale = None
        if need_scale:
            parts = (grad_rows[LSE] * of_rows[MEAN]).sum() + (grad_columns[LSE] * of_columns[MEAN]).sum()
            dscale = parts.to(logit_scale.dtype)
        return None, dqueries, dkeys, dscale, None, None, None, None, None, None, None


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        pairs: Pairs,
        backend: str,
    ) -> Tensor:
        side = _Side(ranks, queries, keys, pairs)
        sums = queries.new_zeros(3, dtype=torch.float64)

        def visit(here: _Visit) -> Tensor:
            if len(queries) and len(here.keys):
                sums.add_(op.sigmoid_fwd(queries, here.keys, logit_scale, logit_bias, here.pairs, backend))
            return here.keys.new_empty(len(here.keys), 0)

        everything: tuple[Tensor | None, ...] = ()
        if ranks.ring:
            side.around(visit, _first, None)
        else:
            everything = side.gathered()
            visit(side.all_at_once(everything))
        ctx.ranks, ctx.backend = ranks, backend
        _save(ctx, queries, keys, logit_scale, logit_bias, pairs, sums.clone(), everything)
        return sums

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_sums: Tensor) -> Any:
        queries, keys, logit_scale, logit_bias, pairs, sums, everything = _saved(ctx)
        need, (need_scale, need_bias) = Need(*ctx.needs_input_grad[1:3]), ctx.needs_input_grad[3:5]
        grad = grad_sums[0]

        def gradients(here: _Visit) -> tuple[Tensor, Tensor]:
            if not len(queries) or not len(here.keys):
                return torch.zeros_like(queries), torch.zeros_like(here.keys)
            arguments = grad, queries, here.keys, logit_scale, logit_bias, here.pairs
            return op.sigmoid_bwd(*arguments, None, need, ctx.backend)[:2]

        dqueries, dkeys = _Side(ctx.ranks, queries, keys, pairs).gradients(gradients, everything, None, need)
        dscale = (grad * sums[1]).to(logit_scale.dtype) if need_scale else None
        dbias = (grad * sums[2]).to(logit_bias.dtype) if need_bias else None
        return None, dqueries, dkeys, dscale, dbias, None, None


def _first(a: Tensor, b: Tensor) -> Tensor:
    return a


def _merged_lines(a: Tensor, b: Tensor) -> Tensor:
    """Merge statistics in transport layout [m, 7], one row per key."""
    return merged(a.T, b.T).T.contiguous()
