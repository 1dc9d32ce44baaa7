"""The statistics of the logits when queries and keys are spread over the ranks of a process group.

A rank owns its queries (rows of the logits) and its keys (columns). It computes its rows against all keys, which come
to it at once ("all_gather") or block by block ("ring"). What that says about the columns of other ranks goes to their
owners, where the parts are merged: logarithms of sums by logsumexp, means by their weights, sums by addition. All of it
is exact. Backward does the same with the gradient of the keys.

A gradient here is the one of the sum over the ranks of what they go on to compute: `infonce` and `siglip` make each
rank's share W times as large, which a mean over the ranks, as DDP takes it, undoes.

With N keys in all, in features of b bytes, a rank receives

    all_gather   b·N·E for the keys, b·N·E for their gradient, one part from each rank, added in float32
    ring         2b·N·E for the keys, once in each direction, 4·N·E for their gradient, which travels in float32

times (W-1)/W, and O(N) statistics. Memory beyond the rank's own rows is O(N·E), and in the ring O(N/W·E). A teacher's
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
from mmkernels.ops.contrastive.reference import BEST, COEFFICIENTS, LSE, MEAN, STATISTICS, TOP, statistics_dtype

__all__ = ["NO_TEACHER", "Rule", "Teacher", "mean_over_ranks", "same_on_all_ranks", "sigmoid_fwd", "softmax_fwd"]

# As the ops want them: targets, query_ids, key_ids and same_id; a teacher's queries and keys, and the lse of both.
Rule = tuple[Tensor | None, Tensor | None, Tensor | None, str]
Teacher = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
NO_TEACHER: Teacher = (None, None, None, None)


def softmax_fwd(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    rule: Rule,
    teacher: Teacher,
    totals: bool,
    columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """`op.softmax_fwd` of the whole batch: statistics of this rank's rows [7, N] over all keys, of its columns [7, M]
    over all queries. The rule's targets count this rank's keys; the teacher's lse are those of the whole batch."""
    out = _Softmax.apply(ranks, queries, keys, logit_scale, *rule, *teacher, totals, columns, backend)
    return out[0], out[1]


def sigmoid_fwd(
    ranks: Ranks,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    targets: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    backend: str,
) -> Tensor:
    """`op.sigmoid_fwd` of this rank's rows and all keys: [3] float64, of which the first is differentiable."""
    return _Sigmoid.apply(ranks, queries, keys, logit_scale, logit_bias, targets, query_ids, key_ids, backend)


def mean_over_ranks(ranks: Ranks, total: Tensor) -> Tensor:
    """The sum over the ranks of each one's total; backward multiplies by W, for a mean of gradients to come."""
    return _MeanOverRanks.apply(ranks, total)


def same_on_all_ranks(ranks: Ranks, scalar: Tensor) -> Tensor:
    """A scalar that all ranks share; its gradient is averaged over them at once, so that every rank has the whole."""
    return _SameOnAllRanks.apply(ranks, scalar) if scalar.requires_grad and ranks.world > 1 else scalar


def _differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward without a derivative, said when a graph of it is asked for: later the missing term is not seen."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "infonce, siglip: with a group there is no double backward (create_graph=True); it needs group=None"
            )
        return backward(ctx, *grads)

    return checked


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ranks: Ranks, total: Tensor) -> Tensor:
        ctx.world = ranks.world
        return ranks.summed(total)

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


# A visit: this rank's queries meet some keys, of one owner or (owner None) of all.


@dataclass(frozen=True)
class _Visit:
    """The keys that are here, and what the call knows about them.

    Attributes:
        keys: [m, E].
        pairs: targets, query_ids, key_ids: which pairs are positive.
        teacher: with its keys that are here.
        columns: what else travels with each key [m, C]; None in a forward.
    """

    keys: Tensor
    pairs: tuple[Tensor | None, Tensor | None, Tensor | None]
    teacher: Teacher
    columns: Tensor | None


