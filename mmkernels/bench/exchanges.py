"""What a contrastive loss over W ranks takes by each exchange: all_gather and ring, which `infonce` and `siglip` have,
and a 2-D grid, which is predicted here to tell whether it would pay; the package does not have it.

In a grid of R x C ranks, rank (r, c) has all pairs of the queries of row r and the keys of column c: n C queries and
n R keys of the W n of each. Queries are gathered along rows and keys along columns; statistics of both return the same
ways, their sums are gathered again, and so do gradients, in the dtype that the sums are computed in. A rank receives
(C - 1) + (R - 1) shares of everything instead of W - 1: with R = C about 2 sqrt(W).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmkernels import Machine
from mmkernels.ops.contrastive.choice import bytes_held, products_seconds, seconds
from mmkernels.ops.contrastive.traffic import Call
from mmkernels.ops.contrastive.types import COEFFICIENTS, STATISTICS
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.collectives import NOTHING, Cost, Network, all_gather, reduce_scatter

__all__ = ["Exchange", "call_of", "exchanges", "grid_cost", "grids"]

_NUMBER = 8  # bytes of a float64


@dataclass(frozen=True)
class Exchange:
    """A forward and backward of the loss with one exchange, per rank.

    Args:
        name: "all_gather", "ring" or "grid R x C".
        received: bytes.
        messages: arriving one after another.
        exchange: seconds that the exchange takes if nothing hides it.
        products: seconds of the loss's products.
        seconds: of all; where computation hides transfers less than the sum.
        held: bytes beyond the rank's own rows.
    """

    name: str
    received: int
    messages: int
    exchange: float
    products: float
    seconds: float
    held: int

    @property
    def lost(self) -> float:
        """The share of the time in which nothing is computed."""
        return 1 - min(1.0, self.products / self.seconds) if self.seconds else 0.0


def call_of(rows: int, width: int, world: int, dtype: torch.dtype, *, sigmoid: bool = False) -> Call:
    """The loss over ranks that have `rows` pairs each."""
    every = [rows] * world
    scalars = (4, 4) if sigmoid else (4,)
    return Call(every, every, [0] * world, width, dtype, sigmoid=sigmoid, scalars=scalars)


def grids(world: int) -> Iterator[tuple[int, int]]:
    """Every R x C of W ranks."""
    for rows in range(1, world + 1):
        if world % rows == 0:
            yield rows, world // rows


def grid_cost(call: Call, rows: int, columns: int, network: Network) -> Cost:
    """What a rank receives in a grid; ranks of a row follow one another, as those of a node do."""
    mine, element = max(call.queries), call.dtype.itemsize
    along_row = network
    along_column = Network(network.inside, network.between, max(1, network.ranks_per_node // columns))
    total = NOTHING
    for net, many in ((along_row, columns), (along_column, rows)):
        total += all_gather(net, many, mine * call.width * element)
        if not call.sigmoid:
            total += reduce_scatter(net, many, mine * STATISTICS * _NUMBER)
            total += all_gather(net, many, mine * (COEFFICIENTS + 1) * _NUMBER)
        total += reduce_scatter(net, many, mine * call.width * compute_dtype(call.dtype).itemsize)
    return total


def _grid(call: Call, rows: int, columns: int, machine: Machine) -> Exchange:
    mine, element = max(call.queries), call.dtype.itemsize
    cost = grid_cost(call, rows, columns, machine.network) + call.rest(machine.network)
    block = Call([mine * columns], [mine * rows], [0], call.width, call.dtype, sigmoid=call.sigmoid)
    computing = sum(seconds(block, each, "all_gather", machine) for each in block.rounds())
    products = sum(products_seconds(block, each, machine) for each in block.rounds())
    wide = compute_dtype(call.dtype).itemsize
    held = mine * call.width * (columns + rows - 2) * (element + wide)
    name = f"grid {rows} x {columns}"
    return Exchange(name, cost.received, cost.messages, cost.seconds, products, computing + cost.seconds, held)


def exchanges(call: Call, machine: Machine) -> list[Exchange]:
    """all_gather, ring, and the fastest grid, if there is one that is neither row nor column."""
    network, found = machine.network, []
    rest = call.rest(network)
    products = sum(products_seconds(call, each, machine) for each in call.rounds())
    for name in ("all_gather", "ring"):
        cost = call.cost(network, 0, name)
        took = rest.seconds + sum(seconds(call, each, name, machine) for each in call.rounds())
        held = sum(bytes_held(call, each, name) for each in call.rounds())
        found.append(Exchange(name, cost.received, cost.messages, cost.seconds, products, took, held))
    proper = [_grid(call, r, c, machine) for r, c in grids(call.world) if 1 < r < call.world]
    return found + sorted(proper, key=lambda each: each.seconds)[:1]
