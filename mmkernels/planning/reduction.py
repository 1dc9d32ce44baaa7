"""What the gradients' reduction sends: of replicas (ddp), of shards (fsdp), and of shards within a node whose nodes are
replicas (hsdp). Bytes are those of torch's DistributedDataParallel and fully_shard, as tests count them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmkernels.ops.checks import wrong_value
from mmkernels.runtime.collectives import NOTHING, Cost, Network, all_gather, all_reduce, reduce_scatter
from mmkernels.runtime.machine import Machine

__all__ = ["REDUCTIONS", "Units", "reduction_cost", "shards"]

REDUCTIONS = ("ddp", "fsdp", "hsdp")
BUCKET = 25 * 2**20  # bytes that DDP reduces at once

# Shapes of the parameters of each module that `fully_shard` is applied to.
Units = Sequence[Sequence[tuple[int, ...]]]


def shards(reduction: str, world: int, machine: Machine) -> int:
    """Ranks that share one copy of the parameters.

    Raises:
        ValueError: W ranks that do not fill their nodes, with hsdp.
    """
    if reduction != "hsdp":
        return world if reduction == "fsdp" else 1
    within = min(world, int(machine.ranks_per_node))
    if world % within:
        wrong_value("ranks", f"a multiple of the {within} ranks of a node with reduction='hsdp'", world)
    return within


def reduction_cost(
    reduction: str, units: Units, world: int, machine: Machine, *, weight: int = 4, gradient: int = 4, gathers: int = 2
) -> Cost:
    """What a rank receives in a step, and how long that takes if nothing else happens meanwhile.

    Args:
        reduction: "ddp": all_reduce in buckets of 25 MiB. "fsdp": `gathers` times all_gather of each unit, and
            reduce_scatter. "hsdp": the same within a node, and all_reduce of a rank's shard over the nodes.
        units: parameters; their first dimension is split over the ranks and padded to equal parts.
        world: W.
        machine: whose links are used.
        weight, gradient: bytes per element of gathered parameters and of reduced gradients.
        gathers: all_gathers per step: in the forward and again in the backward.
    """
    network = machine.network
    if reduction == "ddp":
        size = gradient * sum(math.prod(shape) for unit in units for shape in unit)
        whole, rest = divmod(size, BUCKET)
        return all_reduce(network, world, BUCKET) * whole + (all_reduce(network, world, rest) if rest else NOTHING)
    within = shards(reduction, world, machine)
    total = NOTHING
    for unit in units:
        part = sum(-(-shape[0] // within) * math.prod(shape[1:]) for shape in unit)
        total += all_gather(network, within, weight * part) * gathers
        total += reduce_scatter(network, within, gradient * part)
        if reduction == "hsdp" and world > within:
            total += all_reduce(Network.flat(machine.between), world // within, gradient * part)
    return total
