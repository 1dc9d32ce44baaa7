"""What a call over ranks sends: its rounds of keys, and the bytes and messages that a rank receives in each.

`distributed.py` and `losses.py` exchange what is listed here, byte for byte: tests/ops/contrastive/test_traffic.py
counts it. A round is one exchange of keys, in which every rank's queries visit every rank's keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mmkernels.ops.contrastive.types import COEFFICIENTS, STATISTICS
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.collectives import NOTHING, Cost, Network, all_gather, all_reduce, all_to_all, ring_pass

__all__ = ["TABLE", "Call", "Round", "cost_of_round"]

TABLE = 40  # numbers that each rank sends before a call, to agree on it
_NUMBER = 8  # bytes of a float64 or an id


class Round(NamedTuple):
    """An exchange of keys.

    keys: rows of every rank.
    tensors: bytes per key of each tensor that travels with the keys.
    statistics: bytes per key that return to its owner in the forward.
    coefficients: bytes per key that travel with the keys in the backward only; all_gather sends these alone.
    gradient, wide_gradient: bytes per key that return in the backward, of all_gather and of the ring.
    visited_again: whether there is a backward.
    forward, backward: flop per pair of a query and a key.
    """

    keys: Sequence[int]
    tensors: tuple[int, ...]
    statistics: int
    coefficients: int
    gradient: int
    wide_gradient: int
    visited_again: bool
    forward: int
    backward: int


@dataclass(frozen=True)
class Call:
    """What decides the traffic of an `infonce` or `siglip` call over ranks; equal on every rank.

    Args:
        queries, keys, negatives: rows of every rank.
        width: E.
        dtype: of the features.
        sigmoid: `siglip` rather than `infonce`.
        symmetric, same_id, weights, return_stats: options of the call; weights and ids: whether there are any.
        teacher: width of the teacher's features, 0 for none.
        guide: width of the guide's features of `false_negatives`, 0 for none.
        others: a pass over the keys that are not positive, told by ids, besides that over all keys; alone: instead.
        gradients: whether queries, keys and negatives need one.
        scalars: bytes of each scalar (scale, bias) that needs a gradient.
    """

    queries: Sequence[int]
    keys: Sequence[int]
    negatives: Sequence[int]
    width: int
    dtype: torch.dtype
    sigmoid: bool = False
    symmetric: bool = True
    ids: bool = False
    same_id: str = "positive"
    weights: bool = False
    return_stats: bool = False
    teacher: int = 0
    guide: int = 0
    others: bool = False
    alone: bool = False
    gradients: tuple[bool, bool, bool] = (True, True, False)
    scalars: tuple[int, ...] = (4,)

    @property
    def world(self) -> int:
        """W."""
        return len(self.queries)

    def rounds(self) -> list[Round]:
        """Those of the keys: a teacher's own, the loss's, that of the others, and that of a sigmoid's statistics."""
        queries, keys, _ = self.gradients
        columns = not self.sigmoid and (self.symmetric or self.return_stats)
        main = self._round(self.keys, self.width, columns, (queries, keys))
        found = []
        if self.teacher:
            found.append(self._round(self.keys, self.teacher, columns, (False, False)))
            travelling = self.teacher * self.dtype.itemsize, *([_NUMBER] if columns else [])
            more = 2 * self.teacher
            main = main._replace(tensors=(*main.tensors, *travelling), forward=main.forward + more)
            main = main._replace(backward=main.backward + more if main.visited_again else 0)
        passes = [] if self.alone else [main]
        if self.others:
            passes.append(self._round(self.keys, self.width, self.symmetric, (queries, keys), ids=True))
        found += [each for one in passes for each in (self._directions(one) if self.guide else [one])]
        if self.sigmoid and self.return_stats:
            found.append(self._round(self.keys, self.width, True, (False, False)))
        return found

    def rounds_of_negatives(self) -> list[Round]:
        """The negatives' own, if any rank has some."""
        queries, _, negatives = self.gradients
        if not any(self.negatives):
            return []
        return [self._guided(self._round(self.negatives, self.width, False, (queries, negatives), ids=False))]

    def _guided(self, round_: Round) -> Round:
        """With a guide's keys."""
        if not self.guide:
            return round_
        tensors, more = (*round_.tensors, self.guide * self.dtype.itemsize), 2 * self.guide
        round_ = round_._replace(tensors=tensors, forward=round_.forward + more)
        return round_._replace(backward=round_.backward + more if round_.visited_again else 0)

    def _directions(self, round_: Round) -> list[Round]:
        """A guide's passes: rows alone, then the keys as rows, whom the queries visit."""
        queries, keys, _ = self.gradients
        ids = len(round_.tensors) > 1
        found = [self._round(self.keys, self.width, False, (queries, keys), ids=ids)]
        if self.symmetric:
            found.append(self._round(self.queries, self.width, False, (keys, queries), ids=ids))
        return [self._guided(each) for each in found]

    def _round(
        self, keys: Sequence[int], width: int, columns: bool, need: tuple[bool, bool], ids: bool | None = None
    ) -> Round:
        features = width * self.dtype.itemsize
        again = any(need)
        ids = self.ids if ids is None else ids
        return Round(
            keys=keys,
            tensors=(features, *([_NUMBER] if ids else [])),
            statistics=STATISTICS * _NUMBER if columns else 0,
            coefficients=(COEFFICIENTS + 1) * _NUMBER if columns and again else 0,
            gradient=features if need[1] else 0,
            wide_gradient=width * compute_dtype(self.dtype).itemsize if need[1] else 0,
            visited_again=again,
            forward=2 * width,
            backward=2 * width * (1 + sum(need)) if again else 0,
        )

    def rest(self, network: Network) -> Cost:
        """Everything but the rounds: the table of the agreement, ids, and sums over the ranks."""
        world = self.world
        directions = 2 if self.symmetric and not self.sigmoid else 1
        total = all_gather(network, world, TABLE * _NUMBER)
        sums = [_NUMBER * directions, *self.scalars]
        if self.ids and (not self.sigmoid or self.return_stats):
            for rows in (self.keys, self.queries)[:directions]:
                total += all_gather(network, world, _NUMBER * max(rows))
            if not self.sigmoid and self.same_id == "positive":
                sums += [_NUMBER] * directions
        if self.weights:
            sums.append(_NUMBER)
        if self.return_stats:
            sums.append(10 * _NUMBER)
        for size in sums:
            total += all_reduce(network, world, size)
        return total

    def cost(self, network: Network, rank: int, exchange: str, exchange_of_negatives: str | None = None) -> Cost:
        """What a rank receives in a forward and its backward; seconds are those of the exchange alone."""
        total = self.rest(network)
        for each in self.rounds():
            total += cost_of_round(each, exchange, network, rank)
        for each in self.rounds_of_negatives():
            total += cost_of_round(each, exchange_of_negatives or exchange, network, rank)
        return total