@dataclass(frozen=True)
class _Side:
    """One rank's part in a call, and how keys come to it."""

    ranks: Ranks
    queries: Tensor
    keys: Tensor
    targets: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    teacher: Teacher = NO_TEACHER

    def _of_keys(self) -> tuple[Tensor | None, ...]:
        """What comes to the other ranks' queries: keys, their ids, the teacher's keys and their lse."""
        return self.keys, self.key_ids, self.teacher[1], self.teacher[3]

    def _visit(self, targets: Tensor | None, of_keys: Sequence[Tensor | None], columns: Tensor | None = None) -> _Visit:
        keys, key_ids, teacher_keys, teacher_lse_k = of_keys
        assert keys is not None
        teacher = self.teacher[0], teacher_keys, self.teacher[2], teacher_lse_k
        return _Visit(keys, (targets, self.query_ids, key_ids), teacher, columns)

    def gathered(self) -> tuple[Tensor | None, ...]:
        """What comes with each key, of all keys."""
        return tuple(None if x is None else self.ranks.gathered(x, self.ranks.keys) for x in self._of_keys())

    def all_at_once(self, of_all_keys: Sequence[Tensor | None], columns: Tensor | None = None) -> _Visit:
        targets = None if self.targets is None else self.targets + self.ranks.first_key
        return self._visit(targets, of_all_keys, columns)

    def around(
        self, compute: Callable[[_Visit], Tensor], combine: Callable[[Tensor, Tensor], Tensor], columns: Tensor | None
    ) -> Tensor:
        """`compute` on each rank's keys in turn; what the ranks made of this one's, combined."""
        elsewhere = None if self.targets is None else torch.full_like(self.targets, -1)
        travelling = [*self._of_keys(), columns]

        def visit(owner: int, block: list[Tensor]) -> Tensor:
            arrived = iter(block)
            *of_keys, more = (None if x is None else next(arrived) for x in travelling)
            return compute(self._visit(self.targets if owner == self.ranks.rank else elsewhere, of_keys, more))

        return self.ranks.around([x for x in travelling if x is not None], visit, combine)

    def gradients(
        self,
        compute: Callable[[_Visit], tuple[Tensor, Tensor]],
        everything: Sequence[Tensor | None],
        columns: Tensor | None,
        need_keys: bool,
    ) -> tuple[Tensor, Tensor]:
        """dqueries, dkeys of this rank, from those of each visit; sums are in the type of the statistics."""
        wide = statistics_dtype(self.queries.dtype)
        if not self.ranks.ring:
            travelled = None if columns is None else self.ranks.gathered(columns, self.ranks.keys)
            dqueries, dkeys = compute(self.all_at_once(everything, travelled))
            if need_keys:
                parts = self.ranks.scattered(dkeys)
                dkeys = parts[0] if len(parts) == 1 else sum(part.to(wide) for part in parts[1:]) + parts[0]
            return dqueries, dkeys.to(self.keys.dtype)
        total = self.queries.new_zeros(self.queries.shape, dtype=wide)

        def visit(here: _Visit) -> Tensor:
            dqueries, dkeys = compute(here)
            total.add_(dqueries)
            return dkeys.to(wide) if need_keys else here.keys.new_empty(len(here.keys), 0)

        dkeys = self.around(visit, torch.add, columns)
        return total.to(self.queries.dtype), dkeys.to(self.keys.dtype)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        targets: Tensor | None,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        same_id: str,
        teacher_queries: Tensor | None,
        teacher_keys: Tensor | None,
        teacher_lse_q: Tensor | None,
        teacher_lse_k: Tensor | None,
        totals: bool,
        columns: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        pairs, teacher = (targets, query_ids, key_ids), (teacher_queries, teacher_keys, teacher_lse_q, teacher_lse_k)
        side = _Side(ranks, queries, keys, *pairs, teacher)
        rows = _nothing_seen(queries)

        def statistics(here: _Visit) -> Tensor:  # of the columns [m, 7], or [m, 0]
            nonlocal rows
            of_columns = _nothing_seen(here.keys)
            if len(queries) and len(here.keys):
                arguments = queries, here.keys, logit_scale, *here.pairs, same_id, *here.teacher
                of_rows, made = op.softmax_fwd(*arguments, totals, columns, backend)
                rows, of_columns = _merged(rows, of_rows.T), made.T.contiguous() if columns else of_columns
            return of_columns if columns else of_columns[:, :0]

        everything: tuple[Tensor | None, ...] = ()
        if ranks.ring:
            of_keys = side.around(statistics, _merged if columns else _first, None)
        else:
            everything = side.gathered()
            of_all = statistics(side.all_at_once(everything))
            parts = ranks.scattered(of_all) if columns else [of_all[:0]]
            of_keys = functools.reduce(_merged, parts) if columns else parts[0]
        of_rows = rows.T.contiguous()
        of_columns = of_keys.T.contiguous() if columns else rows.new_empty(STATISTICS, 0)
        ctx.ranks, ctx.same_id, ctx.columns, ctx.backend = ranks, same_id, columns, backend
        ctx.save_for_backward(queries, keys, logit_scale, *pairs, *teacher, of_rows, of_columns, *everything)
        return of_rows, of_columns

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> Any:
        queries, keys, logit_scale, *rule, of_rows, of_columns = ctx.saved_tensors[:12]
        _, need_queries, need_keys, need_scale, *_ = ctx.needs_input_grad
        side = _Side(ctx.ranks, queries, keys, rule[0], rule[1], rule[2], (rule[3], rule[4], rule[5], rule[6]))
        of_queries, lse_q = grad_rows[:COEFFICIENTS].contiguous(), of_rows[LSE]
        columns = torch.cat([grad_columns[:COEFFICIENTS], of_columns[LSE : LSE + 1]]).T if ctx.columns else None

        def gradients(here: _Visit) -> tuple[Tensor, Tensor]:
            if not len(queries) or not len(here.keys):
                return torch.zeros_like(queries), torch.zeros_like(here.keys)
            of_keys = here.keys.new_empty(COEFFICIENTS + 1, 0, dtype=torch.float64)
            of_keys = of_keys if here.columns is None else here.columns.T.contiguous()
            arguments = of_queries, of_keys[:COEFFICIENTS], queries, here.keys, logit_scale, lse_q, of_keys[-1]
            rules = *here.pairs, ctx.same_id, *here.teacher
            dqueries, dkeys, _ = op.softmax_bwd(*arguments, *rules, None, None, need_queries, need_keys, ctx.backend)
            return dqueries if need_queries else torch.zeros_like(queries), dkeys

        dqueries = dkeys = dscale = None
        if need_queries or need_keys:
            dqueries, dkeys = side.gradients(gradients, ctx.saved_tensors[12:], columns, need_keys)
        if need_scale:
            parts = (grad_rows[LSE] * of_rows[MEAN]).sum() + (grad_columns[LSE] * of_columns[MEAN]).sum()
            dscale = parts.to(logit_scale.dtype)
        return None, dqueries if need_queries else None, dkeys if need_keys else None, dscale, *(None,) * 11


