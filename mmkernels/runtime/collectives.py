"""What collectives cost a rank: bytes received, messages one after another, and seconds by the alpha-beta model.

A message of b bytes over a link takes `latency + b / bandwidth`. The network has two levels: ranks of one node reach
each other over `inside`, others over `between`, of which every rank has its own. A ring over all ranks enters and
leaves each node once. A library that runs one ring per rank of a node moves as much between nodes as all of its ranks'
links carry, so a gather gets `min(inside, ranks_per_node * between)`; a single message between nodes has one link.

Source: Hockney 1994 (alpha-beta); Thakur et al. 2005 (rings); Sanders et al. 2009 (two trees, whose all-reduce moves as
much as a ring); the steps between nodes are those of NCCL's tuning model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = [
    "NOTHING",
    "Cost",
    "Link",
    "Network",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "reduce_scatter",
    "ring_pass",
]


@dataclass(frozen=True)
class Link:
    """A message of b bytes takes `latency + b / bandwidth` seconds.

    Args:
        latency: seconds.
        bandwidth: bytes per second into one rank.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Links of ranks that fill one node after another, `ranks_per_node` in each."""

    inside: Link
    between: Link
    ranks_per_node: int

    @classmethod
    def flat(cls, link: Link) -> Network:
        """Every two ranks have the same link, and no rank uses another's."""
        return cls(link, link, 1)

    def nodes(self, world: int) -> int:
        return -(-world // self.ranks_per_node)

    def slowest(self, world: int) -> Link:
        """The link that a rank waits for when every rank sends to the next."""
        return self.inside if self.nodes(world) == 1 else self.between

    def ring_bandwidth(self, world: int) -> float:
        """Bytes per second into every rank in rings over all ranks."""
        if self.nodes(world) == 1:
            return self.inside.bandwidth
        return min(self.inside.bandwidth, self.ranks_per_node * self.between.bandwidth)

    def ring_latency(self, world: int) -> float:
        """Of the W-1 messages by which data reaches the last rank of a ring."""
        nodes = self.nodes(world)
        return (nodes - 1) * self.between.latency + (world - nodes) * self.inside.latency


@dataclass(frozen=True)
class Cost:
    """What a rank receives, in how many messages, and how long that takes.

    Args:
        received: bytes.
        messages: arriving one after another.
        seconds: by the model, for the slowest rank.
    """

    received: int = 0
    messages: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.received + other.received, self.messages + other.messages, self.seconds + other.seconds)

    def __mul__(self, times: int) -> Cost:
        return Cost(self.received * times, self.messages * times, self.seconds * times)


NOTHING = Cost()


def all_gather(network: Network, world: int, part: int) -> Cost:
    """Every rank receives the `part` bytes of every other rank."""
    if world == 1 or part == 0:
        return NOTHING
    received = (world - 1) * part
    return Cost(received, world - 1, network.ring_latency(world) + received / network.ring_bandwidth(world))


def reduce_scatter(network: Network, world: int, part: int) -> Cost:
    """Every rank receives sums for its `part` bytes of W parts: a gather backwards."""
    return all_gather(network, world, part)


def all_reduce(network: Network, world: int, size: int) -> Cost:
    """Every rank gets the sum of all ranks' `size` bytes: 2(W-1)/W of them, rounded up, in a ring or two trees."""
    if world == 1:
        return NOTHING
    received = -(-2 * (world - 1) * size // world)
    nodes, seconds = network.nodes(world), received / network.ring_bandwidth(world)
    rings = 2 * network.ring_latency(world)
    levels = math.ceil(math.log2(nodes))
    within = -(-world // nodes) - 1
    trees = 2 * (within * network.inside.latency + levels * network.between.latency)
    messages = 2 * (world - 1) if rings <= trees else 2 * (within + levels)
    return Cost(received, messages, seconds + min(rings, trees))


def all_to_all(network: Network, world: int, part: int, largest: int | None = None) -> Cost:
    """Every rank receives `part` bytes of its own from each other rank, over its own links, one after another.

    Args:
        largest: the part of the rank that receives most, for which the others wait; default `part`.
    """
    if world == 1:
        return NOTHING
    near = min(world, network.ranks_per_node) - 1
    far = world - 1 - near
    waits = part if largest is None else largest
    seconds = near * waits / network.inside.bandwidth, far * waits / network.between.bandwidth
    latency = near * network.inside.latency + far * network.between.latency
    return Cost((world - 1) * part, world - 1 if part else 0, latency + max(seconds))


def ring_pass(network: Network, world: int, size: int, messages: int = 1, largest: int | None = None) -> Cost:
    """Every rank sends to the next one and receives `size` bytes from the one before.

    Args:
        messages: into which the bytes are split, one after another.
        largest: the bytes of the rank that receives most, for which the others wait; default `size`.
    """
    if world == 1 or messages == 0:
        return NOTHING
    link, waits = network.slowest(world), size if largest is None else largest
    return Cost(size, messages if size else 0, messages * link.latency + waits / link.bandwidth)
