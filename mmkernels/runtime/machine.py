"""A machine in a few figures, from which times of a step and its exchanges are predicted."""

from __future__ import annotations

import functools
import json
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mmkernels.runtime.collectives import Link, Network
from mmkernels.runtime.measuring import copy_rate, launch_seconds, link_of, matmul_rate, worst_of

__all__ = ["FIGURES", "Link", "Machine", "machine_of"]

MEASURED = (torch.float64, torch.float32, torch.bfloat16)
_ALIKE = {"float16": "bfloat16", "bfloat16": "float16"}

# Figures in the order of `Machine.figures`: whether the larger one is the slower.
_LARGER_IS_SLOWER = (False, False, False, False, True, False, True, False, True, False)
FIGURES = len(_LARGER_IS_SLOWER)


@dataclass(frozen=True)
class Machine:
    """What a rank computes, copies and receives per second, and how ranks are connected.

    A time is `flop / flops + bytes / bandwidth + messages * latency`. Figures are what programs attain, not peaks.

    Args:
        name: what it is called in tables.
        flops: flop/s of products by dtype name; without float16, bfloat16's is used, and the other way round.
        memory_bandwidth: bytes per second that a copy reads and writes.
        memory: bytes per rank.
        ranks_per_node: ranks that reach each other by `inside`; ranks fill one node after another.
        inside, between: `Link(latency, bandwidth)` of two ranks in a node and of two in different nodes, seconds and
            bytes per second into one rank.
        launch: seconds of a small op.
        asynchronous: whether launches, products and transfers run side by side, as on a GPU: together they take the
            longest of their times, otherwise the sum.
        source: where the figures come from.

    Raises:
        TypeError, ValueError: a figure of the wrong type or out of range.
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    memory_bandwidth: float
    memory: float
    ranks_per_node: int
    inside: Link
    between: Link
    launch: float
    asynchronous: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.flops, Mapping) or not self.flops:
            raise TypeError(f"flops: expected rates by dtype name, such as {{'float32': 1e12}}, got {self.flops!r}")
        for dtype in self.flops:
            if not isinstance(getattr(torch, dtype if isinstance(dtype, str) else "", None), torch.dtype):
                raise ValueError(f"flops: expected names of dtypes, such as 'float32', got {dtype!r}")
        for name, link in (("inside", self.inside), ("between", self.between)):
            if not isinstance(link, Link):
                raise TypeError(f"{name}: expected a Link, got {link!r} ({type(link).__name__})")
        figures = {f"flops[{name!r}]": rate for name, rate in self.flops.items()}
        figures |= {name: getattr(self, name) for name in ("memory_bandwidth", "memory", "ranks_per_node", "launch")}
        figures |= {f"{name}.{what}": getattr(getattr(self, name), what) for name in _LINKS for what in _OF_A_LINK}
        for name, value in figures.items():
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name}: expected a number > 0, got {value!r} ({type(value).__name__})")
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a number > 0, got {value!r}")
        if self.ranks_per_node != int(self.ranks_per_node):
            raise ValueError(f"ranks_per_node: expected an integer, got {self.ranks_per_node!r}")

    @property
    def network(self) -> Network:
        """Its links, for the functions of `collectives`."""
        return Network(self.inside, self.between, int(self.ranks_per_node))

    def rate(self, dtype: torch.dtype) -> float:
        """Flop/s of products of this dtype.

        Raises:
            ValueError: the machine has no rate for it.
        """
        name = str(dtype).removeprefix("torch.")
        rate = self.flops.get(name) or self.flops.get(_ALIKE.get(name, name))
        if rate is None:
            raise ValueError(f"machine: expected one with a rate for {name}, got {', '.join(self.flops)} ({self.name})")
        return rate

    @staticmethod
    def of(device: torch.device | str) -> Machine:
        """What a device is taken for where no machine is given: a GPU by its name, with its own memory, other devices
        for "CPU". Nothing is measured."""
        return machine_of(torch.device(device))

    @staticmethod
    def peak(device: torch.device | str, dtype: torch.dtype) -> float | None:
        """flop/s of dense products in the data sheet of an A100, H100 or H200 on an SXM board; None for another
        device."""
        kind = torch.device(device)
        name = torch.cuda.get_device_properties(kind).name if kind.type == "cuda" else ""
        words = set(name.upper().replace("-", " ").split())
        found = [PRESETS[known] for known in ("H200", "H100", "A100-80GB") if known[:4] in words]
        return None if not found or words & {"PCIE", "NVL", "MIG"} else found[0].rate(dtype) / PRODUCTS

    @staticmethod
    def named(name: str) -> Machine:
        """A preset: "A100-80GB", "H100" or "H200" by data sheet, or "CPU".

        Raises:
            ValueError: another name.
        """
        if name not in PRESETS:
            raise ValueError(f"name: expected one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    def save(self, path: str | Path) -> None:
        """Write the figures as JSON, for `load`."""
        Path(path).write_text(json.dumps(asdict(self), indent=1, default=float) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Machine:
        """Read what `save` wrote.

        Raises:
            ValueError: a file with other content.
            OSError: no file.
        """
        try:
            values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**values, **{name: Link(**values[name]) for name in _LINKS}})
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ValueError(f"path: expected a file that Machine.save wrote, got {str(path)!r}: {error}") from None

    def figures(self, dtype: torch.dtype) -> list[float]:
        """[FIGURES] numbers that say all about it for one dtype; `slowest` makes a machine of them."""
        links = (self.inside.latency, self.inside.bandwidth, self.between.latency, self.between.bandwidth)
        first = (self.rate(dtype), self.memory_bandwidth, self.memory, float(self.ranks_per_node))
        return [*first, *links, self.launch, float(self.asynchronous)]

    @classmethod
    def slowest(cls, dtype: torch.dtype, figures: Sequence[Sequence[float]]) -> Machine:
        """With the worst of each figure among machines, one row of `figures(dtype)` for each."""
        worst = [
            max(of) if larger else min(of)
            for of, larger in zip(zip(*figures, strict=True), _LARGER_IS_SLOWER, strict=True)
        ]
        rate, copies, memory, per_node, *links, launch, asynchronous = worst
        inside, between = Link(*links[:2]), Link(*links[2:])
        flops, hides = {str(dtype).removeprefix("torch."): rate}, bool(asynchronous)
        return cls("slowest", flops, copies, memory, int(per_node), inside, between, launch, hides)

    @classmethod
    def measured(
        cls,
        device: torch.device | str = "cpu",
        *,
        group: Any = None,
        node_group: Any = None,
        dtypes: Sequence[torch.dtype] = MEASURED,
        memory: float | None = None,
        seconds: float = 0.2,
    ) -> Machine:
        """This machine, by measurement: products, copies and small ops on the device, and the links of a group.

        A link's latency and bandwidth are fitted to the times of all_gather and all_reduce. With a group every rank
        must call this, and gets the slowest rank's figures. On a CPU 16-bit products count at least as fast as those of
        float32, to which the kernels convert them.

        Args:
            device: where to measure; also where the group's tensors are.
            group: a process group whose ranks are in one node, or, with `node_group`, in several; None for the links of
                `machine_of(device)`.
            node_group: a process group of this rank's node, whose ranks follow one another in `group`.
            dtypes: of the products.
            memory: bytes per rank; by default the GPU's, and of a CPU that of `machine_of(device)`.
            seconds: to spend on each figure.

        Raises:
            ValueError: node_group without group.
        """
        if node_group is not None and group is None:
            raise ValueError(f"group: expected a process group of all nodes, to go with node_group, got {group!r}")
        device, names = torch.device(device), [str(dtype).removeprefix("torch.") for dtype in dtypes]
        usual = machine_of(device)
        rates = [matmul_rate(dtype, device, seconds) for dtype in dtypes]
        if device.type == "cpu" and torch.float32 in dtypes:
            single = rates[list(dtypes).index(torch.float32)]
            rates = [max(of, single) if dtype.itemsize == 2 else of for of, dtype in zip(rates, dtypes, strict=True)]
        numbers = [*rates, copy_rate(device, seconds), launch_seconds(device, seconds)]
        inside, between, per_node = usual.inside, usual.between, usual.ranks_per_node
        if group is not None:
            numbers = worst_of(numbers, [False] * (len(numbers) - 1) + [True], group, device)
            inside = between = _link(group if node_group is None else node_group, device, usual)
            per_node = group.size()
        if node_group is not None:
            per_node = node_group.size()
            inside = Link(*worst_of([inside.latency, inside.bandwidth], [True, False], group, device))
            between = _between(_link(group, device, usual), inside, group.size(), per_node)
        *rates, copies, launch = numbers
        return replace(
            usual,
            name="measured",
            flops=dict(zip(names, rates, strict=True)),
            memory_bandwidth=copies,
            memory=usual.memory if memory is None else memory,
            ranks_per_node=per_node,
            inside=inside,
            between=between,
            launch=launch,
            source=f"measured on {device}" + ("" if group is None else f" over {group.size()} ranks"),
        )


_LINKS, _OF_A_LINK = ("inside", "between"), ("latency", "bandwidth")


def _link(group: Any, device: torch.device, usual: Machine) -> Link:
    """Measured, or of a group of one rank, which sends nothing, what is usual."""
    return link_of(group, device) if group.size() > 1 else usual.inside


def _between(whole: Link, inside: Link, world: int, per_node: int) -> Link:
    """The link between nodes, from that which fits a group as if all of its links were the same."""
    nodes = -(-world // per_node)
    if nodes == 1:
        return inside
    latency = (whole.latency * (world - 1) - inside.latency * (world - nodes)) / (nodes - 1)
    return Link(max(latency, inside.latency), min(whole.bandwidth / per_node, inside.bandwidth))


# What programs attain of a data sheet's figures.
PRODUCTS, COPIES, LINKS = 0.6, 0.8, 0.8


def _data_sheet(
    name: str, rates: tuple[float, float, float], memory: tuple[float, float], links: tuple[float, float]
) -> Machine:
    """A GPU by its data sheet.

    Args:
        rates: peak flop/s without sparsity of 16-bit types, of float32 and float64 without tensor cores.
        memory: bytes, bytes per second.
        links: bytes per second into a GPU from its node, and from other nodes over its own network adapter.

    Latencies are those of NCCL's tuning model for rings of large messages (NVLink, network); small collectives over
    many ranks take less.
    """
    half, single, double = (PRODUCTS * rate for rate in rates)
    return Machine(
        name,
        {"bfloat16": half, "float32": single, "float64": double},
        COPIES * memory[1],
        memory[0],
        8,
        Link(3.4e-6, LINKS * links[0]),
        Link(14e-6, LINKS * links[1]),
        5e-6,
        True,
        f"data sheet: {PRODUCTS:.0%} of its products, {COPIES:.0%} of its memory and links; not measured",
    )


# SXM boards, eight to a node, each with its network adapter: 200 Gb/s beside the A100, 400 Gb/s beside the others.
PRESETS = {
    machine.name: machine
    for machine in (
        _data_sheet("A100-80GB", (312e12, 19.5e12, 9.7e12), (80e9, 2.039e12), (300e9, 25e9)),
        _data_sheet("H100", (989e12, 67e12, 34e12), (80e9, 3.35e12), (450e9, 50e9)),
        _data_sheet("H200", (989e12, 67e12, 34e12), (141e9, 4.8e12), (450e9, 50e9)),
        Machine(
            "CPU",
            {"float64": 3e10, "float32": 8e10, "bfloat16": 8e10},
            1.5e10,
            4e9,
            2**20,
            Link(1e-3, 7e8),
            Link(1e-3, 7e8),
            7e-6,
            False,
            "measured, rounded: a core of an AMD EPYC with AVX2, ranks of one machine over gloo; memory assumed",
        ),
    )
}


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The machine that a device is taken for: the preset whose name is part of the GPU's, else "A100-80GB", with the
    GPU's own memory; "CPU" for other devices. Nothing is measured."""
    if device.type != "cuda":
        return PRESETS["CPU"]
    about = torch.cuda.get_device_properties(device)
    known = (PRESETS[name] for name in ("H200", "H100") if name in about.name)
    return replace(next(known, PRESETS["A100-80GB"]), memory=float(about.total_memory))