class _Sigmoid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: Ranks,
        queries: Tensor,
        keys: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        targets: Tensor | None,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        backend: str,
    ) -> Tensor:
        side = _Side(ranks, queries, keys, targets, query_ids, key_ids)
        sums = queries.new_zeros(3, dtype=torch.float64)

        def visit(here: _Visit) -> Tensor:
            if len(queries) and len(here.keys):
                sums.add_(op.sigmoid_fwd(queries, here.keys, logit_scale, logit_bias, *here.pairs, backend))
            return here.keys.new_empty(len(here.keys), 0)

        everything: tuple[Tensor | None, ...] = ()
        if ranks.ring:
            side.around(visit, _first, None)
        else:
            everything = side.gathered()
            visit(side.all_at_once(everything))
        ctx.ranks, ctx.backend = ranks, backend
        ctx.save_for_backward(
            queries, keys, logit_scale, logit_bias, targets, query_ids, key_ids, sums.clone(), *everything
        )
        return sums

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, grad_sums: Tensor) -> Any:
        queries, keys, logit_scale, logit_bias, *pairs, sums = ctx.saved_tensors[:8]
        _, need_queries, need_keys, need_scale, need_bias, *_ = ctx.needs_input_grad
        grad = grad_sums[0]

        def gradients(here: _Visit) -> tuple[Tensor, Tensor]:
            if not len(queries) or not len(here.keys):
                return torch.zeros_like(queries), torch.zeros_like(here.keys)
            arguments = grad, queries, here.keys, logit_scale, logit_bias, *here.pairs
            dqueries, dkeys, *_ = op.sigmoid_bwd(*arguments, None, need_queries, need_keys, ctx.backend)
            return dqueries if need_queries else torch.zeros_like(queries), dkeys

        dqueries = dkeys = None
        if need_queries or need_keys:
            side = _Side(ctx.ranks, queries, keys, *pairs)
            dqueries, dkeys = side.gradients(gradients, ctx.saved_tensors[8:], None, need_keys)
        return (
            None,
            dqueries if need_queries else None,
            dkeys if need_keys else None,
            (grad * sums[1]).to(logit_scale.dtype) if need_scale else None,
            (grad * sums[2]).to(logit_bias.dtype) if need_bias else None,
            *(None,) * 4,
        )


def _first(a: Tensor, b: Tensor) -> Tensor:
    return a


def _nothing_seen(features: Tensor) -> Tensor:
    """[rows, 7]: the statistics of rows before any key was seen."""
    nothing = features.new_zeros(len(features), STATISTICS, dtype=torch.float64)
    nothing[:, [LSE, TOP, BEST]] = -torch.inf
    return nothing


def _merged(a: Tensor, b: Tensor) -> Tensor:
    """The statistics [rows, 7] of what either has seen."""
    out = a + b
    lse = torch.logaddexp(a[:, LSE], b[:, LSE])
    of_a, of_b = (torch.where(lse == -torch.inf, 0.0, (x[:, LSE] - lse).exp()) for x in (a, b))
    out[:, LSE] = lse
    out[:, MEAN] = of_a * a[:, MEAN] + of_b * b[:, MEAN]
    out[:, [TOP, BEST]] = torch.maximum(a[:, [TOP, BEST]], b[:, [TOP, BEST]])
    return out
