"""Whether keys are gathered or go round a ring: predicted seconds and bytes of both, from numbers that ranks agree on.

A gather sends over all links of a node at once, but nothing is computed meanwhile, and its memory grows with N. The
ring sends the keys twice and their gradients in float32, over one link between nodes, and starts the computation W
times; but on a GPU each block's computation hides a transfer. A CPU moves bytes by itself: there only memory is gained.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmkernels.ops.contrastive.traffic import Call, Round
from mmkernels.ops.dtypes import compute_dtype
from mmkernels.runtime.collectives import all_gather, all_to_all, ring_pass
from mmkernels.runtime.machine import Machine

__all__ = ["MEMORY_SHARE", "bytes_held", "choose", "products_seconds", "seconds"]

MEMORY_SHARE = 0.25  # of a rank's memory that gathered keys and their gradients may take
PRODUCTS = 0.7  # of a matmul's rate that the losses' kernels attain: 0.55 to 0.83 in benches/results
# Torch ops of a visit in the ring, as a dispatch mode counts them: forward (most merge statistics) and backward.
VISIT, VISIT_OF_SIGMOID = (112, 35), (13, 21)
# What a pass takes besides its visits, in small ops: torch ops and Python, from the time of calls with one rank.
ONCE, ONCE_OF_SIGMOID = (88, 105), (87, 79)


def choose(call: Call, machine: Machine) -> tuple[str, str]:
    """The exchange of keys and that of negatives: "all_gather", or "ring" if it is predicted to be faster or if
    gathered tensors would take more than MEMORY_SHARE of a rank's memory. Equal for equal arguments."""
    return _faster(call, call.rounds(), machine), _faster(call, call.rounds_of_negatives(), machine)


def _faster(call: Call, rounds: Sequence[Round], machine: Machine) -> str:
    if call.world == 1 or not rounds:
        return "all_gather"
    if sum(bytes_held(call, each, "all_gather") for each in rounds) > MEMORY_SHARE * machine.memory:
        return "ring"
    gathered, ring = (sum(seconds(call, each, how, machine) for each in rounds) for how in ("all_gather", "ring"))
    return "ring" if ring < gathered else "all_gather"


def seconds(call: Call, round_: Round, exchange: str, machine: Machine) -> float:
    """Predicted, of a round's forward and backward on the slowest rank, computation included."""
    passes = (0, 1) if round_.visited_again else (0,)
    of_pass = _gathered_seconds if exchange == "all_gather" else _ring_seconds
    return sum(of_pass(call, round_, which, machine) for which in passes)


def products_seconds(call: Call, round_: Round, machine: Machine) -> float:
    """Of a round's products alone, on the rank with most queries."""
    flop = (round_.forward + round_.backward) * max(call.queries) * sum(round_.keys)
    return flop / (PRODUCTS * machine.rate(call.dtype))


def _visit(call: Call, round_: Round, which: int, keys: int, machine: Machine, *, first: bool) -> float:
    """Seconds of a visit to some keys; the first has what a pass takes once."""
    launches = (VISIT_OF_SIGMOID if call.sigmoid else VISIT)[which]
    launches += (ONCE_OF_SIGMOID if call.sigmoid else ONCE)[which] if first else 0
    flop = (round_.forward, round_.backward)[which] * max(call.queries) * keys
    products, launching = flop / (PRODUCTS * machine.rate(call.dtype)), launches * machine.launch
    return max(products, launching) if machine.asynchronous else products + launching


def _gathered_seconds(call: Call, round_: Round, which: int, machine: Machine) -> float:
    world, longest, network = call.world, max(round_.keys), machine.network
    gathered = (round_.coefficients,) if which else round_.tensors
    returned = round_.gradient if which else round_.statistics
    total = _visit(call, round_, which, sum(round_.keys), machine, first=True)
    total += sum(all_gather(network, world, size * longest).seconds for size in gathered)
    return total + (all_to_all(network, world, returned * longest).seconds if returned else 0.0)


def _ring_seconds(call: Call, round_: Round, which: int, machine: Machine) -> float:
    world, longest, network = call.world, max(round_.keys), machine.network
    block = [*round_.tensors, *([round_.coefficients] if which and round_.coefficients else [])]
    result = round_.wide_gradient if which else round_.statistics
    first, visit = (_visit(call, round_, which, longest, machine, first=is_first) for is_first in (True, False))
    last = ring_pass(network, world, longest * result, int(result > 0)).seconds
    passing = ring_pass(network, world, longest * sum(block), len(block)).seconds + last
    step = max(visit, passing) if machine.asynchronous else visit + passing
    return first + (world - 1) * step + last


def bytes_held(call: Call, round_: Round, exchange: str) -> int:
    """Of tensors beyond the rank's own rows and their gradients, at most at one time, on the rank with most rows."""
    keys, longest = sum(round_.keys), max(round_.keys)
    travelling, results = sum(round_.tensors), round_.statistics
    wide = compute_dtype(call.dtype).itemsize * call.width
    if exchange == "ring":
        blocks = 2 * (travelling + round_.coefficients)
        returning = 3 * max(results, round_.wide_gradient)
        return longest * (blocks + returning) + (max(call.queries) * wide if round_.visited_again else 0)
    padded = call.world * longest
    copied = travelling * (keys + (padded if padded != keys else 0))
    kept = travelling * keys if round_.visited_again else 0
    forward = max(copied, travelling * keys + results * (keys + 2 * padded))
    backward = kept + round_.coefficients * keys + round_.gradient * (keys + padded)
    return max(forward, backward + (longest * wide if round_.gradient else 0))