def cost_of_round(round_: Round, exchange: str, network: Network, rank: int) -> Cost:
    """What a rank receives in a round's forward and backward, nothing hidden behind computation."""
    if len(round_.keys) == 1 or not any(round_.keys):
        return NOTHING
    return _gathered(round_, network, rank) if exchange == "all_gather" else _ring(round_, network, rank)


def _gathered(round_: Round, network: Network, rank: int) -> Cost:
    world, longest, mine = len(round_.keys), max(round_.keys), round_.keys[rank]
    total = NOTHING
    for size in (*round_.tensors, round_.coefficients):
        total += all_gather(network, world, size * longest)
    for size in (round_.statistics, round_.gradient):
        if size:
            total += all_to_all(network, world, size * mine, size * longest)
    return total


def _ring(round_: Round, network: Network, rank: int) -> Cost:
    world, longest = len(round_.keys), max(round_.keys)
    # Blocks arrive from all other owners; results arrive for all owners but the one before, the last being one's own.
    blocks = [round_.keys[(rank - step) % world] for step in range(1, world)]
    results = [*blocks[1:], round_.keys[rank]]
    total = NOTHING
    passes = [(blocks, round_.tensors), (results, (round_.statistics,))]
    if round_.visited_again:
        passes += [(blocks, (*round_.tensors, round_.coefficients)), (results, (round_.wide_gradient,))]
    for counts, sizes in passes:
        size, tensors = sum(sizes), sum(each > 0 for each in sizes)
        for count in counts:
            total += ring_pass(network, world, count * size, tensors, longest * size)
    return total
