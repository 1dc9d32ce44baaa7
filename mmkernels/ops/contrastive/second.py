"""Second derivatives and forward mode of the losses: PyTorch, a few rows at a time, in O((N+M)·E) memory.

Along tangents dx, dy, ds of features and scale (and db of the bias), with a_ij = <x_i, y_j> and l_ij = s a_ij (+ b)::

    da_ij = <dx_i, y_j> + <x_i, dy_j>       dl_ij = ds a_ij + s da_ij (+ db)

the lse has the tangent `dlse_i = sum_j p_ij dl_ij`, and statistics that are sums of a have the same sums of da. A
function of the statistics has the tangent `sum_ij A_ij dl_ij + B_ij da_ij`, with A made of softmaxes (or sigmoids) and
B constant; the tangent of A is::

    dA_ij = c_i p_ij (dl_ij - dlse_i) + the same of columns

    tangent of dqueries   (s dA + ds A) y + (s A + B) dy        of dscale   sum_ij dA_ij a_ij + A_ij da_ij
    tangent of dkeys      the transpose                         of dbias    sum_ij dA_ij

Everything is computed in the statistics' dtype. The lse is recomputed too: a forward's lse comes from differently
rounded products, and the rounding error of a large logit would end up in a probability near 1. Tangents of gradients
are empty if their incoming gradient is None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.ops.contrastive.reference import no_autocast, own_pairs, positive_and_seen, softmax_of_seen
from mmkernels.ops.contrastive.types import (
    COEFFICIENTS,
    LSE,
    POSITIVE,
    TEACHER,
    TOTAL,
    Guide,
    Means,
    Need,
    Pairs,
    Slopes,
    Teacher,
)
from mmkernels.ops.dtypes import compute_dtype

__all__ = ["infonce_second", "siglip_second", "sigmoid_second", "softmax_second"]

_PAIRS_A_CHUNK = 2**21  # a chunk holds about ten such matrices


class _Tile(NamedTuple):
    """Some rows against all keys: [n, M] each."""

    rows: slice
    similarity: Tensor
    moved: Tensor  # tangent of the similarity
    positive: Tensor
    seen: Tensor
    teacher_q: Tensor | None  # the teacher's softmax over rows, and over columns
    teacher_k: Tensor | None


class _Call(NamedTuple):
    """Features and scale with their tangents, in the statistics' dtype, and the pairs."""

    x: Tensor
    y: Tensor
    scale: Tensor
    dx: Tensor
    dy: Tensor
    dscale: Tensor
    pairs: Pairs
    teacher: Teacher | None
    guide: Guide | None = None
    hardness: float = 0.0

    def logits(self, tile: _Tile) -> Tensor:
        """The hardness adds to the logits but not to their derivatives by the similarity."""
        return (self.scale + self.hardness) * tile.similarity

    def tiles(self, tangents: bool = True) -> Iterator[_Tile]:
        (n, _), m = self.x.shape, self.y.shape[0]
        size = max(1, _PAIRS_A_CHUNK // max(m, 1))
        for start in range(0, n, size):
            rows = slice(start, start + size)
            similarity = self.x[rows] @ self.y.T
            moved = self.dx[rows] @ self.y.T + self.x[rows] @ self.dy.T if tangents else torch.zeros_like(similarity)
            targets, query_ids = (None if t is None else t[rows] for t in self.pairs[:2])
            pairs = self.pairs._replace(targets=targets, query_ids=query_ids)
            positive, seen = positive_and_seen(similarity, pairs, self._guide_of(rows))
            yield _Tile(rows, similarity, moved, positive, seen, *self._softmax_of_teacher(rows, seen))

    def _softmax_of_teacher(self, rows: slice, seen: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The teacher's softmax over rows and over columns; constant."""
        if self.teacher is None:
            return None, None
        queries, keys, lse_q, lse_k = self.teacher
        logits = self.scale * (queries[rows].to(self.x.dtype) @ keys.to(self.x.dtype).T)
        of_rows = softmax_of_seen(logits, lse_q[rows, None], seen)
        return of_rows, None if lse_k is None else softmax_of_seen(logits, lse_k[None], seen)

    def _guide_of(self, rows: slice) -> Guide | None:
        if self.guide is None:
            return None
        queries, keys, thresholds = self.guide
        return Guide(queries[rows], keys, thresholds[rows])

    def logits_moved(self, tile: _Tile) -> Tensor:
        return self.dscale * tile.similarity + self.scale * tile.moved


def _call(
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None],
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None = None,
    hardness: float = 0.0,
) -> _Call:
    x, y, scale = inputs = [t.to(compute_dtype(queries.dtype)) for t in (queries, keys, logit_scale)]
    dx, dy, dscale = (
        torch.zeros_like(x) if t is None else t.to(x.dtype) for x, t in zip(inputs, tangents, strict=True)
    )
    return _Call(x, y, scale, dx, dy, dscale, pairs, teacher, guide, hardness)


def _lse(call: _Call, columns: int) -> tuple[Tensor, Tensor]:
    """lse of rows and columns, float64 [N] and [M] (or [0])."""
    of_rows, of_columns = (call.x.new_full((n,), -torch.inf, dtype=torch.float64) for n in (len(call.x), columns))
    for tile in call.tiles(tangents=False):
        logits = call.logits(tile).double().masked_fill(~tile.seen, -torch.inf)
        of_rows[tile.rows] = logits.logsumexp(1)
        if columns:
            of_columns = torch.logaddexp(of_columns, logits.logsumexp(0))
    return of_rows, of_columns


def _moved_statistics(call: _Call, lse: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Tangents of the rows' and columns' first four statistics, float64 [4, N] and [4, M] (or [4, 0])."""
    lse_q, lse_k = lse
    of_rows, of_columns = (x.new_zeros(COEFFICIENTS, x.shape[0]) for x in lse)
    for tile in call.tiles():
        logits, moved = call.logits(tile), call.logits_moved(tile)
        sums = [(of_rows[:, tile.rows], 1, lse_q[tile.rows, None], tile.teacher_q)]
        if lse_k.shape[0]:
            sums.append((of_columns, 0, lse_k[None], tile.teacher_k))
        for into, dim, lse_, teacher in sums:
            into[LSE] += (softmax_of_seen(logits, lse_, tile.seen) * moved).double().sum(dim)
            into[POSITIVE] += torch.where(tile.positive, tile.moved, 0.0).double().sum(dim)
            into[TOTAL] += torch.where(tile.seen, tile.moved, 0.0).double().sum(dim)
            if teacher is not None:
                into[TEACHER] += (teacher * tile.moved).double().sum(dim)
    return of_rows, of_columns


class _Sums:
    """The tangents of dqueries, dkeys, dscale and dbias, summed over tiles."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        self.queries, self.keys = torch.zeros_like(call.x), torch.zeros_like(call.y)
        self.scale = self.bias = call.scale.new_zeros((), dtype=torch.float64)

    def add(self, tile: _Tile, of_logits: Tensor, moved: Tensor, of_similarity: Tensor | None) -> None:
        """A tile's A, dA and B."""
        call, rows = self.call, tile.rows
        weight, change = call.scale * of_logits, call.scale * moved + call.dscale * of_logits
        if of_similarity is not None:
            weight = weight + of_similarity
        self.queries[rows] = change @ call.y + weight @ call.dy
        self.keys += change.T @ call.x[rows] + weight.T @ call.dx[rows]
        self.scale = self.scale + (moved * tile.similarity + of_logits * tile.moved).double().sum()
        self.bias = self.bias + moved.double().sum()

    def results(self, queries: Tensor, keys: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
        """The sums in the inputs' dtypes; scalars: the scale, and the bias if there is one."""
        sums = zip((self.scale, self.bias), scalars, strict=False)
        return self.queries.to(queries.dtype), self.keys.to(keys.dtype), *(x.to(like.dtype) for x, like in sums)


def _nothing(*inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) for x in inputs)


def _softmax_tangents(
    call: _Call,
    lse: tuple[Tensor, Tensor],
    moved_lse: tuple[Tensor, Tensor],
    coefficients: tuple[Tensor, Tensor],
    of_positive_logits: Tensor | None = None,
) -> _Sums:
    """Tangents of the gradient of `sum coefficients · statistics`, [4, N] and [4, M], plus scaled positive logits."""
    wide = call.x.dtype
    sums = _Sums(call)
    for tile in call.tiles():
        logits, change = call.logits(tile), call.logits_moved(tile)
        of_logits, moved, of_similarity = (torch.zeros_like(logits) for _ in range(3))
        teachers = tile.teacher_q, tile.teacher_k
        of_rows = lse[0][tile.rows, None], moved_lse[0][tile.rows, None], coefficients[0][:, tile.rows, None]
        sides = [of_rows, (lse[1][None], moved_lse[1][None], coefficients[1][:, None])]
        for (lse_, shift, c), of_teacher in zip(sides[: 2 if lse[1].shape[0] else 1], teachers, strict=False):
            c = c.to(wide)
            p = c[LSE] * softmax_of_seen(logits, lse_, tile.seen)
            of_logits += p
            moved += p * (change - shift.to(wide))
            of_similarity += c[POSITIVE] * tile.positive + c[TOTAL] * tile.seen
            if of_teacher is not None:
                of_similarity += c[TEACHER] * of_teacher
        if of_positive_logits is not None:
            of_logits += of_positive_logits * tile.positive
        sums.add(tile, of_logits, moved, of_similarity)
    return sums


def softmax_second(
    tangent_queries: Tensor | None,
    tangent_keys: Tensor | None,
    tangent_logit_scale: Tensor | None,
    coefficients_q: Tensor | None,
    coefficients_k: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    pairs: Pairs,
    teacher: Teacher | None,
    guide: Guide | None,
    hardness: float,
    means: Means | None,
    need: Need,
) -> tuple[Tensor, ...]:
    """Tangents of the differentiable statistics [4, N] and [4, M] (or [4, 0]), and of dqueries, dkeys, dscale."""
    with no_autocast(queries):
        tangents = tangent_queries, tangent_keys, tangent_logit_scale
        call = _call(tangents, queries, keys, logit_scale, pairs, teacher, guide, hardness)
        lse = _lse(call, columns=lse_k.shape[0])
        of_rows, of_columns = _moved_statistics(call, lse)
        if coefficients_q is None or coefficients_k is None:
            return of_rows, of_columns, *_nothing(queries, keys, logit_scale)
        moved_lse = of_rows[LSE], of_columns[LSE]
        sums = _softmax_tangents(call, lse, moved_lse, (coefficients_q, coefficients_k))
        return of_rows, of_columns, *sums.results(queries, keys, logit_scale)


def infonce_second(
    tangent_queries: Tensor | None,
    tangent_keys: Tensor | None,
    tangent_logit_scale: Tensor | None,
    grad_loss: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    lse_q: Tensor,
    lse_k: Tensor,
    grad_scale: Tensor,
    need: Need,
) -> tuple[Tensor, ...]:
    """Tangents of the loss [], and of dqueries, dkeys, dscale."""
    with no_autocast(queries):
        n, tangents = max(queries.shape[0], 1), (tangent_queries, tangent_keys, tangent_logit_scale)
        call = _call(tangents, queries, keys, logit_scale, own_pairs(queries), None)
        lse = _lse(call, columns=keys.shape[0])
        of_rows, of_columns = _moved_statistics(call, lse)
        positive = (call.x * call.y).sum(1).double()
        of_positive = call.scale * of_rows[POSITIVE] + call.dscale * positive
        moved_loss = ((of_rows[LSE] + of_columns[LSE] - 2 * of_positive).sum() / (2 * n)).to(call.x.dtype)
        if grad_loss is None:
            return moved_loss, *_nothing(queries, keys, logit_scale)
        share = grad_loss.to(call.x.dtype) / (2 * n)
        coefficients = [x.new_zeros(COEFFICIENTS, x.shape[0]) for x in (call.x, call.y)]
        for line in coefficients:
            line[LSE] = share
        moved_lse = of_rows[LSE], of_columns[LSE]
        sums = _softmax_tangents(call, lse, moved_lse, (coefficients[0], coefficients[1]), -2 * share)
        return moved_loss, *sums.results(queries, keys, logit_scale)


def sigmoid_second(
    tangent_queries: Tensor | None,
    tangent_keys: Tensor | None,
    tangent_logit_scale: Tensor | None,
    tangent_logit_bias: Tensor | None,
    grad_sum: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    pairs: Pairs,
    sums: Tensor | None,
    need: Need,
) -> tuple[Tensor, ...]:
    """Tangents of the sum of all pairs' losses [] float64, and of dqueries, dkeys, dscale, dbias."""
    with no_autocast(queries):
        tangents = tangent_queries, tangent_keys, tangent_logit_scale
        call = _call(tangents, queries, keys, logit_scale, pairs, None)
        dbias = torch.zeros_like(call.scale) if tangent_logit_bias is None else tangent_logit_bias.to(call.x.dtype)
        total, moved = _Sums(call), torch.zeros_like(call.scale, dtype=torch.float64)
        for tile in call.tiles():
            signs = torch.where(tile.positive, 1.0, -1.0).to(call.x.dtype)
            z, change = signs * (call.scale * tile.similarity + logit_bias), call.logits_moved(tile) + dbias
            of_logits = -signs * torch.sigmoid(-z)
            moved = moved + (of_logits * change).double().sum()
            if grad_sum is not None:
                grad = grad_sum.to(call.x.dtype)
                total.add(tile, grad * of_logits, grad * torch.sigmoid(z) * torch.sigmoid(-z) * change, None)
        if grad_sum is None:
            return moved, *_nothing(queries, keys, logit_scale, logit_bias)
        return moved, *total.results(queries, keys, logit_scale, logit_bias)


def siglip_second(
    tangent_queries: Tensor | None,
    tangent_keys: Tensor | None,
    tangent_logit_scale: Tensor | None,
    tangent_logit_bias: Tensor | None,
    grad_loss: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    slopes: Slopes,
    need: Need,
) -> tuple[Tensor, ...]:
    """Tangents of the loss [], and of dqueries, dkeys, dscale, dbias."""
    n, tangents = max(queries.shape[0], 1), (tangent_queries, tangent_keys, tangent_logit_scale, tangent_logit_bias)
    grad_sum, features = None if grad_loss is None else grad_loss.double() / n, (queries, keys, logit_scale, logit_bias)
    moved, *rest = sigmoid_second(*tangents, grad_sum, *features, own_pairs(queries), None, need)
    return (moved / n).to(compute_dtype(queries.dtype)), *rest
